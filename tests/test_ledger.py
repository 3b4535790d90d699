"""The ledger refuses every line that is not as it was written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.ledger import Line, appended, fault, openings

UID = "a study"


def written(count: int) -> list[Line]:
    lines: list[Line] = []
    for number in range(count):
        event = "result" if number % 2 else "opened"
        lines = appended(lines, UID, {"event": event, "trial": number, "time": "2026-11-22T10:00:00+00:00"})
    return lines


def test_a_ledger_as_it_was_written_has_no_fault() -> None:
    for count in range(5):
        assert fault(written(count), UID) is None
    assert [line["trial"] for line in openings(written(4))] == [0, 2]


@given(st.integers(0, 4), st.sampled_from(["event", "trial", "time", "line", "previous", "hash"]), st.integers(2, 99))
def test_an_edited_line_is_named(number: int, field: str, value: int) -> None:
    lines = copy.deepcopy(written(5))
    lines[number][field] = value if field in ("trial", "line") else f"{lines[number][field]}{value}"
    if lines == written(5):  # the value that was there
        return
    assert fault(lines, UID) == f"line {number + 1} of the test ledger is not as it was written"


@pytest.mark.parametrize("changed", [[0, 1, 3, 4], [1, 0, 2, 3, 4], [0, 1, 2, 2, 3, 4], [1, 2, 3, 4]])
def test_lines_taken_out_moved_or_repeated_are_found(changed: list[int]) -> None:
    lines = written(5)
    assert fault([lines[number] for number in changed], UID) is not None


def test_lines_cut_off_at_the_end_are_found_by_the_hash_that_the_result_keeps() -> None:
    lines = written(5)
    assert fault(lines[:3], UID, known=lines[4]["hash"]) is not None
    assert fault([], UID, known=lines[4]["hash"]) is not None
    assert fault(lines, UID, known=lines[4]["hash"]) is None


def test_another_studys_ledger_is_not_taken() -> None:
    assert fault(written(2), "another study") is not None


def test_a_line_that_is_added_by_hand_does_not_fit() -> None:
    lines: list[dict[str, Any]] = written(2)
    assert fault([*lines, {"event": "result", "trial": 2}], UID) is not None
