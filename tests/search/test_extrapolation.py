"""What stopped trainings would have come to, and the Gaussian process that is shown it."""

from __future__ import annotations

import math
import random
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from harness.base.errors import InputError
from harness.config.events import Completed, Pruned
from harness.search.extrapolation import ExtrapolatingGPSampler, clipped, final_values
from harness.search.extrapolation import extrapolated as extrapolated_curves
from harness.search.pruners import asha, no_pruning
from harness.search.rehearsal import rehearse
from harness.search.samplers import Sampler, earlier_trials, gp
from tests.analytic import epoch_result, memory_store, run_analytic
from tests.conftest import make_study

EPOCHS = 8


def trial(*values: float, epochs: int = EPOCHS) -> FrozenTrial:
    """One with these values after its epochs, complete if they are all."""
    complete = len(values) == epochs
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if complete else TrialState.PRUNED,
        value=values[-1] if complete else None,
        intermediate_values=dict(enumerate(values, 1)),
    )


def extrapolated(trials: list[FrozenTrial]) -> list[float]:
    ends = [each.value for each in trials]
    return extrapolated_curves([each.intermediate_values for each in trials], ends, [math.inf] * len(trials))


WHOLE = [trial(*(0.1 * epoch for epoch in range(1, 9))), trial(*(0.05 * epoch for epoch in range(1, 9)))]


def test_a_complete_trial_has_its_value() -> None:
    assert extrapolated(WHOLE) == [pytest.approx(0.8), pytest.approx(0.4)]


def test_a_stopped_trial_gains_what_those_that_went_on_have_gained() -> None:
    stopped = [trial(0.1, 0.2), trial(0.1, 0.2, 0.3, 0.4)]
    # From epoch 2 to 4 three went on and gained 0.2, 0.1 and 0.2; from 4 to 8 two, who gained 0.4 and 0.2.
    first, second = 0.2 * 3 / 5, 0.3 * 2 / 4
    found = extrapolated([*WHOLE, *stopped])
    assert found[2:] == [pytest.approx(0.2 + first + second), pytest.approx(0.4 + second)]


def test_a_stopped_trial_gains_nothing_after_the_epochs_that_it_was_to_have() -> None:
    stopped = [trial(0.1, 0.2), trial(0.1, 0.2), trial(0.1, 0.2)]
    trials, planned = [*WHOLE, trial(0.1, 0.2, 0.3, 0.4), *stopped], [8, 8, 8, 4, 6, 8]
    curves, ends = [each.intermediate_values for each in trials], [each.value for each in trials]
    found = extrapolated_curves(curves, ends, planned)[3:]
    first, second = 0.2 * 3 / 5, 0.3 * 2 / 4
    assert found == pytest.approx([0.2 + first, 0.2 + first + second / 2, 0.2 + first + second])


def test_threads_change_no_suggestion() -> None:
    """Workers have fewer threads than the process that asks again."""
    space = {f"x{number}": FloatDistribution(0, 1) for number in range(6)}
    asked, before = [], torch.get_num_threads()
    for threads in (1, 4):
        rng = random.Random(0)
        study = optuna.create_study(direction="maximize", sampler=ExtrapolatingGPSampler(seed=0))
        for _ in range(200):
            params = {name: rng.random() for name in space}
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=space, value=-sum((x - 0.4) ** 2 for x in params.values())
                )
            )
        torch.set_num_threads(threads)
        try:
            asked.append(study.ask(space).params)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert asked[0] == asked[1]


def test_where_nobody_went_on_nothing_is_gained() -> None:
    assert extrapolated([trial(0.3, 0.4), trial(0.2)]) == [pytest.approx(0.4), pytest.approx(0.2 + 0.1 / 3)]


def test_what_reported_no_number_is_the_worst() -> None:
    nothing, no_number = trial(), trial(math.nan)
    found = extrapolated([*WHOLE, nothing, no_number])
    assert [math.isnan(value) for value in found] == [False, False, True, True]
    assert clipped(found) == [pytest.approx(0.8), pytest.approx(0.4), pytest.approx(0.4), pytest.approx(0.4)]
    assert clipped([math.nan, math.nan]) == [0.0, 0.0]


