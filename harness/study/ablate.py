"""The `ablate` command: from the base configuration to the chosen one, one field at a time.

Ablation analysis (Fawcett and Hoos, "Analysing differences between algorithm configurations through ablation", 2016).
The order of the fields is a surrogate's (Biedenkapp et al., "Efficient parameter importance analysis via ablation with
surrogates", 2017), every configuration on the way is trained: from the seeds of the final run, without validation
images, on which it is judged.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator
from contextlib import closing
from typing import Any

from harness.base import mounts
from harness.base.errors import StudyFailed
from harness.base.files import sqlite_file
from harness.config.events import EpochEnded, Metrics
from harness.config.find import Found
from harness.config.options import RunOptions
from harness.config.study import Study
from harness.data.splits import content_of
from harness.final.choice import ablation_path
from harness.final.retrain import Context, Retraining
from harness.final.sentences import ablation_sentences
from harness.store import opening
from harness.store.store import Store, TrialRecord
from harness.study.audit import check_ended, write_report_again
from harness.study.stages import unablated
from harness.study.start import keep_imports
from harness.tracking.places import tracker_at
from harness.training.assemble import decide_runtime

ABLATION = "ablation"  # the lease


def ablate_study(options: RunOptions, found: Found) -> None:
    """Ablate a study, or resume that. Raises InputError for user errors."""
    url = opening.url_of(found, options.storage)
    if options.tracking_uri:
        tracker_at(options.tracking_uri)  # refuse a wrong URI before training
    with opening.read_store(found.study.name, url) as store:
        study = opening.located(found, store, options.data_root, options.device)
        check_ended(study, store)
        record = begun(study, store)
        if not record["fields"]:
            print(f"Study {study.name!r} chose the base configuration; there is nothing to ablate.")
            return
        runtime = decide_runtime(study.train, store.facts().runtime)
        content = content_of(study) if unablated(record) else None
        opening.as_begun(study, store, content)
    if (risk := mounts.warning(sqlite_file(url))) is not None:
        print(f"Warning: {risk}", file=sys.stderr)
    keep_imports()
    with opening.open_store(study, url, content) as store:
        context = Context(study=study, store=store, runtime=runtime, checkpoints=found.beside(url, ".checkpoints"))
        if ABLATION in store.active_workers():
            print("Another process ablates this study; waiting for its end.", file=sys.stderr)
        with store.exclusive(ABLATION), closing(train(context, begun(study, store))) as lines:
            for line in lines:
                store.check_file()
                print(line, flush=True)
        store.check_file()
        print("\n".join(ablation_sentences(store.facts().ablation or {})))
        write_report_again(study, store, found, options.tracking_uri)


def begun(study: Study, store: Store) -> dict[str, Any]:
    """Return the record of the chosen trial's ablation, of a new one if there is none.

    `fields` are those that differ from the base, in the order in which they change; `values` are [from, to] of each;
    `results` are the trainings of each step, where step n has the first n fields of the chosen trial.
    """
    chosen, known = _chosen(store), store.facts().ablation
    if known is not None and known["trial"] == chosen.number and len(known["seeds"]) == study.final.seeds:
        return known
    base = _base(store)
    fields = ablation_path(store.trials(), study.space, base.params, chosen.params)
    values = {path: [base.params[path], chosen.params[path]] for path in fields}
    seeds = list(range(study.final.seeds))
    return {"trial": chosen.number, "seeds": seeds, "fields": fields, "values": values, "results": {}}


def train(context: Context, record: dict[str, Any]) -> Generator[str, None, None]:
    """Train what is missing, yield a line per epoch, and record each training at its end.

    Writes the study's attribute "ablation" only. Killed anywhere, it resumes to the same record.
    """
    store, base, chosen = context.store, _base(context.store), _chosen(context.store)
    store.set_attribute("ablation", record)  # its checkpoints are in use from here on
    for step, number in unablated(record):
        changed = {path: chosen.params[path] for path in record["fields"][:step]}
        trial = dataclasses.replace(base, number=step, params=base.params | changed)
        retraining = Retraining(context, "ablation", trial, number, logged=False)
        for event in retraining.train():
            if isinstance(event, EpochEnded) and event.result.val is not None:
                what = f"with {record['fields'][step - 1]}" if step else "base"
                epoch = f"epoch {event.result.epoch}/{retraining.config.epochs}"
                yield f"{what}, seed {number}  {epoch}  val {event.result.val.value:.2%}"
        if retraining.diverged:
            with_what, last = ", ".join(changed) or "the base", retraining.diverged.epoch
            yield from map(str, retraining.end())  # removes the checkpoint
            raise StudyFailed(
                f"The study cannot be ablated, because with {with_what} seed {number} diverged in epoch {last}."
            )
        val = retraining.trained().progress.epochs[-1].val
        assert val is not None, "an ablation needs validation images"
        record["results"].setdefault(str(step), []).append(_result(val))
        store.set_attribute("ablation", record)
        yield from map(str, retraining.end())  # logs nothing, and removes the checkpoint


def _result(val: Metrics) -> dict[str, Any]:
    return {"value": val.value, "images": val.total, "hits": val.hits, "contributions": val.contributions}


def _chosen(store: Store) -> TrialRecord:
    chosen = store.chosen()
    assert chosen is not None, "a study that has ended with a best trial has chosen one"
    return chosen


def _base(store: Store) -> TrialRecord:
    return next(trial for trial in store.trials() if trial.number == 0)
