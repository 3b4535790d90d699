"""A study from its first trial to its test result, whatever of it is there already."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from harness.base.keys import audit_key, base_key, final_key, rerank_key, trial_key
from harness.config.events import Event
from harness.config.study import Study
from harness.final.retrain import Context
from harness.final.test_set import after_search
from harness.search.loop import search
from harness.store.store import Store, wanted
from harness.training.checkpoint import SUFFIX, remove, stale


def run(context: Context, model_folder: Path, reason: str | None = None) -> Generator[Event, None, None]:
    """Whatever the study still lacks, yielding what happens. Closing the generator stops it.

    `reason` is why the test set may be opened for another trial than before.
    """
    study, store, checkpoints = context.study, context.store, context.checkpoints
    if not store.active_workers():
        for path in stale(checkpoints, wanted_keys(study, store)):
            remove(path)  # its process died between recording the result and this
    done = False
    while not done:
        if context.workers is None:
            yield from search(study, store, context.runtime, checkpoints)
        elif store.finished() < wanted(study, store):
            yield from context.workers.search()
        done = yield from after_search(context, model_folder, reason)
    for path in left_over(study, store, checkpoints):
        remove(path)  # of what another machine took up and ended


def left_over(study: Study, store: Store, folder: Path) -> list[Path]:
    """The whole checkpoints that nobody will read any more. One that is being written meanwhile is not among them."""
    files = list(folder.glob(f"*{SUFFIX}"))  # before it is asked what is under way
    wanted = wanted_keys(study, store)
    return [path for path in files if path.stem not in wanted]


def wanted_keys(study: Study, store: Store) -> set[str]:
    """The trainings whose checkpoints will be read: of interrupted trials, audits, and what comes after the search."""
    keys = {trial_key(trial.number) for trial in store.trials() if trial.state == "running"}
    audited = (store.facts().audit or {}).get("results", {})
    pruned = [trial.number for trial in store.trials() if trial.state == "pruned"]
    keys |= {audit_key(number) for number in pruned if str(number) not in audited}
    if store.has_final():
        return keys
    seeds = range(study.final.seeds)
    keys |= {rerank_key(trial.number, number) for trial in store.candidates(study.final.rerank) for number in seeds}
    if (chosen := store.chosen()) is not None:
        keys |= {key for number in seeds for key in (final_key(chosen.number, number), base_key(0, number))}
    return keys
