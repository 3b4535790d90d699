"""Samplers and pruners by name, the grid, and our Asha against Optuna's own."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.base.errors import InputError
from harness.config import find as catalogue
from harness.config.space import Choice, Float
from harness.config.study import Study
from harness.search.pruners import Asha, Pruner, asha, no_pruning
from harness.search.rehearsal import rehearse
from harness.search.samplers import Grid, Sampler, grid, tpe
from harness.store.opening import open_store
from tests.analytic import ceiling, memory_store, memory_study, run_analytic
from tests.conftest import make_study

SETTINGS: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}


def verdicts(pruner: optuna.pruners.BasePruner, curves: list[list[float]], epochs: int) -> list[int]:
    """The epochs that each curve lived, one trial after the other; one shorter than `epochs` diverged after its end."""
    study = memory_study(pruner)
    lived = []
    for curve in curves:
        trial, last = study.ask(), len(curve)
        for epoch, value in enumerate(curve, start=1):
            trial.report(value, epoch)
            if epoch < epochs and trial.should_prune():
                last = epoch
                break
        if last < epochs or math.isnan(curve[-1]):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, curve[-1])
        lived.append(last)
    return lived


# Few values, so that ties are common; NaN is what a broken metric would report.
VALUES = st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.5, 0.9, float("nan")])
EPOCHS = 13
CURVES = st.lists(
    st.one_of(st.lists(VALUES, min_size=EPOCHS, max_size=EPOCHS), st.lists(VALUES, min_size=1, max_size=EPOCHS)),
    min_size=1,
    max_size=14,
)


# -- Asha ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, **SETTINGS)
@given(CURVES, st.integers(1, 4), st.integers(2, 4))
def test_asha_decides_as_optunas_successive_halving(curves: list[list[float]], first: int, reduction: int) -> None:
    theirs = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=reduction)
    assert verdicts(Asha(first, reduction), curves, EPOCHS) == verdicts(theirs, curves, EPOCHS)


@pytest.mark.parametrize("seed", range(3))
def test_asha_decides_as_optuna_over_many_noisy_trials(seed: int) -> None:
    draw = random.Random(seed)
    curves = []
    for _ in range(50):
        top = draw.random()
        curves.append([top * (1 - math.exp(-epoch / 3)) + draw.gauss(0, 0.05) for epoch in range(1, 17)])
    for first, reduction in ((1, 2), (2, 3), (5, 2)):
        theirs = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=reduction)
        ours = verdicts(Asha(first, reduction), curves, 16)
        assert ours == verdicts(theirs, curves, 16)
        assert len(set(ours)) > 1  # something was pruned and something was not


@settings(max_examples=20, **SETTINGS)
@given(CURVES)
def test_asha_writes_nothing_into_the_storage(curves: list[list[float]]) -> None:
    study = memory_study(Asha(1, 2))
    for curve in curves:
        trial = study.ask()
        for epoch, value in enumerate(curve, start=1):
            trial.report(value, epoch)
            before = study.get_trials()
            assert trial.should_prune() == trial.should_prune()
            assert repr(study.get_trials()) == repr(before)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert all(trial.system_attrs == {} for trial in study.trials)
    assert study._storage.get_study_system_attrs(study._study_id) == {}


@pytest.mark.parametrize(
    ("first", "reduction", "rungs"),
    [
        (1, 2, [1, 2, 4, 8, 16, 32]),
        (5, 2, [5, 10, 20, 40]),
        (3, 2, [3, 6, 12, 24]),
        (4, 2, [4, 8, 16, 32]),
        (2, 4, [2, 8, 32]),
        (1, 3, [1, 3, 9, 27]),
        (9, 3, [9, 27]),
    ],
)
def test_the_rungs_stand_at_the_first_epoch_times_powers_of_the_reduction(
    first: int, reduction: int, rungs: list[int]
) -> None:
    assert [epoch for epoch in range(1, 41) if Asha(first, reduction).rung(epoch)] == rungs


def test_the_first_trial_is_never_pruned() -> None:
    assert verdicts(Asha(1, 2), [[0.01] * 9], 9) == [9]


def test_a_trial_before_its_first_report_is_not_pruned() -> None:
    study = memory_study(Asha(1, 2))
    assert not study.ask().should_prune()


@pytest.mark.parametrize("options", [{"min_epochs": 0}, {"min_epochs": -1}, {"reduction": 1}, {"reduction": 0}])
def test_asha_refuses_impossible_arguments(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="min_epochs >= 1 and reduction >= 2"):
        asha(**options)


def test_an_unknown_argument_of_asha_in_a_study_is_wrong_input() -> None:
    with pytest.raises(InputError, match="epochs"):
        Pruner("Asha", epochs=3)


# -- by name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        tpe(),
        tpe(n_startup_trials=3, multivariate=True),
        Sampler("RandomSampler"),
        Sampler("NSGAIISampler", population_size=4),
    ],
    ids=lambda sampler: sampler.name,
)
def test_optunas_samplers_are_made_by_name(sampler: Sampler) -> None:
    study = make_study("cache", sampler=sampler)
    built = sampler.build(study, seed=7)
    assert type(built).__name__ == sampler.name
    assert built is not sampler.build(study, seed=7)


@pytest.mark.parametrize(("name", "package"), [("CmaEsSampler", "cmaes"), ("GPSampler", "torch")])
def test_a_sampler_that_needs_another_package_works_or_names_it(name: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        make_study("cache", sampler=Sampler(name))
        return
    with pytest.raises(InputError, match=package):
        make_study("cache", sampler=Sampler(name))


@pytest.mark.parametrize("name", ["TPE", "tpe", "", "BaseSampler", "__doc__", "os"])
def test_an_unknown_sampler_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"no sampler.*RandomSampler.*TPESampler"):
        make_study("cache", sampler=Sampler(name))


@pytest.mark.parametrize("name", ["Median", "asha", "BasePruner"])
def test_an_unknown_pruner_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"no pruner.*MedianPruner"):
        Pruner(name)


PATIENT = {
    "ours": Pruner("PatientPruner", wrapped_pruner=asha(min_epochs=1), patience=1),
    "none": Pruner("PatientPruner", wrapped_pruner=None, patience=1),
    "twice": Pruner(
        "PatientPruner", patience=0, wrapped_pruner=Pruner("PatientPruner", patience=1, wrapped_pruner=no_pruning())
    ),
}


@pytest.mark.parametrize("pruner", PATIENT.values(), ids=PATIENT)
def test_a_pruner_may_hold_another_one(pruner: Pruner) -> None:
    study = make_study("cache", pruner=pruner)
    rehearse(study)
    inner = dict(pruner.options)["wrapped_pruner"]
    built = pruner.of(study)._wrapped_pruner  # type: ignore[attr-defined]
    assert type(built) is (type(None) if inner is None else type(inner.of(study)))
    assert " at 0x" not in study.definition()["pruner"]


def test_a_study_whose_pruner_holds_another_one_is_resumed(workspace: Path) -> None:
    nested = 'Pruner("PatientPruner", wrapped_pruner=Pruner("MedianPruner", n_startup_trials=1), patience=1)'
    text = (workspace / "studies" / "demo.py").read_text(encoding="utf-8")
    text = text.replace("    asha,\n", "    Pruner,\n").replace("asha(min_epochs=2, reduction=2)", nested)
    (workspace / "studies" / "nested.py").write_text(text.replace('"demo"', '"nested"'), encoding="utf-8")

    def curve(params: Mapping[str, Any], epoch: int) -> float:
        return 0.9 if params["backbone.hidden"] == "128" else 0.5 / epoch  # falls, and others are better

    for trials in (3, 6):
        study = catalogue.find("nested").study
        with open_store(study, f"sqlite:///{workspace}/studies/nested.db") as store:
            run_analytic(study, store, trials, curve=curve)
            states = [trial.state for trial in store.trials()]
    assert len(states) == 6
    assert {"complete", "pruned"} <= set(states)


class Named:
    """An object with a text of its own, which says nothing of what it does."""

    def __repr__(self) -> str:
        return "Named()"


@pytest.mark.parametrize(
    "value",
    [
        lambda count: 1,
        Named(),
        Named,
        optuna.pruners.MedianPruner(),
        optuna.samplers.nsgaii.UniformCrossover(),
        tpe(),
        grid(),
        {3, 4},
        numpy.float64(0.5),
        Path("a"),
        len,
        [no_pruning()],
        {"a": (1, [Named()])},
        b"bytes",
        1j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_options_that_a_resumed_study_could_not_compare_are_refused(value: Any) -> None:
    for make in (Sampler, Pruner):
        name = {Sampler: "TPESampler", Pruner: "PatientPruner"}[make]
        with pytest.raises(InputError) as caught:
            make(name, gamma=value)
        assert "cannot take gamma=" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_pruner_is_no_option_of_a_sampler() -> None:
    with pytest.raises(InputError, match="cannot take independent_sampler"):
        Sampler("GPSampler", independent_sampler=asha())


def test_plain_options_are_taken_as_they_are() -> None:
    plain = {"a": [1, 2.5, None, "x", True, (3,)], 4: {"b": ()}}
    assert dict(Sampler("GridSampler", search_space=plain).options) == {"search_space": plain}


@pytest.mark.parametrize("given", [optuna.pruners.MedianPruner(), Pruner, None, 3])
def test_a_sampler_or_pruner_is_given_by_its_name(given: Any) -> None:
    for make in (Sampler, Pruner):
        with pytest.raises(InputError, match="is given by its name"):
            make(given)


def test_the_list_of_pruners_names_our_own_too() -> None:
    with pytest.raises(InputError, match="Asha"):
        Pruner("Nothing")


def test_the_list_of_samplers_names_only_what_can_be_made() -> None:
    with pytest.raises(InputError) as caught:
        make_study("cache", sampler=Sampler("Nothing"))
    assert "Base" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_study("cache", sampler=tpe(startup=3)),
        lambda: make_study("cache", sampler=Sampler("RandomSampler", n_startup_trials=3)),
        lambda: Pruner("MedianPruner", warmup=3),
        lambda: Pruner("MedianPruner", n_startup_trials=-1),
        lambda: Pruner("PatientPruner"),
    ],
)
def test_wrong_arguments_are_wrong_input(make: Any) -> None:
    with pytest.raises(InputError, match="cannot be built with"):
        make()


def test_a_seed_in_the_samplers_arguments_is_refused() -> None:
    """The harness seeds every question itself; a seed of the user's would be overwritten without a word."""
    with pytest.raises(InputError, match="seed"):
        make_study("cache", sampler=tpe(seed=3))


