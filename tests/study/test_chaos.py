"""Studies killed and stopped at random moments of every phase end equal to one that was left alone.

`pytest -m chaos` is the storm; a breeze runs with the other tests. CHAOS_SEED=NUMBER repeats the moments of one that
failed (it is in the captured output); the machine's own timing no seed repeats.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.storm import POINTS, Server, Storm, aim, plan, rage


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture
def seed() -> int:
    number = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={number}")
    return number


SAMPLERS = ("tpe(n_startup_trials=2)", "gp(n_startup_trials=2)")


def left_alone(place: Path, server: Server, trials: int, sampler: str) -> Storm:
    study = Storm(place, server, trials, sampler)
    study.start()
    study.check(study.result())
    return study


@pytest.mark.parametrize(
    "sampler", [pytest.param(SAMPLERS[0], marks=pytest.mark.slow), pytest.param(SAMPLERS[1], marks=pytest.mark.chaos)]
)
def test_killed_once_in_each_phase_a_study_ends_as_one_that_was_not(
    server: Server, seed: int, sampler: str, tmp_path: Path
) -> None:
    expected = left_alone(tmp_path / "alone", server, 3, sampler).result()
    chance = random.Random(seed)
    aims = [
        aim("search", "validation", "SIGKILL", chance, latest=2),
        aim("checkpoint", "before the rename", "SIGKILL", chance),
        aim("tell", "before recording", "SIGTERM", chance),
        aim("search", "batch", "SIGKILL", chance, latest=4),
        aim("final", "half a model", "SIGKILL", chance),
    ]
    storm = Storm(tmp_path / "killed", server, 3, sampler)
    rage(storm, aims, print)
    storm.check(expected)
    assert {kill.aim.phase for kill in storm.kills()} == set(POINTS)
    assert "validation" in {kill.aim.point for kill in storm.kills()}


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_after_a_storm_of_kills_a_study_is_the_one_that_was_left_alone(
    server: Server, seed: int, sampler: str, tmp_path: Path
) -> None:
    expected = left_alone(tmp_path / "alone", server, 8, sampler).result()
    kills = []
    for number in range(3):
        storm = Storm(tmp_path / f"killed-{number}", server, 8, sampler)
        rage(storm, plan(random.Random(f"{seed} {number}"), number, anywhere=2), print)
        storm.check(expected)
        kills += storm.kills()
    # A few are not met: a study may have ended, or a training may have fewer batches than the one aimed at.
    assert len(kills) >= 40
    phases = Counter(kill.aim.phase for kill in kills)
    assert all(phases[phase] >= 5 for phase in POINTS), phases
    assert Counter(kill.aim.signal for kill in kills)["SIGTERM"] >= 12
    assert any(kill.batches for kill in kills)  # else nothing was tried


PHOTOGRAPHS = PROJECT.parent / "shared"
IN_PIECES = {
    "the demo": ("demo", "--trials", "6", "--set", "checkpoint_seconds=5"),
    "MaxViT-T on photographs": (
        *("flowers102", "--data-root", str(PHOTOGRAPHS), "--trials", "1", "--set", "backbone.pretrained=false"),
        *("--set", "data.limit=34", "--set", "epochs=2", "--set", "batch_size=8", "--set", "final.seeds=1"),
        *("--set", "runtime.precision=fp32", "--set", "runtime.channels_last=off", "--set", "checkpoint_seconds=10"),
    ),
}


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arguments", IN_PIECES.values(), ids=IN_PIECES.keys())
def test_a_study_in_five_pieces_has_the_digest_of_the_same_study_straight(arguments: tuple[str, ...]) -> None:
    if arguments[0] == "flowers102" and not (PHOTOGRAPHS / "flowers-102" / "jpg").is_dir():
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    command = [sys.executable, "-m", "benchmarks.pieces", "--study", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stdout + done.stderr
