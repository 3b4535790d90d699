"""Workers on a Ray cluster killed at random: `pytest -m chaos`, with CHAOS_SEED=NUMBER as for other workers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ray_nodes import nodes, tasks
from tests.workers.test_pool import Command, wait_until_gone

pytest.importorskip("ray", reason="Ray is not installed")

# To begin again a worker takes seconds; a trial that took none would be over before anybody is killed.
SLOW = """

import time


class Slow(type(train.backbone)):
    def build(self, classes, image_size):
        model = super().build(classes, image_size)
        model.register_forward_pre_hook(lambda model, images: time.sleep(0.1) if model.training else None)
        return model


STUDY = dataclasses.replace(STUDY, train=dataclasses.replace(train, backbone=Slow()))
"""


class OnRay(Command):
    def __init__(self, place: Path, cache: Path, address: str, trials: int) -> None:
        super().__init__(place, cache, epochs=3, trials=trials)
        file = place / "studies" / "tiny.py"
        file.write_text(file.read_text() + SLOW)
        self.address = address

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return super().start("--engine", "ray", "--ray-address", self.address, *arguments)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_workers_on_ray_killed_at_random_lose_nothing_and_do_nothing_twice(
    cluster: Any, image_cache: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    chance, kills, found = random.Random(seed), 0, []
    with nodes(cluster, 3) as three:
        for number in range(3):
            command = OnRay(tmp_path / str(number), image_cache, cluster.address, trials=40)
            begun, before = time.monotonic(), kills
            while True:  # a killed coordinator is one that was not the last
                process = command.start("--workers", "3")
                try:
                    kills += rage(process, three, chance, at_most=8 - (kills - before))
                finally:
                    process.kill()
                if process.returncode != -signal.SIGKILL:
                    break
            assert process.returncode == 0
            print(f"study {number}: {kills - before} kills, {time.monotonic() - begun:.0f} s")
            command.check()
            found.append(command.results())
    assert found[0] == found[1] == found[2]
    assert kills >= 20


def rage(process: subprocess.Popen[str], nodes: list[Any], chance: random.Random, at_most: int) -> int:
    """Kill tasks, and now and then their coordinator, at random moments; returns how many before it ended.

    Between two kills an epoch is heard of, for workers that die again and again would end the command.
    """
    said: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        said.extend(process.stdout)

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    kills = heard = 0
    while process.poll() is None:
        time.sleep(chance.uniform(0.5, 3.5))
        workers, epochs = tasks(nodes), sum("  epoch " in line for line in list(said))
        if kills == at_most or not workers or epochs == heard:
            continue
        heard = epochs
        victim = process.pid if chance.random() < 0.1 else chance.choice(workers)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            kills += 1
        if victim == process.pid:
            wait_until_gone(workers)
    reader.join()
    print(process.returncode, "".join(said))
    return kills
