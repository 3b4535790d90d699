"""The process that loads a registered model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from harness.serving import checker
from harness.serving.checker import Checker
from harness.tracking.library import StoreFault
from tests.workers.test_pool import alive, wait_until_gone

IMAGES = numpy.zeros((1, 3, 8, 8), dtype="float32")
HOLD = """
import time
from harness.serving.checker import Checker

with Checker() as checker:
    print(checker._process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_what_is_no_model_cannot_be_loaded(tmp_path: Path) -> None:
    with Checker() as checker:
        said = checker.logits(tmp_path, numpy.zeros((1, 3, 8, 8), dtype="float32"))
    assert isinstance(said, str)
    assert said.startswith("cannot be loaded (")


def test_it_ends_with_the_process_that_began_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.communicate()
    wait_until_gone([pid])


def test_that_it_is_killed_is_no_verdict(tmp_path: Path) -> None:
    with Checker() as checker:
        assert checker.lives()
        os.kill(checker._process.pid, signal.SIGKILL)
        with pytest.raises(StoreFault, match="ended by signal 9"):
            checker.logits(tmp_path, numpy.zeros((1, 3, 8, 8), dtype="float32"))
        assert not checker.lives()


def test_it_ends_unasked() -> None:
    with Checker() as checker:
        pid = checker._process.pid
    assert not alive(pid)


def test_it_has_the_packages_of_this_process_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(checker, "SCRIPT", "import only_here, sys; sys.exit('imported')")
    with Checker() as process:
        assert process.logits(tmp_path, IMAGES) == "cannot be loaded (imported)"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import a_package_that_is_missing", "No module named 'a_package_that_is_missing'"),
        ("raise OSError(28, 'No space left on device')", "No space left on device"),
        ("import time; time.sleep(600)", "did not answer within 0.5 s"),
    ],
)
def test_that_it_could_not_check_is_no_verdict(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "SCRIPT", script)
    monkeypatch.setattr(checker, "CHECK_SECONDS", 0.5 if "time" in script else 600)
    with Checker() as process, pytest.raises(StoreFault, match=said):
        process.logits(tmp_path, IMAGES)
