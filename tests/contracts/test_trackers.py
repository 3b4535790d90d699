"""What every tracker promises to the loop that drives it, whatever it keeps."""

from __future__ import annotations

import inspect
import uuid
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from harness import mlflow_tracker, tracking
from harness.config import Study
from harness.mlflow_places import local_tracker
from harness.storage import Store
from harness.tracking import NoTracker, Tracker, trial_key
from tests.analytic import epoch_result, memory_store
from tests.conftest import make_study

NOTHING: dict[str, list[int]] = {"val_accuracy": [], "test_accuracy": []}
Seen = dict[str, tuple[str, dict[str, list[int]]]]  # by key: the state, and the steps of two metrics


class TrackerContract:
    """Subclass it with a `tracker` fixture, and say in `seen` what a reader of the tracker finds."""

    def seen(self, tracker: Any, study: Study, store: Store) -> Seen | None:
        """All of the study's runs; None when the tracker keeps nothing."""
        raise NotImplementedError

    def assert_seen(self, expected: Seen, tracker: Any, study: Study, store: Store) -> None:
        found = self.seen(tracker, study, store)
        assert found is None or found == expected

    @pytest.fixture
    def study(self) -> Study:
        return make_study("cache")

    @pytest.fixture
    def store(self, study: Study) -> Store:
        store = memory_store(study)
        store.set_attribute("uid", uuid.uuid4().hex)
        return store

    def test_it_has_the_methods_of_the_protocol(self, tracker: Tracker) -> None:
        for name, wanted in inspect.getmembers(Tracker, inspect.isfunction):
            if name.startswith("_"):
                continue
            assert list(inspect.signature(getattr(tracker, name)).parameters) == [
                each for each in inspect.signature(wanted).parameters if each != "self"
            ], name

    def test_a_study_can_be_told_from_start_to_end(
        self, tracker: Tracker, study: Study, store: Store, tmp_path: Path
    ) -> None:
        tracker.start(study, store, {"harness.seed": "0"})
        for number, state in enumerate(("complete", "pruned", "diverged", "failed")):
            log = tracker.run(trial_key(number), study.train, {"harness.kind": "trial"})
            log.text("stem 1e-3", "parameter_groups.txt")
            log.epoch(epoch_result(1, 0.5))
            log.epoch(epoch_result(1, 0.5))
            log.metrics({"test_accuracy": 0.5}, step=1)
            log.end(state)
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "report.html").write_text("<html></html>")
        assert tracker.finish({"best_val_accuracy": 0.5}, [tmp_path / "report"], "complete")
        once = {"val_accuracy": [1], "test_accuracy": [1]}
        states = ("complete", "pruned", "diverged", "failed")
        expected = {trial_key(number): (state, once) for number, state in enumerate(states)}
        self.assert_seen({"study": ("complete", NOTHING), **expected}, tracker, study, store)

    def test_it_can_be_interrupted_at_any_time(self, tracker: Tracker, study: Study, store: Store) -> None:
        tracker.interrupt()
        tracker.start(study, store, {})
        tracker.interrupt()
        tracker.start(study, store, {})
        log = tracker.run(trial_key(0), study.train, {})
        log.epoch(epoch_result(1, 0.5))
        tracker.interrupt()
        tracker.interrupt()
        interrupted = {"val_accuracy": [1], "test_accuracy": []}
        expected: Seen = {"study": ("interrupted", NOTHING), trial_key(0): ("interrupted", interrupted)}
        self.assert_seen(expected, tracker, study, store)

    def test_a_run_can_be_taken_up_again(self, tracker: Tracker, study: Study, store: Store) -> None:
        for _ in range(2):
            tracker.start(study, store, {})
            log = tracker.run(trial_key(0), study.train, {"harness.kind": "trial"})
            log.epoch(epoch_result(1, 0.5))
        log.end("complete")
        assert tracker.finish({}, [], "complete")
        once = {"val_accuracy": [1], "test_accuracy": []}
        self.assert_seen({"study": ("complete", NOTHING), trial_key(0): ("complete", once)}, tracker, study, store)


class TestNoTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return NoTracker()

    def seen(self, tracker: Any, study: Study, store: Store) -> Seen | None:
        return None


class TestMLflowTracker(TrackerContract):
    @pytest.fixture(scope="class")
    def mlruns(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """One folder for all tests, for MLflow takes seconds to make a database; each test has a study of its own."""
        return tmp_path_factory.mktemp("mlruns")

    @pytest.fixture
    def tracker(self, mlruns: Path) -> Tracker:
        return local_tracker(mlruns)

    def seen(self, tracker: Any, study: Study, store: Store) -> Seen | None:
        client = MlflowClient(tracker.uri)
        query = f"tags.`harness.study_uid` = '{store.attribute('uid')}'"
        runs = client.search_runs([client.get_experiment_by_name(study.name).experiment_id], query)
        assert len({run.data.tags["harness.key"] for run in runs}) == len(runs)
        return {
            run.data.tags["harness.key"]: (
                run.data.tags["harness.state"],
                {name: [each.step for each in client.get_metric_history(run.info.run_id, name)] for name in NOTHING},
            )
            for run in runs
        }


def test_every_tracker_of_the_module_is_held_to_the_contract() -> None:
    trackers = {
        name for name in {**vars(tracking), **vars(mlflow_tracker)} if name.endswith("Tracker") and name != "Tracker"
    }
    assert trackers == {"NoTracker", "MLflowTracker"}
