"""The example script for SLURM, with stand-ins for `srun` and `scontrol`: what it runs, and what it does afterwards."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from harness.cli.arguments import build_parser
from tests.conftest import PROJECT

PLACES = {"STORAGE": "postgresql+psycopg://flora@db/x", "TRACKING": "http://mlflow:5000"}


def submitted(folder: Path, code: int, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script as a task of an array, whose command ends with `code`; what it called."""
    for name, ends in (("srun", code), ("scontrol", 0)):
        (folder / name).write_text(
            f'#!/bin/bash\necho {name} "${{@@Q}}" >> {shlex.quote(str(folder))}/calls\nexit {ends}\n'
        )
        (folder / name).chmod(0o755)
    slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(
        ["bash", PROJECT / "docs" / "slurm.sbatch"],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **slurm, **variables},
        capture_output=True,
        text=True,
    )
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("code", [0, 1, 2])
def test_every_task_runs_the_study_on_the_storage(code: int, tmp_path: Path) -> None:
    done, calls = submitted(tmp_path, code, **PLACES)
    assert done.returncode == code
    (call,) = calls
    words = shlex.split(call)
    assert words[:4] == ["srun", "--cpus-per-task=8", "python", "run_study.py"]
    arguments = build_parser("run_study.py").parse_args(words[4:])
    assert (arguments.study, arguments.trials) == ("flowers102", 50)
    assert (arguments.storage, arguments.tracking_uri) == tuple(PLACES.values())


def test_a_task_whose_time_is_up_is_queued_again(tmp_path: Path) -> None:
    done, calls = submitted(tmp_path, 130, **PLACES)
    assert done.returncode == 130
    assert calls[1] == "scontrol 'requeue' '7_3'"


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_is_not_given_is_named(name: str, tmp_path: Path) -> None:
    done, calls = submitted(tmp_path, 0, **{key: value for key, value in PLACES.items() if key != name})
    assert done.returncode != 0
    assert f"{name}: is not set; for example" in done.stderr
    assert calls == []
