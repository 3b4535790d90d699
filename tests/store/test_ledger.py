"""The ledger refuses every line that was changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.final_result import FinalResult
from harness.final.test_set import summary
from harness.store.ledger import Line, appended, difference, fault, openings, readable
from tests.analytic import NOT_COMPARED

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
    assert fault(lines, UID) == f"line {number + 1} of the test ledger was changed"


@pytest.mark.parametrize("content", [5, "no JSON", {}, {"line": 1}, True, 0.5, ""])
def test_what_is_no_list_is_named(content: Any) -> None:
    assert fault(content, UID) == "the test ledger was changed: it is not a list of lines"
    assert readable(content) == []


@pytest.mark.parametrize("line", [{}, 1, None, "opened", [], {"line": 1}, {"event": "result", "trial": 0, "line": 2}])
def test_what_is_no_line_is_named(line: Any) -> None:
    assert fault([line], UID) == "line 1 of the test ledger was changed"
    assert fault([*written(1), line], UID) == "line 2 of the test ledger was changed"
    assert readable([line]) == []


@given(st.sampled_from(["line", "event", "trial", "time", "commit", "hash", "seeds"]), st.sampled_from([None, [1], {}]))
def test_a_line_is_shown_when_it_holds_what_is_shown_of_it(name: str, value: Any) -> None:
    common = {"line": 2, "trial": 3, "time": "2026-11-22T10:00:00+00:00", "commit": "abc", "hash": "0" * 64}
    result = common | {"event": "result", "seeds": [{"correct": 1, "total": 2}]}
    opened = common | {"event": "opened", "reason": "why not"}
    assert readable([opened, result]) == [opened, result]
    assert readable([result | {name: value}]) == []
    assert readable([opened | {"reason": 5}]) == []


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


def test_a_result_that_names_an_opening_is_found() -> None:
    lines = written(2)
    seeds = [{"seed": 0, "correct": 1, "total": 2, "accuracy": 0.5, "weights": "0"}]
    about = {"trial": 0, "fit_on": "train", "test_openings": 1, "ledger": lines[0]["hash"]}
    final = FinalResult.of(summary(seeds) | about | NOT_COMPARED)
    assert "which is not a result" in str(difference(lines, final))


def test_a_line_that_is_added_by_hand_does_not_fit() -> None:
    lines: list[dict[str, Any]] = written(2)
    assert fault([*lines, {"event": "result", "trial": 2}], UID) is not None
