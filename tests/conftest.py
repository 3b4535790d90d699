"""What the tests share: a tiny study that runs in a second, and a workspace like a user's own folder."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

# One thread, in child processes too: thread counts change the bits of a sum, and the threads of several processes on a
# busy machine wait for each other (seen: 30 s of work in 7 minutes).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job ignores Ctrl-C, and so do its children; the tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from harness.config.space import Choice, Float
from harness.config.study import Study
from harness.config.train import FinalConfig, OptimConfig, RuntimeConfig, TrainConfig
from harness.garden.dataset import Garden
from harness.models.maxvit import TinyMaxViT
from harness.search.pruners import no_pruning
from harness.search.samplers import tpe
from harness.tracking.library import found_set
from harness.tracking.places import local_tracker
from harness.training import interrupt
from tests.postgres import database, postgres  # noqa: F401  (fixtures)
from tests.ray_nodes import cluster  # noqa: F401  (a fixture)

# Nothing is judged by its time: machines are shared.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

pytest.register_assert_rewrite("tests.refusal")  # its assertions speak for the tests that call it
if TYPE_CHECKING:
    from tests.faulty import CommandLine

PROJECT = Path(__file__).resolve().parent.parent


def make_study(cache: Path | str, **changes: Any) -> Study:
    """A study of seconds: the tiny MaxViT untrained, 32 drawn images a split, two epochs, one final seed."""
    study = Study(
        name="tiny",
        train=TrainConfig(
            data=Garden(train_per_class=2, val_per_class=2, test_per_class=2, cache=str(cache)),
            backbone=TinyMaxViT(pretrained=False, hidden=(16,)),
            optim=OptimConfig(base_lr=1e-3, depth_lr_mult=0.5),
            runtime=RuntimeConfig(device="cpu", precision="fp32", channels_last="off", compile="off"),
            batch_size=16,
            epochs=2,
        ),
        space={
            "backbone.dropout": Float(0.0, 0.6),
            "backbone.hidden": Choice(((16,), (16, 8))),
            "optim.base_lr": Float(1e-4, 1e-2, log=True),
            "optim.depth_lr_mult": Float(0.0, 1.0),
        },
        sampler=tpe(n_startup_trials=2),
        pruner=no_pruning(),
        trials=3,
        final=FinalConfig(seeds=1, publish=False),
    )
    return dataclasses.replace(study, **changes)


# Files that take minutes of one core, which begin first.
LONGEST = ("test_docs.py", "test_ray.py", "test_doctor.py", "test_main_job.py", "test_notebook.py", "test_chaos.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, the longest before all, so that at the end no core waits for one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.path not in slow, place.get(item.path.name, len(LONGEST))))


@pytest.fixture(scope="session", autouse=True)
def signals_at_first() -> tuple[dict[int, Any], Any, Any]:
    """Who hears of signals, and the two hooks that commands set too, before any test."""
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    return handlers, sys.unraisablehook, sys.excepthook


@pytest.fixture(autouse=True)
def signals(signals_at_first: tuple[dict[int, Any], Any, Any]) -> Iterator[None]:
    """What a command in this process did to signals, and whether it was asked to stop, ends with its test."""
    _put_back(*signals_at_first)  # a fixture of many tests may have run one
    yield
    _put_back(*signals_at_first)


def _put_back(handlers: dict[int, Any], unraisable: Any, uncaught: Any) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.unraisablehook, sys.excepthook = unraisable, uncaught
    interrupt._forget()


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of drawn images for the whole run of the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables and nothing else: making one takes seconds, copying it does not."""
    folder = tmp_path_factory.mktemp("empty")
    local_tracker(folder)
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def nothing_found_set() -> Iterator[None]:
    """What a test set of MLflow's variables is not known to the next one in the same process."""
    yield
    found_set.clear()


@pytest.fixture
def study(image_cache: Path) -> Study:
    return make_study(image_cache)


@pytest.fixture
def mlruns(tmp_path: Path, empty_mlflow: Path) -> Path:
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_mlflow, tmp_path / "mlruns" / "mlflow.db")
    return tmp_path / "mlruns"


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """`run --study tiny` in an empty folder, in this process."""
    from tests.faulty import CommandLine

    monkeypatch.chdir(tmp_path)
    return CommandLine(tmp_path, capsys)


@pytest.fixture(scope="session")
def undisturbed(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All that the study of the fault tests comes to when nothing happens to it."""
    from tests.faulty import complete, small_study

    return complete(small_study(image_cache), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the project's studies, as the working directory."""
    shutil.copytree(
        PROJECT / "studies", tmp_path / "studies", ignore=shutil.ignore_patterns("*.db*", "*.model", "*.report")
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network and no cached weights, whatever this machine has."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
