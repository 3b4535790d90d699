"""The list of benchmarks and their records: every script is described, and a fall by a third is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.accounts import PARTS
from benchmarks.clock import _owner
from benchmarks.machine import Others, kind
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
    for of_one_kind in records.values():
        assert set(of_one_kind) <= set(filter(benchmarks.has_quick, benchmarks.scripts()))
        assert all(ratio > 0 for each in of_one_kind.values() for ratio in each.values())


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Others, "cores", lambda self: 0.01)


def test_a_ratio_that_fell_by_more_than_a_third_is_too_slow_even_after_a_second_measurement(
    idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = iter([1.9, 1.9, 1.9, 2.1, 2.1])
    monkeypatch.setattr(benchmarks, "quick", lambda name: {"gain": next(given)})
    assert not benchmarks.holds("some", {"gain": 3.0})  # 1.9 twice
    assert benchmarks.holds("some", {"gain": 3.0})  # 1.9, then 2.1
    assert benchmarks.holds("some", {})  # nothing to compare with
    assert capsys.readouterr().out.count("TOO SLOW") == 3


@pytest.mark.parametrize(("cores", "words"), [(1.0, "other processes took 1.00 cores"), (None, "cannot be seen")])
def test_a_ratio_that_was_measured_beside_other_work_is_printed_and_neither_judged_nor_recorded(
    cores: float | None, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Others, "cores", lambda self: cores)
    monkeypatch.setattr(benchmarks, "quick", lambda name: {"gain": 1.0})
    assert benchmarks.holds("some", {"gain": 3.0})
    said = capsys.readouterr().out
    assert "1   record 3   not judged" in said
    assert words in said
    with pytest.raises(SystemExit, match=words):
        benchmarks.recorded("some")


def test_a_ratio_is_held_against_the_records_of_its_kind_of_processor_alone(
    idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmarks, "RECORDS", tmp_path / "records.json")
    monkeypatch.setattr(benchmarks, "quick", lambda name: {"gain": 1.0})
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick", "start"])
    for processor, code in ((kind(), 1), ("another", 0)):
        benchmarks.RECORDS.write_text(json.dumps({processor: {"start": {"gain": 3.0}}}))
        assert benchmarks.main() == code
    assert f"There is no record of this kind of machine ({kind()})" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="it takes Linux to see what other processes take")
def test_work_beside_a_measurement_is_seen() -> None:
    others = Others()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while Path(f"/proc/{busy.pid}/stat").read_text().rpartition(")")[2].split()[11] == "0":
            pass
        taken = others.cores()
        assert taken is not None
        assert taken > benchmarks.IDLE_CORES
    finally:
        busy.kill()
        busy.wait()


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


def test_what_goodput_counts_is_there_under_the_name_by_which_it_is_counted() -> None:
    for name, places in PARTS.items():
        for place, attributes in places.items():
            for attribute in attributes:
                assert callable(getattr(_owner(place), attribute, None)), f"{name}: {place}.{attribute}"