def test_values_far_below_the_good_ones_do_not_decide_the_scale() -> None:
    assert clipped([0.9, 0.88, 0.87, 0.1]) == [0.9, 0.88, 0.87, pytest.approx(0.9 - 4 * 0.01)]
    assert clipped([0.9, 0.899, 0.898, 0.6, 0.5, 0.1]) == [0.9, 0.899, 0.898, *[pytest.approx(0.749)] * 3]
    assert clipped([0.5, 0.5, 0.1]) == [0.5, 0.5, 0.1]  # the better half is level, and says nothing of a scale


curves = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=EPOCHS), min_size=1, max_size=8)


@given(curves, st.floats(-1, 1))
def test_a_constant_more_in_every_value_is_one_more_in_every_end(values: list[list[float]], more: float) -> None:
    plain = extrapolated([trial(*each) for each in values])
    shifted = extrapolated([trial(*(value + more for value in each)) for each in values])
    assert shifted == pytest.approx([value + more for value in plain], abs=1e-9)


@given(curves, st.randoms())
def test_the_order_of_the_trials_does_not_matter(values: list[list[float]], chance: Any) -> None:
    trials = [trial(*each) for each in values]
    expected = dict(zip(map(id, trials), extrapolated(trials), strict=True))
    chance.shuffle(trials)
    assert extrapolated(trials) == [expected[id(each)] for each in trials]


# -- the sampler ---------------------------------------------------------------------------------------------------


def test_it_finds_a_better_configuration_than_chance_in_as_many_epochs() -> None:
    """On the analytic curves, whose best is 0.95; the sum over some seeds, so that no luck decides."""
    best = {}
    for name, sampler in (("gp", gp(n_startup_trials=5)), ("random", Sampler("RandomSampler"))):
        found = []
        for seed in range(3):
            study = make_study("cache", sampler=sampler, pruner=asha(min_epochs=1), trials=25, seed=seed)
            store = memory_store(study)
            run_analytic(study, store, study.trials)
            record = store.best()
            assert record is not None
            found.append(record.value or 0.0)
        best[name] = sum(found)
    assert best["gp"] > best["random"]


def test_pruned_trials_count_among_those_that_start_it() -> None:
    """Optuna's own waits for complete ones, of which pruning leaves few."""
    study = make_study("cache", sampler=gp(n_startup_trials=6), pruner=no_pruning())
    shown = [trial(0.1 * number) for number in range(1, 8)]
    for number, each in enumerate(shown):
        each.number = number
    built = study.sampler.build(study, seed=0)
    memory = optuna.create_study(direction="maximize", sampler=built)
    for each in shown:
        each.params = {"x": 0.1 * each.number}
        each.distributions = {"x": optuna.distributions.FloatDistribution(0, 1)}
        memory.add_trial(each)
    new = memory.ask()
    space = built.infer_relative_search_space(memory, memory.get_trials()[new.number])
    assert set(built.sample_relative(memory, memory.get_trials()[new.number], space)) == {"x"}


