"""What a user does to a running study: `try` and `skip`. Both are recorded with the trial, so replay knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.base.errors import InputError
from harness.base.keys import trial_key
from harness.config import space as spaces
from harness.config.find import Found
from harness.config.study import Study
from harness.store import opening


def settings(study: Study, given: Sequence[str]) -> dict[str, Any]:
    """Parse each "PATH=VALUE" of a searched field."""
    changes = {}
    for each in given:
        path, equals, text = each.partition("=")
        if not equals:
            raise InputError(f"{spaces.shortened(each)} has no value; write PATH=VALUE.")
        if path not in study.space:
            raise InputError(f"{path} is not searched; choose from {', '.join(study.space)}.")
        dimension = study.space[path]
        if isinstance(dimension, spaces.Choice) and text in dimension.labels:  # as tables of trials write it
            changes[path] = dimension.option(text)
        else:
            changes[path] = spaces.parse(study.train, path, text)
    return changes


def queue(found: Found, storage: str | None, given: Sequence[str]) -> str:
    """Queue the base with searched fields changed, each "PATH=VALUE", for the next worker; return a sentence about it.

    Raises InputError if the study has not started or still tries its first configurations, or if the configuration is
    outside of the space or known.
    """
    study, url = _begun(found, storage)
    if study.sampler.name == "grid":
        raise InputError("A grid tries every point in its own order; wait for it, or use another sampler.")
    params = study.params(settings(study, given))
    with opening.open_store(study, url, joining=True) as store:
        if len(store.optuna_study.trials) <= len(study.first):
            first = f"its base and the {len(study.first)} configurations of first" if study.first else "its base"
            raise InputError(f"The study tries {first} before others; try again when it has begun them.")
        number = store.queue(params)
        facts = store.facts()
        when = f"runs when the study is asked for more trials: --trials {number + 1}"
        if facts.stopped is not None and number >= facts.stopped["trials"]:
            when = f"runs when the limit that stopped the search ({facts.stopped['reason']}) is larger, or removed"
        elif number < facts.limited(facts.wanted):
            when = "is next"
        return f"Trial {number} is queued with this configuration; it {when}."


def skip(found: Found, storage: str | None, number: int) -> str:
    """Ask the worker of an unfinished trial to end it at its next batch; return a sentence about it."""
    study, url = _begun(found, storage)
    if number == 0:
        raise InputError("Trial 0 is the base configuration, which the others are compared with; it is not skipped.")
    with opening.open_store(study, url, joining=True) as store:
        store.skip(number)
        running = trial_key(number) in store.active_workers()
    return f"Trial {number} ends at its next batch" + ("." if running else ", when the study is resumed.")


def _begun(found: Found, storage: str | None) -> tuple[Study, str]:
    """Return a started study with its stored settings, and its database's URL."""
    url = opening.url_of(found, storage)
    with opening.read_store(found.study.name, url) as store:
        return opening.located(found, store), url
