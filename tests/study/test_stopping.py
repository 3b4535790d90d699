"""A request to stop that comes after the last batch, while results or weights are written, loses nothing either."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from harness.config.events import EpochEnded
from harness.config.study import Study
from harness.final.retrain import Context
from harness.final.test_set import final_run
from harness.search.loop import evaluate_trial, search
from harness.search.pruners import no_pruning
from harness.store.opening import open_store
from harness.store.store import Store
from harness.training import checkpoint
from harness.training.checkpoint import read_tensors
from harness.training.step import Runtime

CPU = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_stopped_while_its_result_is_recorded_a_trial_keeps_its_training(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        monkeypatch.setattr(Store, "tell", stop)
        trial = evaluate_trial(study, store.ask(study), store, CPU, tmp_path / "checkpoints")
        with pytest.raises(KeyboardInterrupt):
            list(trial)
    # Its interval, a minute, has not passed: nothing but the request has it written.
    assert len(read_tensors(tmp_path / "checkpoints" / "trial-0.safetensors")[1]["epochs"]) == study.train.epochs


@pytest.mark.slow
def test_stopped_while_its_weights_are_written_a_final_seed_keeps_its_training(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = dataclasses.replace(study, trials=1), tmp_path / "checkpoints"
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        list(search(study, store, CPU, folder))
        original = checkpoint.write_tensors

        def stopped_once(*arguments: Any) -> None:
            monkeypatch.setattr(checkpoint, "write_tensors", original)
            stop()

        monkeypatch.setattr(checkpoint, "write_tensors", stopped_once)
        place = Context(study=study, store=store, runtime=CPU, checkpoints=folder)
        with pytest.raises(KeyboardInterrupt):
            list(final_run(place, tmp_path / "model"))
    assert len(read_tensors(folder / "final-seed-0-of-trial-0.safetensors")[1]["epochs"]) == study.train.epochs


class Always(optuna.pruners.BasePruner):
    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return True


@pytest.mark.slow
def test_an_epoch_that_a_trial_went_beyond_is_not_judged_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then other workers' results are there, and the pruner might say otherwise."""
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, epochs=3), pruner=no_pruning())
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        list(evaluate_trial(study, store.ask(study), store, CPU, tmp_path / "checkpoints"))  # the base, never pruned
        begun = evaluate_trial(study, store.ask(study), store, CPU, tmp_path / "checkpoints")
        for event in begun:
            if isinstance(event, EpochEnded):
                break
        with monkeypatch.context() as patch:
            patch.setattr(Store, "check", stop)  # after the next batch
            with pytest.raises(KeyboardInterrupt):
                list(begun)
        store._study.pruner = Always()
        resumed = evaluate_trial(study, store.ask(study), store, CPU, tmp_path / "checkpoints")
        assert [event.result.epoch for event in resumed if isinstance(event, EpochEnded)] == [2]
        _, trial = store.trials()
    assert (trial.state, list(trial.curve)) == ("pruned", [1, 2])
