"""Numbers that end and code that breaks inside a training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.base.errors import Halt, InputError, StudyFailed
from harness.config.events import EpochEnded, Event, TrialEnded, TrialStarted
from harness.config.space import Float
from harness.config.study import Study
from harness.config.train import FinalConfig, OptimConfig
from harness.data import augment
from harness.search.samplers import tpe
from harness.store.opening import open_store
from harness.store.store import Store, TrialRecord
from harness.tracking.places import local_tracker
from harness.training.step import accumulate_gradient
from tests.analytic import memory_store, run_analytic
from tests.conftest import make_study
from tests.faulty import CommandLine, complete, one_sentence, small_study
from tests.tracking.test_tracker import runs_of


@pytest.fixture
def study(image_cache: Path) -> Study:
    return small_study(image_cache)


def trials_of(store: Store) -> list[TrialRecord]:
    return store.trials()


# -- no numbers ----------------------------------------------------------------------------------------------------


def poison_weights(model: nn.Module, step: int) -> None:
    if step == 3:
        next(model.parameters()).data.fill_(math.nan)


def explode_gradient(model: nn.Module, step: int) -> None:
    """An infinite gradient beside a loss that is a finite number."""
    if step == 3:
        parameter = next(model.parameters())
        parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


@pytest.mark.slow
@pytest.mark.parametrize("harm", [poison_weights, explode_gradient])
def test_a_trial_ends_with_the_epoch_in_which_its_numbers_ended(
    harm: Callable[[nn.Module, int], None], image_cache: Path, tmp_path: Path, mlruns: Path, monkeypatch: Any
) -> None:
    study, steps = small_study(image_cache, epochs=4), 0

    def harmed(model: nn.Module, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        harm(model, steps)
        return accumulate_gradient(model, *arguments)

    monkeypatch.setattr("harness.training.step.accumulate_gradient", harmed)
    seen: list[Event] = []
    tracker = local_tracker(mlruns)
    trials = complete(study, tmp_path, tracker, at=seen.append, look=trials_of)
    assert [trial.state for trial in trials] == ["diverged", "complete", "complete"]
    assert [event.result.epoch for event in seen if isinstance(event, EpochEnded) and event.number == 0][:1] == [1]
    assert len(trials[0].epochs) == 1  # the second epoch, of two steps, had no numbers any more
    told = trials[0]
    described = told_of(tmp_path)
    assert (described["epoch"], described["step"]) == (2, 1)
    assert described["lr"] == pytest.approx(study.train.optim.base_lr)  # the schedule's first step after the warm-up
    assert described["grad_norm"] is None  # no step of the epoch came before
    assert told.reason == "loss or gradient not finite at step 1 of epoch 2, learning rate 0.001"
    assert tracker.flush()  # a thread writes
    run = runs_of(mlruns)["trial-0"]
    assert (run.info.status, run.data.tags["harness.state"]) == ("FAILED", "diverged")


def told_of(place: Path, number: int = 0) -> dict[str, Any]:
    """What the storage keeps of a trial's end."""
    import optuna

    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{place}/tiny.db")
    outcome: dict[str, Any] = study.trials[number].user_attrs["outcome"]
    return outcome