@pytest.mark.parametrize(
    "pruner", [no_pruning(), asha(), Pruner("MedianPruner", n_warmup_steps=2), Pruner("ThresholdPruner", lower=0.1)]
)
def test_pruners_are_built_anew_and_shown_with_their_arguments(pruner: Pruner) -> None:
    assert pruner.build(8, 1.0) is not pruner.build(8, 1.0)
    for name, value in pruner.options:
        assert f"{name!r}, {value!r}" in repr(pruner)


def test_the_order_of_arguments_does_not_matter() -> None:
    assert tpe(gamma=None, n_startup_trials=2) == tpe(n_startup_trials=2, gamma=None)
    assert repr(tpe(multivariate=True, n_startup_trials=2)) == repr(tpe(n_startup_trials=2, multivariate=True))


# -- the grid ------------------------------------------------------------------------------------------------------

POINTS = {"optim.base_lr": Choice((1e-2, 1e-3, 1e-4)), "backbone.hidden": Choice(((16, 8), (16,)))}


def grid_study(**changes: Any) -> Study:
    return make_study("cache", **{"sampler": grid(), "space": POINTS, "trials": 6, **changes})


def test_the_grid_takes_the_base_first_and_then_every_other_point_once_in_order() -> None:
    study = grid_study()
    store = memory_store(study)
    asked = []
    for _ in range(6):
        each = store.ask(study)
        asked.append((each.params["optim.base_lr"], each.params["backbone.hidden"]))
        store.optuna_study.tell(each.number, 0.5)
    assert asked[0] == (1e-3, "16")
    assert asked[1:] == [(1e-2, "16-8"), (1e-2, "16"), (1e-3, "16-8"), (1e-4, "16-8"), (1e-4, "16")]


