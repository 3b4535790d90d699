"""Which trial is handed out: not the lucky one, and the base where nothing is shown to be better."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from harness.config.space import Choice, Float, Int
from harness.config.study import Study
from harness.config.train import FinalConfig
from harness.final.choice import choose, record_choice
from harness.final.sentences import choice_sentence, prospect_sentence, verdict
from harness.search.pruners import no_pruning
from harness.search.samplers import Sampler
from harness.store.records import TrialRecord
from tests.analytic import epoch_result, memory_store, run_analytic
from tests.conftest import make_study

SPACE = {"lr": Float(1e-4, 1e-1, log=True)}


def trial(number: int, lr: float, value: float, state: str = "complete", **params: Any) -> TrialRecord:
    """One with this validation accuracy of 1,000 images after its only epoch."""
    return TrialRecord(
        number=number,
        state=state,
        value=value if state == "complete" else None,
        params={"lr": lr} | params,
        epochs=(epoch_result(1, value),),
        curve={1: value},
        reason=None,
        seconds=1.0,
    )


def hill(lr: float) -> float:
    return 0.9 - 0.1 * (math.log10(lr) + 2) ** 2


def rates(count: int) -> list[float]:
    return [10 ** (-4 + 3 * each / (count - 1)) for each in range(count)]


def test_the_lucky_one_beside_the_good_ones_is_not_chosen() -> None:
    trials = [trial(number, lr, hill(lr)) for number, lr in enumerate(rates(24))]
    lucky = trial(24, 2.5e-3, 0.905)  # its neighbours have 0.86; 0.01 is the noise of 1,000 images
    found = choose([*trials, lucky], SPACE)
    assert found is not None
    assert found["highest"] == 24
    assert abs(math.log10(trials[found["trial"]].params["lr"]) + 2) < 0.3
    mean, deviation = found["estimates"]["24"]
    assert mean < 0.88
    assert 0 < deviation < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_the_images_makes_no_winner_where_all_are_equal(seed: int) -> None:
    rng = random.Random(seed)
    trials = [trial(n, lr, sum(rng.random() < 0.8 for _ in range(1000)) / 1000) for n, lr in enumerate(rates(30))]
    found = choose(trials, SPACE)
    assert found is not None
    raw = max(each.value or 0 for each in trials)
    assert raw - 0.8 > 2 * abs(max(mean for mean, _ in found["estimates"].values()) - 0.8)


def test_stopped_trials_that_promise_more_crowd_no_candidate_out() -> None:
    complete = [trial(number, lr, hill(lr) - 0.1) for number, lr in enumerate(rates(12))]
    stopped = [trial(12 + number, 1e-2, 0.9, "pruned") for number in range(400)]
    found = choose([*complete, *stopped], SPACE)
    assert found is not None
    assert {str(each.number) for each in complete} <= set(found["estimates"])


def test_a_difference_of_less_than_an_image_goes_to_the_base() -> None:
    twins = [trial(0, 1e-2, 0.9), trial(1, 1e-2, 0.9), *(trial(2 + n, lr, hill(lr)) for n, lr in enumerate(rates(8)))]
    swapped = [twins[1], dataclasses.replace(twins[0], number=1), *twins[2:]]
    for trials in (twins, [dataclasses.replace(each, number=number) for number, each in enumerate(swapped)]):
        found = choose(trials, SPACE)
        assert found is not None
        assert found["trial"] == 0


def test_with_few_trials_or_one_configuration_the_highest_value_is_chosen() -> None:
    few = [trial(0, 1e-3, 0.7), trial(1, 1e-2, 0.8), trial(2, 3e-2, 0.6)]
    alike = [trial(number, 1e-3, 0.7 + 0.01 * number) for number in range(6)]
    equal = [trial(number, lr, 0.7) for number, lr in enumerate(rates(20))]
    for trials, number in ((few, 1), (alike, 5), (equal, 0)):
        found = choose(trials, SPACE)
        assert found is not None
        assert (found["trial"], found["estimates"]) == (number, None)


def test_only_complete_trials_are_candidates_and_stopped_ones_are_weighed() -> None:
    trials = [trial(number, lr, hill(lr), "pruned" if number % 2 else "complete") for number, lr in enumerate(rates(9))]
    assert choose([each for each in trials if each.state == "pruned"], SPACE) is None
    found = choose(trials, SPACE)
    assert found is not None
    assert found["trial"] % 2 == 0
    assert found["trials"] == 9
    running = trial(9, 1e-2, 0.99, "running")
    assert choose([*trials, running], SPACE) == found


@pytest.mark.parametrize("epochs", [5, 0])
def test_the_edge_of_divergence_is_not_chosen_for_what_diverged_beyond_it(epochs: int) -> None:
    def course(number: int, lr: float, end: float, epochs: int, state: str) -> TrialRecord:
        curve = {epoch: round(1000 * end * (1 - math.exp(-epoch / 3))) / 1000 for epoch in range(1, epochs + 1)}
        results = tuple(epoch_result(epoch, value) for epoch, value in curve.items())
        found = trial(number, lr, curve.get(epochs, 0.0), state)
        return dataclasses.replace(found, curve=curve, epochs=results)

    trials = []
    for number in range(16):
        lr = 10 ** (-4 + 2.1 * number / 15)
        trials.append(course(number, lr, 0.86 - 0.03 * (math.log10(lr) + 2.6) ** 2, 10, "complete"))
    beyond = [course(16 + each, 10 ** (-1.85 + 0.85 * each / 7), 0.88, epochs, "diverged") for each in range(8)]
    found = choose([*trials, *beyond], SPACE)
    assert found is not None
    assert len(found["estimates"]) == 24
    assert found["more"] is not None
    assert abs(math.log10(trials[found["trial"]].params["lr"]) + 2.6) < 0.3


def test_whole_numbers_choices_and_missing_parameters_are_coordinates() -> None:
    space = SPACE | {"size": Int(1, 64, log=True), "kind": Choice(("a", "b"))}
    trials = [
        trial(number, lr, hill(lr) - 0.2 * (number % 2), size=1 + number, kind="ab"[number % 2])
        for number, lr in enumerate(rates(12))
    ]
    found = choose([*trials, trial(12, 1e-3, 0.5)], space)
    assert found is not None
    assert found["trial"] % 2 == 0


def test_good_trials_that_lie_close_together_do_not_hide_that_the_base_is_worse() -> None:
    """As a study of the demo found them."""
    space = {"lr": Float(1e-4, 3e-2, log=True), "multiplier": Float(0.0, 1.0)}
    found = [
        (5e-4, 0.8, 0.588, "complete"),
        (5.5e-4, 0.54, 0.429, "pruned"),
        (7.8e-3, 0.24, 0.535, "pruned"),
        (1.8e-3, 0.56, 0.721, "complete"),
        (2.4e-2, 0.37, 0.444, "pruned"),
        (7.1e-4, 0.69, 0.65, "pruned"),
        (1.65e-3, 0.08, 0.694, "complete"),
        (2.4e-3, 1.0, 0.65, "pruned"),
        (2.1e-3, 0.5, 0.721, "complete"),
        (2e-3, 0.44, 0.719, "complete"),
    ]
    trials = [trial(n, lr, value, state, multiplier=m) for n, (lr, m, value, state) in enumerate(found)]
    made = choose(trials, space)
    assert made is not None
    assert made["trial"] in (3, 8, 9)
    assert made["estimates"]["0"][0] < 0.66


def test_what_more_trials_would_bring_falls_as_the_search_goes_on() -> None:
    space = {"lr": Float(1e-4, 1e-1, log=True), "multiplier": Float(0.0, 1.0)}
    rng = random.Random(0)
    trials = []
    for number in range(60):
        lr, multiplier = 10 ** rng.uniform(-4, -1), rng.random()
        trials.append(trial(number, lr, hill(lr) - 0.3 * (multiplier - 0.5) ** 2, multiplier=multiplier))
    few, some, many = (choose(trials[:count], space) for count in (19, 20, 60))
    assert few is not None
    assert some is not None
    assert many is not None
    assert few["more"] is None
    assert 0 <= many["more"]["gain"] <= many["more"]["bound"] < some["more"]["bound"]
    assert many["more"]["gain"] < 0.01


def test_a_sentence_says_it() -> None:
    study = study_of(trials=30)
    store = memory_store(study)
    run_analytic(study, store, 19)
    record_choice(study, store)
    assert prospect_sentence(store) is None
    run_analytic(study, store, 20)
    assert prospect_sentence(store) is None  # until it is chosen again
    record_choice(study, store)
    assert (prospect_sentence(store) or "").startswith("Based on the trials so far, 10 more would gain about ")


def study_of(**changes: Any) -> Study:
    return make_study("nowhere", sampler=Sampler("RandomSampler"), pruner=no_pruning(), **changes)


def test_the_choice_is_made_once_and_again_when_trials_have_come() -> None:
    study = study_of()
    store = memory_store(study)
    run_analytic(study, store, 8)
    assert store.chosen() == store.best()
    record_choice(study, store)
    kept = store.attributes().get("choice")
    assert store.chosen() is not None
    assert store.chosen().number == kept["trial"]
    record_choice(study, store)
    assert store.attributes().get("choice") == kept
    run_analytic(study, store, 10)
    assert store.chosen() == store.best()  # until it is made again
    assert not store.is_settled()
    record_choice(study, store)
    assert store.attributes()["choice"]["trials"] == 10
    assert store.chosen() is not None


def test_a_second_look_stays_as_it_is() -> None:
    second = study_of(final=FinalConfig(rerank=2, publish=False))
    other = memory_store(second)
    run_analytic(second, other, 6)
    record_choice(second, other)
    assert other.attributes().get("choice") is None


def test_the_sentence_says_why_and_names_the_highest_value() -> None:
    study = study_of()
    store = memory_store(study)
    run_analytic(study, store, 8)
    assert choice_sentence(store) is None
    record_choice(study, store)
    kept = store.attributes().get("choice") | {
        "highest": 5,
        "estimates": {"0": [0.5, 0.01], "3": [0.5, 0.01], "5": [0.5, 0.01]},
    }
    for chosen, words in ((3, "a lower bound that is higher"), (0, "no lower bound that is an image higher")):
        store.set_attribute("choice", kept | {"trial": chosen})
        said = choice_sentence(store) or ""
        assert words in said
        assert "trial 5 has the highest measured value" in said
    store.set_attribute("choice", kept | {"trial": 5})
    assert "no complete trial has a lower bound that is higher" in (choice_sentence(store) or "")
    best = store.best()
    assert best is not None
    store.set_attribute("choice", kept | {"trial": 0})
    assert ("was chosen" in verdict(store)) is (best.number != 0)
