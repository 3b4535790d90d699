"""Measure the bookkeeping of a trial that trains nothing, against Optuna and MLflow used by hand.

    python -m benchmarks.trial_cost [--quick]

A trial is 30 epochs of 8 metrics on SQLite and is never pruned. The harness does all that it does for a study's trial:
ask, a run with tags, parameters and a text file, a report and a pruning decision per epoch, tell, the run's end. The
peer uses RDBStorage with its defaults, TPE and SuccessiveHalvingPruner, report and should_prune per epoch, a run with
the suggested parameters, and a log_metric per value. Times are from the first ask until MLflow has everything.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import optuna

from benchmarks.measure import Figures, alternate, ratios, script
from harness.base.keys import trial_key
from harness.config import find as catalogue
from harness.config.events import Completed, EpochEnded, EpochResult, Event, Metrics, Reached, TrialEnded, TrialStarted
from harness.config.study import Study
from harness.search.pruners import asha
from harness.search.samplers import tpe
from harness.store.opening import open_store
from harness.store.store import Store
from harness.tracking.expected import facts, trial_tags
from harness.tracking.places import local_tracker, local_uri

EPOCHS, IMAGES = 30, 1000


def the_study() -> Study:
    """The real study's space and configuration, with the sampler and pruner that both contestants use."""
    study = catalogue.find("flowers102").study
    train = dataclasses.replace(study.train, epochs=EPOCHS)
    return dataclasses.replace(study, train=train, sampler=tpe(), pruner=asha(min_epochs=5, reduction=2))


def accuracy(trial: int, epoch: int) -> float:
    """Better with every trial, so that no pruner stops one."""
    return 0.3 + 0.01 * trial + 0.001 * epoch


def epoch_result(trial: int, epoch: int) -> EpochResult:
    val = Metrics(loss=1.0 / epoch, correct=round(IMAGES * accuracy(trial, epoch)), total=IMAGES)
    return EpochResult(epoch=epoch, lr=1e-3, train=val, val=val, seconds=1.0, grad_norm=0.5)


@cache
def empty_mlflow() -> bytes:
    """A new MLflow database as MLflow makes it, which takes seconds; the harness changes its journal, the peer not."""
    with tempfile.TemporaryDirectory(prefix="trial-cost-") as folder:
        file = Path(folder) / "mlflow.db"
        local_tracker(file.parent)
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
        return file.read_bytes()


@contextmanager
def place() -> Iterator[Path]:
    """A folder with an empty MLflow database."""
    with tempfile.TemporaryDirectory(prefix="trial-cost-") as folder:
        (Path(folder) / "mlflow.db").write_bytes(empty_mlflow())
        yield Path(folder)


# -- the harness -------------------------------------------------------------------------------------------------------


def book(study: Study, store: Store, show: Callable[[Event], None] = lambda event: None) -> None:
    """What `harness.search.loop` does for a trial, without a training."""
    asked = store.ask(study)
    key, name = trial_key(asked.number), f"trial {asked.number}"
    about: dict[str, Any] = {"key": key, "number": asked.number}
    show(
        TrialStarted(
            **about,
            kind="trial",
            name=name,
            trial=asked.number,
            params=asked.params,
            epochs=EPOCHS,
            resumed=False,
            groups="stem 1e-3\n" * 6,
            progress=Reached(epoch=1, step=0, steps=1, epochs=[]),
        )
    )
    results = [epoch_result(asked.number, epoch) for epoch in range(1, EPOCHS + 1)]
    for result in results:
        assert result.val is not None
        store.report(asked, result.epoch, result.val.accuracy)
        show(EpochEnded(**about, name=name, result=result))
        assert not (result.epoch < EPOCHS and store.should_prune(asked, result.epoch))
    outcome = Completed(value=accuracy(asked.number, EPOCHS))
    store.tell(asked, outcome, results, 1.0, [{"torch": "none"}])
    show(TrialEnded(**about, params=asked.params, outcome=outcome))


class Harness:
    """Milliseconds a trial, all in all and until the training thread could go on."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.held: list[float] = []

    def both(self) -> float:
        study = the_study()
        with place() as folder, open_store(study, f"sqlite:///{folder}/study.db") as store:
            tracker = local_tracker(folder)
            tracker.start(study, store, facts(study, {}))
            start = time.perf_counter()
            for _ in range(self.trials):
                assert store.finished() < study.trials
                book(study, store, tracker.show)
            self.held.append(1000 * (time.perf_counter() - start) / self.trials)
            assert tracker.flush()
            total = time.perf_counter() - start
            assert_whole(folder, self.trials)
            tracker.finish({}, [], "complete")
        return 1000 * total / self.trials

    def storage(self) -> float:
        study = the_study()
        with place() as folder, open_store(study, f"sqlite:///{folder}/study.db") as store:
            start = time.perf_counter()
            for _ in range(self.trials):
                assert store.finished() < study.trials
                book(study, store)
            return 1000 * (time.perf_counter() - start) / self.trials

    def mlflow(self) -> float:
        study = the_study()
        with place() as folder, open_store(study, f"sqlite:///{folder}/study.db") as store:
            tracker = local_tracker(folder)
            tracker.start(study, store, facts(study, {}))
            start = time.perf_counter()
            for number in range(self.trials):
                log = tracker.run(trial_key(number), study.train, trial_tags(study, number))
                log.text("stem 1e-3\n" * 6, "parameter_groups.txt")
                for epoch in range(1, EPOCHS + 1):
                    log.epoch(epoch_result(number, epoch))
                log.end("complete")
            assert tracker.flush()
            total = time.perf_counter() - start
            tracker.finish({}, [], "complete")
        return 1000 * total / self.trials


def assert_whole(folder: Path, trials: int) -> None:
    """MLflow has every value of every trial once; the study's own run has the best ones besides."""
    query = "SELECT count(*) FROM metrics WHERE key NOT LIKE 'best_%'"
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        assert connection.execute(query).fetchone() == (trials * EPOCHS * 8,)


