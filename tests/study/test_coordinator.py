"""What is said of a study at its end."""

from __future__ import annotations

import pytest

from harness.base.errors import StudyFailed
from harness.config.events import Completed, Diverged, Failed, Pruned, TrialOutcome
from harness.study.coordinator import check_result
from tests.analytic import epoch_result, memory_store
from tests.conftest import make_study

FAILED = Failed(reason="ValueError: broken", traceback="Traceback")
DIVERGED, PRUNED = Diverged(epoch=2, step=3, lr=0.5), Pruned(epoch=1)

ENDS: dict[str, tuple[list[TrialOutcome], list[str], list[str]]] = {
    "pruned": ([PRUNED, PRUNED], ["all 2 pruned.", "no_pruning()"], ["MLflow", "failed", "divergence"]),
    "diverged": (
        [DIVERGED, DIVERGED, DIVERGED],
        ["all 3 diverged", "at step 3 of epoch 2, learning rate 0.5", "lower learning rates"],
        ["MLflow", "pruner"],
    ),
    "failed": ([FAILED] * 2, ["all 2 failed", "ValueError: broken", "tracebacks are in MLflow"], ["pruner"]),
    "mixed": (
        [FAILED, DIVERGED, PRUNED, PRUNED],
        ["1 failed, 1 diverged, 2 pruned (", "trial 0: ValueError", "trial 1: loss", "tracebacks", "pruner"],
        ["trial 3"],
    ),
}


@pytest.mark.parametrize(("outcomes", "words", "others"), ENDS.values(), ids=ENDS)
def test_a_study_without_a_complete_trial_says_what_happened_and_what_helps(
    outcomes: list[TrialOutcome], words: list[str], others: list[str]
) -> None:
    study = make_study("cache")
    store = memory_store(study)
    for outcome in outcomes:
        store.tell(store.ask(study), outcome, [epoch_result(1, 0.5)], seconds=1.0)
    with pytest.raises(StudyFailed) as failed:
        check_result(store)
    said = str(failed.value)
    assert len(said.splitlines()) == 1
    assert said.startswith("No trial is complete: ")
    for word in [*words, "--fresh", "larger --trials"]:
        assert word in said
    for word in others:
        assert word not in said


def test_a_study_with_a_complete_trial_has_a_result() -> None:
    study = make_study("cache")
    store = memory_store(study)
    store.tell(store.ask(study), Completed(value=0.5), [epoch_result(1, 0.5)], seconds=1.0)
    check_result(store)