def test_the_nth_trial_takes_the_nth_point_whatever_the_seed() -> None:
    for seed in (0, 1):
        study = grid_study(seed=seed)
        store = memory_store(study)
        for point in Grid().points(study)[:4]:
            asked = store.ask(study)
            assert asked.params == point
            store.optuna_study.tell(asked.number, 0.5)


def test_more_trials_than_points_are_refused() -> None:
    assert grid_study(trials=6).trials == 6
    with pytest.raises(InputError, match=r"has 6 points.*not 7"):
        grid_study(trials=7)
    with pytest.raises(InputError, match="6 points"):
        dataclasses.replace(grid_study(), trials=7)


def test_a_grid_over_a_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs a Choice for optim\.depth_lr_mult"):
        grid_study(space={**POINTS, "optim.depth_lr_mult": Float(0.0, 1.0)})


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler("BruteForceSampler"),
        Sampler("GridSampler", search_space={"optim.base_lr": [1e-2, 1e-3, 1e-4], "backbone.hidden": ["16-8", "16"]}),
    ],
    ids=lambda sampler: sampler.name,
)
def test_optunas_exhaustive_samplers_run_beyond_the_last_point(sampler: Sampler) -> None:
    """They stop the study by themselves, which Optuna allows inside `optimize` only."""
    study = grid_study(sampler=sampler)
    store = memory_store(study)
    for _ in range(8):  # the enqueued base may not count as a point of theirs
        store.optuna_study.tell(store.ask(study).number, 0.5)
    assert store.finished() == 8