def delays(epochs: int = 20, every: float = 0.31) -> Figures:
    """Seconds from an epoch's end until another program sees it in MLflow; an epoch takes `every` seconds."""
    study, told, seen = the_study(), dict[int, float](), dict[int, float]()
    with place() as folder, open_store(study, f"sqlite:///{folder}/study.db") as store:
        tracker = local_tracker(folder)
        tracker.start(study, store, facts(study, {}))
        with closing(sqlite3.connect(folder / "mlflow.db")) as reader:

            def look(seconds: float) -> None:
                end = time.perf_counter() + seconds
                while (now := time.perf_counter()) < end:
                    for (step,) in reader.execute("SELECT step FROM metrics WHERE key = 'val_accuracy'").fetchall():
                        seen.setdefault(step, now)
                    time.sleep(0.01)

            log = tracker.run(trial_key(0), study.train, trial_tags(study, 0))
            for epoch in range(1, epochs + 1):
                log.epoch(epoch_result(0, epoch))
                told[epoch] = time.perf_counter()
                look(every)
            look(2.0)
        tracker.interrupt()
    return Figures(tuple(seen[epoch] - told[epoch] for epoch in told))


# -- the peer ----------------------------------------------------------------------------------------------------------


class Peer:
    """Optuna and MLflow as their documentation shows them."""

    def __init__(self, trials: int) -> None:
        self.trials = trials

    def run(self, *, storage: bool = True, mlflow: bool = True) -> float:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        with place() as folder:
            study = optuna.create_study(
                storage=f"sqlite:///{folder}/study.db" if storage else None,
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=0),
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=5, reduction_factor=2),
            )
            client = MlflowClient(local_uri(folder))
            experiment = client.create_experiment("peer")
            start = time.perf_counter()
            for number in range(self.trials):
                trial = study.ask()
                suggest(trial)
                if mlflow:
                    run_id = client.create_run(experiment, run_name=f"trial {number}").info.run_id
                    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in trial.params.items()])
                for epoch in range(1, EPOCHS + 1):
                    if mlflow:
                        for name, value in epoch_result(number, epoch).metrics().items():
                            client.log_metric(run_id, name, value, step=epoch)
                    if storage:
                        trial.report(accuracy(number, epoch), epoch)
                        assert not trial.should_prune()
                study.tell(trial, accuracy(number, EPOCHS))
                if mlflow:
                    client.set_terminated(run_id)
            return 1000 * (time.perf_counter() - start) / self.trials


def suggest(trial: optuna.Trial) -> None:
    trial.suggest_float("dropout", 0.0, 0.6)
    trial.suggest_categorical("hidden", ["256", "512", "1024", "1024-512"])
    trial.suggest_float("base_lr", 1e-5, 3e-3, log=True)
    trial.suggest_float("depth_lr_mult", 0.1, 1.0)


# -- both --------------------------------------------------------------------------------------------------------------


def contest(trials: int, rounds: int, parts: bool) -> tuple[dict[str, Figures], Figures]:
    """Milliseconds a trial, by contestant, and how long the harness held the training thread up."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    empty_mlflow()
    harness, peer = Harness(trials), Peer(trials)
    contestants: dict[str, Callable[[], float]] = {"harness": harness.both, "peer": peer.run}
    if parts:
        contestants |= {
            "harness, storage alone": harness.storage,
            "harness, MLflow alone": harness.mlflow,
            "peer, storage alone": lambda: peer.run(mlflow=False),
            "peer, MLflow alone": lambda: peer.run(storage=False),
        }
    Harness(1).both()  # what is made once in a process
    found = alternate(contestants, rounds)
    return found, Figures(tuple(harness.held))


def full() -> None:
    found, held = contest(trials=5, rounds=5, parts=True)
    for name, figures in found.items():
        print(f"{name:<26} {figures.text('ms per trial', 1)}")
    print(f"{'harness, thread blocked':<26} {held.text('ms per trial', 1)}")
    for name in ("", ", storage alone", ", MLflow alone"):
        pair = ratios(found[f"peer{name}"], found[f"harness{name}"])
        print(f"{f'peer / harness{name}':<34} {pair.text('times', 1)}")
    print(f"{'until an epoch is visible':<26} {delays().text('s', 2)}")


def quick() -> dict[str, float]:
    found, held = contest(trials=1, rounds=1, parts=False)
    return {
        "peer / harness": ratios(found["peer"], found["harness"]).median,
        "peer / harness's training thread": ratios(found["peer"], held).median,
    }


if __name__ == "__main__":
    script(full, quick)
