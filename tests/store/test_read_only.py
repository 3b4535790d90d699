"""A study in a folder that may not be written can be looked at, and is not run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cli.commands import main
from harness.config import find as catalogue
from harness.store.opening import open_store
from tests.analytic import Died, run_analytic
from tests.refusal import assert_refused


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Modes keep others out; root ignores them and needs a mount. Skips the test where neither works."""
    folder.chmod(0o555)
    mounted = os.access(folder, os.W_OK)
    try:
        if mounted:
            command = ["mount", "-o", "bind,ro", str(folder), str(folder)]
            try:
                mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
            except OSError:
                mounted = False
            if not mounted:
                pytest.skip("this user may write everywhere and may not mount")
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.chmod(0o755)


@pytest.fixture
def begun(workspace: Path) -> catalogue.Found:
    """A demo with two finished trials and one that was interrupted."""
    found = catalogue.find("demo")
    with open_store(found.study, found.storage_url) as store, pytest.raises(Died):
        run_analytic(found.study, store, 3, stop_after=(2, 1, "report"))
    return found


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_study_in_a_read_only_folder_is_shown_and_reported(
    begun: catalogue.Found, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [shown(capsys, "show", "demo", *more) for more in ([], ["--json"], ["--digest"])]
    with unwritable(workspace / "studies"):
        assert [shown(capsys, "show", "demo", *more) for more in ([], ["--json"], ["--digest"])] == before
        shown(capsys, "report", "demo", "--output", str(workspace / "elsewhere"))
        assert_refused(workspace, capsys, ["report", "demo"], ["demo.report", "cannot be"])
        assert_refused(workspace, capsys, ["run", "--study", "demo"], ["demo.db", "is not writable", "--storage"])
        elsewhere = ["run", "--study", "demo", "--storage", "sqlite:///studies/new.db"]
        assert_refused(workspace, capsys, elsewhere, ["new.db", "is not writable", "--storage"])
    assert (workspace / "elsewhere" / "report.html").is_file()


@pytest.mark.slow
def test_a_study_that_runs_in_a_read_only_folder_is_shown_as_it_is_now(
    begun: catalogue.Found, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last trials are in the log beside the database, and its process is known by its number."""
    with open_store(begun.study, begun.storage_url) as store:
        run_analytic(begun.study, store, 4)
        store.ask(begun.study)
        with unwritable(workspace / "studies"):
            trials = json.loads(shown(capsys, "show", "demo", "--json"))["trials"]
            assert (sum(trials.values()), trials["running"]) == (5, 1)