def test_a_trial_that_the_pruner_stopped_is_extrapolated_as_it_was_recorded() -> None:
    """Optuna gives it its last value, which is none to expect after all epochs."""
    study = make_study("cache", pruner=no_pruning(), trials=3)
    store = memory_store(study)
    for values in ((0.1, 0.5), (0.2, 0.6), (0.15,)):
        asked = store.ask(study)
        for epoch, value in enumerate(values, 1):
            store.report(asked, epoch, value)
        ended = Completed(value=values[-1]) if len(values) == 2 else Pruned(epoch=1)
        store.tell(asked, ended, [epoch_result(epoch, value) for epoch, value in enumerate(values, 1)], 1.0)
    trials = store.optuna_study.get_trials(deepcopy=False)
    assert [each.state.name for each in trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert final_values(trials) == pytest.approx([0.5, 0.6, 0.15 + 0.4 * 2 / 4])
    kept = earlier_trials(study, trials, study.definition())
    assert kept[2]["value"] == pytest.approx(0.35)


# -- any sampler ---------------------------------------------------------------------------------------------------


class Steady(optuna.samplers.RandomSampler):
    """Somebody's own; it depends on its seed alone."""


class Forgetful(optuna.samplers.BaseSampler):
    """Answers by how often it was asked in this process."""

    asked = 0

    def __init__(self, seed: int) -> None:
        pass

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        Forgetful.asked += 1
        if isinstance(param_distribution, optuna.distributions.CategoricalDistribution):
            return param_distribution.choices[0]
        share = (Forgetful.asked % 97) / 97
        return param_distribution.low + share * (param_distribution.high - param_distribution.low)


def test_a_sampler_of_ones_own_is_given_by_module_and_class() -> None:
    study = make_study("cache", sampler=Sampler("tests.search.test_extrapolation:Steady"))
    rehearse(study)
    assert type(study.sampler.build(study, seed=1)).__name__ == "Steady"


def test_one_that_answers_differently_the_second_time_is_refused() -> None:
    study = make_study("cache", sampler=Sampler("tests.search.test_extrapolation:Forgetful"))
    with pytest.raises(InputError, match="is not deterministic"):
        rehearse(study)


class Outside(Steady):
    """Leaves the space."""

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        found = super().sample_independent(study, trial, param_name, param_distribution)
        return 0.9 if param_name == "backbone.dropout" else found


class Late(Steady):
    """Fails when the rehearsal is over."""

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        if trial.number == 14:
            raise KeyError("no [/plan] for 14")
        return {}


class Seedless(Steady):
    def __init__(self) -> None:
        super().__init__()


def test_one_that_leaves_the_space_is_refused_before_anything_is_trained() -> None:
    study = make_study("cache", sampler=Sampler("tests.search.test_extrapolation:Outside"))
    with pytest.raises(InputError, match=r"Outside suggests 0\.9 for backbone\.dropout, which is outside of"):
        rehearse(study)


def test_one_that_fails_in_mid_study_is_named_and_the_study_stays_whole() -> None:
    study = make_study("cache", sampler=Sampler("tests.search.test_extrapolation:Late"), trials=20)
    rehearse(study)
    store = memory_store(study)
    with pytest.raises(InputError, match=r"Late failed when asked for trial 14 .*run the same command again"):
        run_analytic(study, store, 20)
    assert store.finished() == 14


def test_one_that_takes_no_seed_is_told_so() -> None:
    with pytest.raises(InputError, match="add an argument seed to its class"):
        make_study("cache", sampler=Sampler("tests.search.test_extrapolation:Seedless"))


@pytest.mark.parametrize(
    "name", ["tests.nothing:Steady", "tests.search.test_extrapolation:Nothing", ":Steady", "tests:"]
)
def test_one_that_is_not_there_is_wrong_input(name: str) -> None:
    with pytest.raises(InputError, match="There is no sampler"):
        make_study("cache", sampler=Sampler(name))


@pytest.mark.parametrize("name", ["tests.search.test_extrapolation:trial", "builtins:dict"])
def test_what_is_no_sampler_is_wrong_input(name: str) -> None:
    with pytest.raises(InputError, match="is not a sampler"):
        make_study("cache", sampler=Sampler(name))


# -- rungs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "warmup", "expected"),
    [(50, 1.0, [4, 8, 16, 32]), (30, 1.0, [2, 4, 8, 16]), (12, 2.0, [3, 6]), (15, 0.0, [2, 4, 8]), (3, 1.0, [2])],
)
def test_a_share_of_the_epochs_gives_the_first_rung(epochs: int, warmup: float, expected: list[int]) -> None:
    pruner: Any = asha(first=0.08).build(epochs, warmup)
    assert [epoch for epoch in range(1, epochs) if pruner.rung(epoch)] == expected


@pytest.mark.parametrize("first", [0, 1, 0.0, 1.0, -0.1, "x", True, math.nan])
def test_a_share_that_is_none_is_wrong_input(first: Any) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        asha(first=first)


def test_a_share_and_an_epoch_are_one_too_many() -> None:
    with pytest.raises(InputError, match="not both"):
        asha(first=0.1, min_epochs=3)
