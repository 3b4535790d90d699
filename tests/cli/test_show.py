"""`show` and `report`: what a study found so far, for people and for programs, while it runs or after."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from harness.cli.commands import main
from harness.config import find as catalogue
from harness.store.opening import open_store
from tests.analytic import Died, run_analytic
from tests.refusal import assert_refused, demo_with


@pytest.fixture
def demo(workspace: Path) -> catalogue.Found:
    """The demo with six analytic trials, and a seventh whose process died."""
    found = catalogue.find("demo")
    with open_store(found.study, found.storage_url) as store, pytest.raises(Died):
        run_analytic(found.study, store, 8, epochs=8, stop_after=(6, 1, "report"))
    return found


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.slow
def test_show_prints_one_json_object(demo: catalogue.Found, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = json.loads(shown(capsys, "show", "demo", "--json"))
    assert set(seen) >= {"study", "trials", "best", "final", "storage", "tracking"}
    assert seen["study"] == "demo"
    assert set(seen["trials"]) == {"complete", "pruned", "failed", "running", "interrupted"}
    assert sum(seen["trials"].values()) == 7
    assert (seen["trials"]["running"], seen["trials"]["interrupted"]) == (0, 1)
    assert set(seen["best"]) == {"number", "value", "params"}
    assert set(seen["best"]["params"]) == set(demo.study.space)
    assert seen["final"] is None
    assert seen["storage"] == demo.storage_url
    assert seen["tracking"].endswith("mlruns/mlflow.db")


@pytest.mark.slow
def test_show_prints_a_summary_for_people(demo: catalogue.Found, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "show", "demo").splitlines()
    assert lines[0].startswith("study     demo: ")
    assert lines[0].endswith("1 interrupted")
    assert "running" not in lines[0]
    assert any(line.startswith("best      ") for line in lines)
    assert "final     The test set has not been opened." in lines
    assert f"storage   {demo.storage_url}" in lines


@pytest.mark.slow
def test_show_takes_a_file_and_a_storage(
    demo: catalogue.Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = shown(capsys, "show", "demo", "--json")
    by_file = shown(capsys, "show", "studies/demo.py", "--storage", demo.storage_url, "--json")
    assert json.loads(by_file) == json.loads(by_name)
    other = shown(capsys, "show", "demo", "--tracking-uri", "http://mlflow:5000", "--json")
    assert json.loads(other)["tracking"] == "http://mlflow:5000"


@pytest.mark.slow
def test_show_answers_while_the_study_is_held(demo: catalogue.Found, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(demo.study, demo.storage_url):
        assert json.loads(shown(capsys, "show", "demo", "--json"))["study"] == "demo"


@pytest.mark.slow
def test_an_unfinished_trial_is_running_while_a_process_holds_the_study_and_interrupted_after_it(
    demo: catalogue.Found, capsys: pytest.CaptureFixture[str]
) -> None:
    def states() -> tuple[int, int, str]:
        seen = json.loads(shown(capsys, "show", "demo", "--json"))["trials"]
        table = Path(shown(capsys, "report", "demo").splitlines()[1])
        return seen["running"], seen["interrupted"], pandas.read_csv(table)["state"].iloc[-1]

    with open_store(demo.study, demo.storage_url):
        assert states() == (1, 0, "running")
        assert "1 running" in shown(capsys, "show", "demo").splitlines()[0]
    assert states() == (0, 1, "interrupted")


def test_show_changes_nothing(demo: catalogue.Found, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> dict[str, bytes]:
        return {
            str(file): file.read_bytes()
            for file in workspace.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }

    before = files()
    shown(capsys, "show", "demo")
    shown(capsys, "show", "demo", "--json")
    assert files() == before


def test_show_groups_lists_the_learning_rate_of_every_depth(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, "show", "demo", "--groups")
    for depth in ("stem", "blocks.0", "blocks.1", "blocks.2", "classifier"):
        assert depth in text
    assert not list(workspace.glob("studies/*.db"))


@pytest.mark.slow
def test_report_writes_a_page_and_a_table(
    demo: catalogue.Found, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, table = (Path(line) for line in shown(capsys, "report", "demo").splitlines())
    assert page == workspace / "studies" / "demo.report" / "report.html"
    assert page.stat().st_size > 1000
    assert len(pandas.read_csv(table)) == 7


def test_report_writes_where_it_is_told(
    demo: catalogue.Found, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, "report", "demo", "--output", "elsewhere")
    assert {file.name for file in (workspace / "elsewhere").iterdir()} == {"report.html", "trials.csv"}
    assert not (workspace / "studies" / "demo.report").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(demo: catalogue.Found, workspace: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "harness", "show", "demo"]
    done = subprocess.run(command, cwd=workspace, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_groups_of_a_backbone_without_pretrained_weights_are_shown(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_with(workspace, "own", "backbone=TinyMaxViT()", "backbone=OtherNet()")
    file = workspace / "studies" / "own.py"
    text = file.read_text().replace(
        "STUDY = Study(", "from tests.training.test_optim import OtherNet\n\nSTUDY = Study(", 1
    )
    file.write_text(re.sub(r'^ *"backbone\..*\n', "", text, flags=re.MULTILINE).replace('"demo"', '"own"'))
    groups = shown(capsys, "show", "own", "--groups")
    assert [line.split()[0] for line in groups.splitlines()[1:]][-1] == "class_token"


def test_a_depth_that_matches_nothing_is_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo_with(workspace, "own", "backbone=TinyMaxViT()", "backbone=OWN")
    file = workspace / "studies" / "own.py"
    own = (
        "class Own(TinyMaxViT):\n"
        "    def depths(self, by):\n"
        '        return ["stem.", "blocks.", "nowhere.", "classifier."]\n\n\n'
        "OWN = Own()\n"
    )
    file.write_text(file.read_text().replace("STUDY = Study(", f"{own}STUDY = Study(", 1))
    assert_refused(workspace, capsys, ["show", "own", "--groups"], ["nowhere.", "matches no parameter"])
