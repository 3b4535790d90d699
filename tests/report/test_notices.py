"""What a command hears of a study: lines of JSON, in order, whatever becomes of the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.cli.commands import main
from harness.cli.run import lasting_command
from harness.config import events
from harness.report import notices
from tests.conftest import PROJECT
from tests.patience import PATIENCE_SECONDS
from tests.small import study_in

HEARD = "heard.jsonl"
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, image_cache: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run` a study of milliseconds with options, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.report.display.StudyConsole.left", False)
    study_in(tmp_path, image_cache)
    return lambda *options: main(["run", "--study", "tiny", "--trials", "3", *options])


def script(folder: Path, text: str) -> str:
    file = folder / "hook.py"
    file.write_text(f"import sys, time\nline = sys.stdin.read()\n{text}\n")
    return f"{sys.executable} {file}"


def heard(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / HEARD).read_text().splitlines()]


def test_a_command_hears_what_happens_in_order(run: Run, tmp_path: Path) -> None:
    command = script(tmp_path, f"open({HEARD!r}, 'a').write(line)")
    assert run("--on-event", command) == 0
    lines = heard(tmp_path)
    kinds = [each["event"] for each in lines]
    assert kinds[0] == "begun"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"new_best"}
    values = [each["value"] for each in lines if each["event"] == "new_best"]
    assert values == sorted(values)
    assert (lines[0]["finished"], lines[-1]["finished"], lines[-1]["trials"]) == (0, 3, 3)
    low, high = lines[-1]["test"]["interval"]
    assert low <= lines[-1]["test"]["value"] <= high


def test_an_answer_that_is_no_utf_8_silences_nothing(run: Run, tmp_path: Path) -> None:
    command = script(tmp_path, f"sys.stdout.buffer.write(b'\\xe9')\nopen({HEARD!r}, 'a').write(line)")
    assert run("--on-event", command) == 0
    assert heard(tmp_path)[-1]["event"] == "finished"


def test_a_reader_that_goes_away_does_not_stop_the_study(run: Run, tmp_path: Path) -> None:
    line = f"{sys.executable} -m harness run --study tiny --trials 3 --json | head -1; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["event"] == "begun"
    assert harness.open("tiny", home=tmp_path).final is not None


def test_the_command_that_resumes_does_not_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_study.py", "--fresh", "--json", "--reopen-test", "why", "--trials", "9"])
    assert lasting_command().endswith("run_study.py --json --trials 9")


def test_json_is_all_that_is_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", "--patience", "1") == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [each["event"] for each in lines if each["event"] != "new_best"] == ["begun", "search_stopped", "finished"]
    assert "trial 0" in said.err
    assert run("--json", "--patience", "1") == 0
    again = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert again == ["begun", "finished"]


def test_an_interrupted_study_says_how_to_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: object, event: events.Event) -> None:
        if isinstance(event, events.EpochEnded) and event.number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("harness.report.display.Display.show", interrupt)
    monkeypatch.setattr(sys, "argv", ["run_study.py", "--study", "tiny", "--json"])
    assert run("--json") == 130
    said = capsys.readouterr()
    last = json.loads(said.out.splitlines()[-1])
    assert (last["event"], last["reason"], last["finished"]) == ("stopped", "interrupted", 1)
    assert last["command"].endswith("run_study.py --study tiny --json")
    assert "Resume with" in said.err


@pytest.mark.parametrize(
    ("text", "fault"),
    [("sys.exit('no network')", "exit code 1: no network"), ("time.sleep(60)", "it took longer than 0.5 s")],
)
def test_a_command_that_fails_is_named_once_and_the_study_goes_on(
    run: Run,
    tmp_path: Path,
    text: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(notices, "SECONDS", 0.5)
    assert run("--on-event", script(tmp_path, text)) == 0
    said = capsys.readouterr().err
    assert said.count("--on-event") == 1
    assert f"failed ({fault}); the study goes on." in said


def test_what_a_command_has_started_ends_with_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "SECONDS", 1.0)
    assert run("--on-event", f"sh -c 'sleep 600 & echo $! >> {tmp_path / 'started'}; wait'") == 0
    assert "it took longer than 1 s" in capsys.readouterr().err
    numbers = [int(each) for each in (tmp_path / "started").read_text().split()]
    assert numbers
    end = time.monotonic() + PATIENCE_SECONDS
    while any(map(is_alive, numbers)):
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("no-such-program x", "there is no program 'no-such-program'"),
        ("'open", "cannot be read (No closing quotation)"),
    ],
)
def test_a_command_that_is_none_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--on-event", command) == 2
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "studies").glob("*.db"))
