"""What a storage counts, for any sequence of trials: every trial once, and the best among the complete ones."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.events import Completed, Diverged, Failed, Pruned, TrialOutcome
from harness.search.samplers import Sampler
from tests.analytic import memory_store
from tests.conftest import make_study

STUDY = make_study("cache", sampler=Sampler("RandomSampler"))
OUTCOMES = st.one_of(
    st.floats(0.0, 1.0).map(lambda value: Completed(value=value)),
    st.integers(1, 9).map(lambda epoch: Pruned(epoch=epoch)),
    st.integers(1, 9).map(lambda epoch: Diverged(epoch=epoch)),
    st.just(Failed(reason="RuntimeError: no", traceback="")),
)


@given(st.lists(OUTCOMES, max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_trial_is_counted_once_and_the_best_is_the_first_of_the_highest(
    outcomes: list[TrialOutcome], unfinished: bool
) -> None:
    store = memory_store(STUDY)
    for outcome in outcomes:
        store.tell(store.ask(STUDY), outcome, [], seconds=1.0)
    if unfinished:
        store.ask(STUDY)
    states = Counter(outcome.state for outcome in outcomes)
    assert store.counts() == {
        "complete": states["complete"],
        "pruned": states["pruned"],
        "failed": states["failed"] + states["diverged"],
        "running": int(unfinished),
    }
    assert store.finished() == len(outcomes)
    assert [trial.number for trial in store.trials()] == list(range(len(outcomes) + unfinished))
    values = {n: outcome.value for n, outcome in enumerate(outcomes) if isinstance(outcome, Completed)}
    best = store.best()
    assert (best and best.number) == max(values, key=lambda n: (values[n], -n), default=None)


@given(st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_asking_again_counts_no_trial_twice(times: int) -> None:
    store = memory_store(STUDY)
    asked = store.ask(STUDY)
    for _ in range(times):
        assert store.ask(STUDY).number == asked.number
    assert store.counts()["running"] == 1
    assert store.finished() == 0
