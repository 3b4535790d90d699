"""What whoever consumes a study's events promises, whatever it keeps."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.base.keys import final_key, trial_key
from harness.config.events import (
    Completed,
    Diverged,
    EpochEnded,
    Failed,
    Pruned,
    Reached,
    RetrainingEnded,
    TrialEnded,
    TrialStarted,
)
from harness.config.study import Study
from harness.store.store import Store
from harness.tracking.mlflow import MLflowTracker
from harness.tracking.places import local_tracker
from tests.analytic import epoch_result, memory_store
from tests.conftest import make_study

NOTHING: dict[str, list[int]] = {"val_accuracy": [], "test_accuracy": []}
ONCE = {"val_accuracy": [1], "test_accuracy": []}
Snapshot = dict[str, tuple[str, dict[str, list[int]]]]  # by key: the state, and the steps of two metrics
OUTCOMES = (
    Completed(value=0.5),
    Pruned(epoch=1),
    Diverged(epoch=2),
    Failed(reason="ValueError", traceback="ValueError"),
)


class TrackerContract:
    """Subclass it with a `tracker` fixture, and say in `seen` what a reader of the tracker finds."""

    def seen(self, tracker: Any, study: Study, store: Store) -> Snapshot:
        """All of the study's runs."""
        raise NotImplementedError

    @pytest.fixture
    def study(self) -> Study:
        return make_study("cache")

    @pytest.fixture
    def store(self, study: Study) -> Store:
        store = memory_store(study)
        store.set_attribute("uid", uuid.uuid4().hex)
        store.ask(study)
        return store

    @pytest.fixture
    def started(self, store: Store) -> TrialStarted:
        (trial,) = store.trials()
        return TrialStarted(
            key=trial_key(0),
            kind="trial",
            name="trial 0",
            number=0,
            trial=0,
            params=trial.params,
            epochs=2,
            resumed=False,
            groups="stem 1e-3",
            progress=Reached(epoch=1, step=0, steps=1, epochs=[]),
        )

    def test_a_study_can_be_told_from_start_to_end(
        self, tracker: Any, study: Study, store: Store, started: TrialStarted, tmp_path: Path
    ) -> None:
        tracker.start(study, store, {"harness.seed": "0"})
        ended = EpochEnded(key="", name="", number=0, result=epoch_result(1, 0.5))
        for number, outcome in enumerate(OUTCOMES):
            key = trial_key(number)
            tracker.show(replace(started, key=key, number=number, trial=number))
            tracker.show(replace(ended, key=key))
            tracker.show(replace(ended, key=key))
            tracker.show(TrialEnded(key=key, number=number, params=started.params, outcome=outcome))
        never_began = TrialEnded(key=trial_key(4), number=4, params=started.params, outcome=OUTCOMES[3])
        tracker.show(never_began)
        again = replace(started, key=final_key(0, 1), kind="final", name="final seed 1", number=1, groups=None)
        tracker.show(again)
        tracker.show(replace(ended, key=final_key(0, 1)))
        tracker.show(
            RetrainingEnded(
                key=final_key(0, 1),
                kind="final",
                number=1,
                trial=0,
                params=started.params,
                epochs=(epoch_result(1, 0.5), epoch_result(2, 0.5)),
                metrics={"test_accuracy": 0.5},
            )
        )
        tracker.show(replace(ended, key=trial_key(9)))  # its start was never shown, and is not known
        tracker.show(replace(again, key=None))  # not to be logged
        tracker.show(replace(ended, key=None))
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "report.html").write_text("<html></html>")
        assert tracker.finish({"best_val_accuracy": 0.5}, [tmp_path / "report"], "complete")
        assert self.seen(tracker, study, store) == {
            "study": ("complete", NOTHING),
            **{trial_key(number): (outcome.state, ONCE) for number, outcome in enumerate(OUTCOMES)},
            trial_key(4): ("failed", NOTHING),
            final_key(0, 1): ("complete", {"val_accuracy": [1, 2], "test_accuracy": [2]}),
        }

    def test_it_can_be_interrupted_at_any_time(
        self, tracker: Any, study: Study, store: Store, started: TrialStarted
    ) -> None:
        tracker.interrupt()
        tracker.start(study, store, {})
        tracker.interrupt()
        tracker.start(study, store, {})
        tracker.show(started)
        tracker.show(EpochEnded(key=started.key, name="trial 0", number=0, result=epoch_result(1, 0.5)))
        tracker.interrupt()
        tracker.interrupt()
        expected = {"study": ("interrupted", NOTHING), trial_key(0): ("interrupted", ONCE)}
        assert self.seen(tracker, study, store) == expected

    def test_a_training_that_goes_on_shows_each_epoch_once(
        self, tracker: Any, study: Study, store: Store, started: TrialStarted
    ) -> None:
        reached = Reached(epoch=2, step=0, steps=1, epochs=[epoch_result(1, 0.5)])
        tracker.start(study, store, {})
        tracker.show(started)
        tracker.show(EpochEnded(key=started.key, name="trial 0", number=0, result=epoch_result(1, 0.5)))
        tracker.start(study, store, {})
        tracker.show(replace(started, resumed=True, progress=reached))
        tracker.show(TrialEnded(key=trial_key(0), number=0, params=started.params, outcome=Completed(value=0.5)))
        assert tracker.finish({}, [], "complete")
        assert self.seen(tracker, study, store) == {"study": ("complete", NOTHING), trial_key(0): ("complete", ONCE)}


class TestMLflowTracker(TrackerContract):
    @pytest.fixture(scope="class")
    def mlruns(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """One folder for all tests, for MLflow takes seconds to make a database; each test has a study of its own."""
        return tmp_path_factory.mktemp("mlruns")

    @pytest.fixture
    def tracker(self, mlruns: Path) -> MLflowTracker:
        return local_tracker(mlruns)

    def seen(self, tracker: Any, study: Study, store: Store) -> Snapshot:
        client = MlflowClient(tracker.uri)
        query = f"tags.`harness.study_uid` = '{store.uid}'"
        runs = client.search_runs([client.get_experiment_by_name(study.name).experiment_id], query)
        assert len({run.data.tags["harness.key"] for run in runs}) == len(runs)
        return {
            run.data.tags["harness.key"]: (
                run.data.tags["harness.state"],
                {name: [each.step for each in client.get_metric_history(run.info.run_id, name)] for name in NOTHING},
            )
            for run in runs
        }