# -- does it search? -----------------------------------------------------------------------------------------------


def found(sampler: Sampler, seed: int, trials: int = 30) -> float:
    """The ceiling of the configuration that a search over the analytic curves ends with."""
    study = make_study("cache", sampler=sampler, seed=seed, trials=trials)
    store = memory_store(study)
    run_analytic(study, store, trials, epochs=1, curve=lambda params, epoch: ceiling(params))
    best = store.best()
    assert best is not None
    return ceiling(best.params)


def test_the_base_configuration_is_trial_0() -> None:
    study = make_study("cache")
    asked = memory_store(study).ask(study)
    assert asked.number == 0
    assert study.config(asked.params) == study.train


def test_equal_seeds_ask_equal_questions_and_other_seeds_others() -> None:
    def asked(seed: int) -> list[dict[str, Any]]:
        study = make_study("cache", seed=seed)
        store = memory_store(study)
        run_analytic(study, store, 5)
        return [trial.params for trial in store.trials()]

    assert asked(1) == asked(1)
    assert asked(1)[0] == asked(2)[0]  # the base
    assert asked(1)[1:] != asked(2)[1:]


def test_all_parameters_of_a_trial_vary() -> None:
    study = make_study("cache", sampler=Sampler("RandomSampler"))
    store = memory_store(study)
    run_analytic(study, store, 12, epochs=1)
    for path in study.space:
        assert len({trial.params[path] for trial in store.trials()}) > 1


def test_parameters_of_a_trial_are_drawn_independently_of_each_other() -> None:
    """Each parameter has its own stream; were it the same one, two equal ranges would get equal values."""
    space = {"backbone.dropout": Float(0.0, 0.9), "backbone.stochastic_depth": Float(0.0, 0.9)}
    study = make_study("cache", space=space, sampler=Sampler("RandomSampler"))
    store = memory_store(study)
    for _ in range(10):
        store.optuna_study.tell(store.ask(study).number, 0.5)
    drawn = [trial.params for trial in store.trials()[1:]]
    assert all(each["backbone.dropout"] != each["backbone.stochastic_depth"] for each in drawn)


@pytest.mark.slow
def test_tpe_finds_better_configurations_than_chance() -> None:
    seeds = range(5)
    guided = [found(tpe(n_startup_trials=8), seed) for seed in seeds]
    blind = [found(Sampler("RandomSampler"), seed) for seed in seeds]
    assert statistics.median(guided) > statistics.median(blind)
    assert statistics.median(guided) > 0.91
