"""The list of benchmarks and their records: every script is described, and a fall by a third is noticed."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.measure import Figures, alternate, ratios


def test_every_script_says_in_its_first_line_what_it_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert benchmarks.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(benchmarks.scripts()) >= 8
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_every_record_belongs_to_a_quick_mode() -> None:
    records = json.loads(benchmarks.RECORDS.read_text())
    assert set(records) == set(filter(benchmarks.has_quick, benchmarks.scripts()))
    assert all(ratio > 0 for each in records.values() for ratio in each.values())


def test_a_ratio_that_fell_by_more_than_a_third_is_too_slow_even_after_a_second_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = iter([1.9, 1.9, 1.9, 2.1, 2.1])
    monkeypatch.setattr(benchmarks, "quick", lambda name: {"gain": next(given)})
    assert not benchmarks.holds("some", {"gain": 3.0})  # 1.9 twice
    assert benchmarks.holds("some", {"gain": 3.0})  # 1.9, then 2.1
    assert benchmarks.holds("some", {})  # nothing to compare with
    assert capsys.readouterr().out.count("TOO SLOW") == 3


def test_contestants_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    figures = alternate({name: lambda name=name: order.append(name) or 1.0 for name in "ab"}, rounds=2)  # type: ignore[misc]
    assert order == ["a", "b", "b", "a"]
    assert figures["a"] == Figures((1.0, 1.0))


def test_ratios_are_taken_within_a_round() -> None:
    disturbed = ratios(Figures((2.0, 20.0, 2.0)), Figures((1.0, 10.0, 1.0)))
    assert disturbed.values == (2.0, 2.0, 2.0)
    assert disturbed.text("x", 1) == "2.0 x (2.0 to 2.0, n = 3)"


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick", "nonsense"])
    assert benchmarks.main() == 2
    assert "nonsense" in capsys.readouterr().err
