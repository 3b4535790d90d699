"""Run a study from its first trial to its test result, or resume it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from harness.base.keys import ablation_key, audit_key, base_key, final_key, rerank_key, trial_key
from harness.config.events import Event
from harness.config.study import Study
from harness.final.model_files import has_model
from harness.final.retrain import Context
from harness.final.test_set import after_search
from harness.search.loop import search
from harness.store.store import Store, wanted
from harness.training.checkpoint import SUFFIX, remove, stale, study_of


def run(context: Context, model_folder: Path, reason: str | None = None) -> Generator[Event, None, None]:
    """Run the study's missing parts, and yield events. Closing the generator stops it.

    `reason` allows opening the test set for another trial than before.
    """
    study, store, checkpoints = context.study, context.store, context.checkpoints
    if not store.active_workers():
        for path in stale(checkpoints, wanted_keys(study, store, model_folder), store.uid):
            remove(path)  # its process died after recording the result
    done = False
    while not done:
        if context.workers is None:
            yield from search(study, store, context.runtime, checkpoints)
        elif store.finished() < wanted(study, store):
            yield from context.workers.search()
        done = yield from after_search(context, model_folder, reason)
    for path in left_over(context, model_folder):
        remove(path)  # of trainings that another machine took over and ended


def left_over(context: Context, model_folder: Path) -> list[Path]:
    """Return the unused checkpoints, without those that are being written."""
    files = list(context.checkpoints.glob(f"*{SUFFIX}"))  # list the files before asking which trials are running
    wanted = wanted_keys(context.study, context.store, model_folder)
    return [path for path in files if path.stem not in wanted and study_of(path) in (None, context.store.uid)]


def wanted_keys(study: Study, store: Store, model_folder: Path) -> set[str]:
    """Return the keys of trainings whose checkpoints are needed: interrupted trials, audits, and the final run."""
    keys = {trial_key(trial.number) for trial in store.trials() if trial.state == "running"}
    audited = (store.facts().audit or {}).get("results", {})
    pruned = [trial.number for trial in store.trials() if trial.is_pruned]
    keys |= {audit_key(number) for number in pruned if str(number) not in audited}
    if (ablation := store.facts().ablation) is not None:
        keys |= {ablation_key(step, number) for step, number in unablated(ablation)}
    if (final := store.facts().final) is not None and store.has_final():
        # A lost model is trained again.
        return keys if has_model(model_folder) else keys | {final_key(final.trial, 0)}
    seeds = range(study.final.seeds)
    keys |= {rerank_key(trial.number, number) for trial in store.candidates(study.final.rerank) for number in seeds}
    if (chosen := store.chosen()) is not None:
        keys |= {key for number in seeds for key in (final_key(chosen.number, number), base_key(0, number))}
    return keys


def unablated(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return step and seed of each training that the record of an ablation lacks."""
    steps = range(len(record["fields"]) + 1)
    return [(step, n) for step in steps for n in record["seeds"][len(record["results"].get(str(step), [])) :]]