def test_pixels_without_numbers_end_the_trial_in_its_first_epoch(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = augment.augment
    monkeypatch.setattr(augment, "augment", lambda *arguments: plain(*arguments) * math.nan)
    trials = complete(study, tmp_path, look=trials_of)
    assert [(trial.state, len(trial.epochs), trial.value) for trial in trials] == [("diverged", 0, None)] * 3
    assert (told_of(tmp_path)["epoch"], told_of(tmp_path)["step"]) == (1, 1)


def test_an_absurd_learning_rate_ends_the_trial_and_says_where(image_cache: Path, tmp_path: Path) -> None:
    optim = OptimConfig(base_lr=1e25, depth_lr_mult=0.5, warmup_epochs=0.0)
    study = small_study(image_cache)
    train = dataclasses.replace(study.train, optim=optim)
    study = dataclasses.replace(study, train=train, space={"optim.base_lr": Float(1e20, 1e30, log=True)})
    trials = complete(study, tmp_path, look=trials_of)
    assert trials[0].state == "diverged"
    told = told_of(tmp_path)
    assert (told["epoch"], told["step"]) == (1, 2)  # the first step is what the rate ruins
    assert told["lr"] == pytest.approx(1e25, rel=0.5)
    assert math.isfinite(told["grad_norm"])
    assert f"at step {told['step']} of epoch 1, learning rate" in str(trials[0].reason)
    assert "gradient norm up to" in str(trials[0].reason)


def test_the_sampler_leaves_the_region_that_diverges(image_cache: Path) -> None:
    study = make_study(image_cache, sampler=tpe(n_startup_trials=10))
    study = dataclasses.replace(study, space={**study.space, "optim.base_lr": Float(1e-4, 1.0, log=True)})
    store = memory_store(study)
    run_analytic(study, store, 50, epochs=3)
    diverged = [trial.state == "diverged" for trial in store.trials()]
    assert sum(diverged[:10]) >= 3  # half of the range does
    assert sum(diverged[10:]) <= 8  # of forty


# -- exceptions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_exception_fails_the_trial_and_its_traceback_is_kept_twice(
    study: Study, tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise ValueError("this cannot\nbe trained")

    def first_fails(event: Event) -> None:
        if isinstance(event, TrialEnded):
            monkeypatch.undo()

    monkeypatch.setattr("harness.training.step.accumulate_gradient", breaks)
    tracker = local_tracker(mlruns)
    trials = complete(study, tmp_path, tracker, at=first_fails, look=trials_of)
    assert [trial.state for trial in trials] == ["failed", "complete", "complete"]
    assert trials[0].reason == "ValueError: this cannot"
    assert "in breaks" in str(trials[0].traceback)
    assert tracker.flush()  # a thread writes
    run = runs_of(mlruns)["trial-0"]
    assert (run.info.status, run.data.tags["harness.state"]) == ("FAILED", "failed")
    artifact = Path(run.info.artifact_uri.removeprefix("file://")) / "traceback.txt"
    assert artifact.read_text() == trials[0].traceback


def diverging(kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[Event], None]:
    """Let one training after the search diverge in its first step; to be called at every event."""

    def without_number(*arguments: Any) -> Any:
        loss, correct = accumulate_gradient(*arguments)
        return loss * math.nan, correct

    def at(event: Event) -> None:
        if isinstance(event, TrialStarted):
            harmed = event.kind == kind and event.number == number
            broken = without_number if harmed else accumulate_gradient
            monkeypatch.setattr("harness.training.step.accumulate_gradient", broken)

    return at


@pytest.mark.slow
def test_a_final_seed_that_diverges_keeps_the_test_set_closed(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = dataclasses.replace(study, final=FinalConfig(seeds=2, publish=False))
    why = (
        r"^The test set stays closed, because final seed 1 of trial \d diverged in epoch 1 at step 1\. Run more trials"
    )
    with pytest.raises(StudyFailed, match=why):
        complete(study, tmp_path, at=diverging("final", 1, monkeypatch))
    monkeypatch.undo()
    with pytest.raises(StudyFailed, match=why):  # its checkpoint says so
        complete(study, tmp_path)
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        assert store.ledger() == []
        assert store.facts().final is None


@pytest.mark.slow
def test_a_base_that_diverges_is_not_compared(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = dataclasses.replace(study, trials=12, final=FinalConfig(seeds=2, publish=False))
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        run_analytic(study, store, 12, epochs=2)
        assert store.choice() is None
        best = store.best()
    assert best is not None
    assert best.number != 0
    complete(study, tmp_path, at=diverging("base", 1, monkeypatch))
    said = "The base configuration is not compared, because base seed 1 of trial 0 diverged in epoch 1 at step 1."
    assert said in capsys.readouterr().err
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        final = store.facts().final
        assert final is not None
        assert (len(final.per_seed), final.base, final.comparison) == (2, None, None)
    assert list((tmp_path / "tiny.checkpoints").glob("*")) == []


@pytest.mark.slow
def test_a_candidate_that_diverges_in_the_reranking_counts_as_the_worst(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = dataclasses.replace(study, final=FinalConfig(seeds=1, rerank=2, publish=False))
    complete(study, tmp_path, at=diverging("rerank", 0, monkeypatch))
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        record = store.facts().rerank or {}
    scores = [record["results"][str(number)][0]["score"] for number in record["candidates"]]
    assert scores == [0.0, 0.0]


@pytest.mark.slow
def test_a_device_that_fails_stops_the_study_and_the_trial_goes_on_in_the_next_process(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with")

    straight, failing = tmp_path / "straight", tmp_path / "failing"
    for place in (straight, failing):
        place.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("harness.training.step.accumulate_gradient", fails)
        with pytest.raises(
            Halt, match=r"^The device failed \(CUDA error: .* encountered\); run the same command again"
        ):
            complete(study, failing)
    assert complete(study, failing) == complete(study, straight)


@pytest.mark.slow
@pytest.mark.parametrize("error", [InputError, OSError])
def test_images_out_of_reach_fail_no_trial(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def gone(*arguments: Any) -> Any:
        raise error("photos does not exist; give another --data-root.")

    straight, failing = tmp_path / "straight", tmp_path / "failing"
    for place in (straight, failing):
        place.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("harness.search.loop.assemble", gone)
        patch.setattr("harness.search.loop.content_of", gone)
        said = r"^Trial 0 cannot begin \(photos does not exist; give another --data-root\); run the same command again"
        with pytest.raises(Halt, match=said):
            complete(study, failing)
    assert complete(study, failing) == complete(study, straight)


@pytest.mark.slow
def test_three_failures_in_a_row_stop_the_study_with_one_sentence(
    line: CommandLine, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr("harness.training.step.accumulate_gradient", breaks)
    ended = line.run("--trials", "5")
    assert ended.code == 1, ended
    assert one_sentence(ended.err), ended.err
    assert "3 trials in a row failed, the last one with ValueError: broken" in ended.err
    runs = runs_of(mlruns)
    assert {key: run.info.status for key, run in runs.items()} == dict.fromkeys(
        ["study", "trial-0", "trial-1", "trial-2"], "FAILED"
    )
    # Asked again, it says the same of a study without a result, and tries once before it gives up.
    without = line.run("--trials", "3")
    assert (without.code, one_sentence(without.err)) == (1, True), without
    assert "No trial is complete" in without.err
    assert "ValueError: broken" in without.err
    assert line.run("--trials", "5").code == 1
    assert len(runs_of(mlruns)) == 5
