"""Which worker takes which trial: each trial has one, whatever ends, dies or wakes up meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from harness.config.study import Study
from harness.search.samplers import Sampler
from harness.store.leases import LEASE_SECONDS
from harness.store.opening import open_store
from harness.store.store import NoTrialFree, Store
from tests.analytic import evaluate
from tests.conftest import make_study
from tests.patience import PATIENCE_SECONDS

STUDY = make_study("cache", sampler=Sampler("RandomSampler"), trials=2)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """One study as two workers see it."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with ExitStack() as stack:
        stack.enter_context(open_store(STUDY, url))
        yield tuple(stack.enter_context(open_store(STUDY, url, joining=True)) for _ in range(2))  # type: ignore[misc]


def once_before(owner: Any, name: str, action: Callable[[], Any]) -> None:
    """Have something happen right before the first call of a method."""
    method = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, method)
        action()
        return method(*args, **kwargs)

    setattr(owner, name, called)


@pytest.mark.parametrize("look", ["holders", "get_trials"])
def test_a_trial_that_ends_while_another_worker_looks_for_one_is_counted_once(
    stores: tuple[Store, Store], look: str
) -> None:
    """It has ended or somebody is at it, whichever of the two is looked at first."""
    one, other = stores
    evaluate(STUDY, one, one.ask(STUDY, 2))
    last = one.ask(STUDY, 2)
    seeing: Any = other._leases if look == "holders" else other.optuna_study
    once_before(seeing, look, lambda: evaluate(STUDY, one, last))
    with pytest.raises(NoTrialFree):
        other.ask(STUDY, 2)
    assert other.finished() == 2
    assert len(other.trials()) == 2


def ask_and_wait(study: Study, url: str, line: Any) -> None:
    with open_store(study, url, joining=True) as store:
        line.send(store.ask(study).number)
        time.sleep(600)


@pytest.mark.slow
def test_the_trial_of_a_dead_process_of_this_machine_is_taken_up_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    context = multiprocessing.get_context("spawn")
    line, theirs = context.Pipe()
    with open_store(STUDY, url), open_store(STUDY, url, joining=True) as store:
        process = context.Process(target=ask_and_wait, args=(STUDY, url, theirs))
        process.start()
        try:
            assert line.poll(PATIENCE_SECONDS)
            number = line.recv()
        finally:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        began = time.monotonic()
        asked = store.ask(STUDY)
        assert (asked.number, asked.resumed) == (number, True)
        assert time.monotonic() - began < LEASE_SECONDS / 2


@pytest.mark.slow
def test_a_worker_that_stood_still_in_its_question_leaves_the_trial_to_who_took_it_up(
    stores: tuple[Store, Store],
) -> None:
    one, other = stores

    def taken_up() -> None:
        assert other._leases is not None
        other._leases.clear()  # as if the first one's time had run out
        evaluate(STUDY, other, other.ask(STUDY))

    once_before(one.optuna_study._storage, "set_trial_param", taken_up)
    with pytest.raises(NoTrialFree):
        one.ask(STUDY)
    assert [trial.state for trial in one.trials()] == ["complete"]
    assert one.ask(STUDY).number == 1
