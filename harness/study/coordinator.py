"""The coordinator: begins a study that is open, has it run by itself or by workers, shows it, and publishes its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

from harness.base.environment import environment, versions
from harness.base.errors import DONE, FAILED, InputError, masked
from harness.config.options import RunOptions
from harness.study.publish import START, describe_model, register

if TYPE_CHECKING:
    import torch

    from harness.config.find import Found
    from harness.config.jobs import Workers
    from harness.config.study import Study
    from harness.store.store import Store
    from harness.tracking.tracker import MLflowTracker
    from harness.training.step import Runtime

# What helps when trials end without a result, by their state.
REMEDIES = {
    "failed": "The tracebacks are in MLflow and in the report: mend the cause.",
    "diverged": "Against diverging, search lower learning rates, warm up longer, or clip gradients (optim.clip_norm).",
    "pruned": "Against pruning, take a pruner that spares more trials, or no_pruning().",
}


def run_study(
    options: RunOptions, found: Found, study: Study, store: Store, tracker: MLflowTracker, console: Any
) -> int:
    """Run what the study lacks, to its published end; returns the exit code."""
    from harness.report.display import Display
    from harness.search.loop import TooManyFailures
    from harness.study.life import run as events_of
    from harness.workers.pool import of_use

    runtime = _begin(options, study, store, tracker)
    here = options.engine == "processes"
    workers_of_use = of_use(options.workers, study, store, bool(options.reopen_test)) if here else options.workers
    _say_what_begins(options, workers_of_use, study, store, runtime, console)
    model, checkpoints = (found.beside(store.url, suffix) for suffix in (".model", ".checkpoints"))
    failure = None
    with (
        _workers(options, workers_of_use, found, study, store, tracker, runtime, console) as workers,
        Display(study, store, console, workers.at_once if workers else 1, bool(options.reopen_test)) as display,
        closing(events_of(study, store, runtime, model, checkpoints, options.reopen_test, workers)) as events,
    ):
        try:
            for event in events:
                tracker.show(event)
                store.check_file()
                display.show(event)
        except TooManyFailures as error:
            failure = error
    return _end(found, study, store, tracker, console, failure)


def _begin(options: RunOptions, study: Study, store: Store, tracker: MLflowTracker) -> Runtime:
    """What must be settled before the first trial: how it is computed, and that MLflow has the study's run."""
    from harness.tracking import expected as tracking
    from harness.training.features import keep_features
    from harness.training.job import decide_runtime

    with store.alone(START):
        _check_versions(store)
        among_others = store.facts().wanted if store.at_work() else 0
        store.set_attribute("wanted", max(among_others, study.trials))
        runtime = decide_runtime(study.train, store.facts().runtime, study.trials)
        store.set_attribute("runtime", runtime.to_dict())
        store.set_attribute("published", None)  # until this start has told MLflow everything
        store.set_attribute("depths", {by: study.train.backbone.depths(by) for by in ("block", "layer")})
        if options.engine == "processes" and options.workers == 1 and store.finished() < study.trials:
            _name_changes(store, runtime.device)  # workers' shares of the cores are the same from run to run
        keep_features(study.train, runtime, with_validation=study.final.fit_on == "train+val")
        tracker.start(study, store, tracking.facts(study, runtime.to_dict(), environment(runtime.device)))
    return runtime


def _check_versions(store: Store) -> None:
    """Raise InputError when others work on the study with other versions: their trials could not be compared."""
    from harness.base.processes import in_words

    known, here, others = store.facts().versions, versions(), store.at_work()
    if others and known and known != here:
        names = [name for name in {**known, **here} if known.get(name) != here.get(name)]
        differing = ", ".join(f"{name} {known.get(name)} (here {here.get(name)})" for name in names)
        raise InputError(
            f"Process {in_words(next(iter(others.values())))} works on this study with {differing}; "
            "install the same versions, or wait for its end."
        )
    store.set_attribute("versions", versions())


def _say_what_begins(
    options: RunOptions, of_use: int, study: Study, store: Store, runtime: Runtime, console: Any
) -> None:
    from harness.data.splits import SPLITS, items_of
    from harness.report import overview
    from harness.store.store import wanted

    workers = f", {options.workers} workers" if options.workers > 1 else ""
    if of_use < options.workers:
        workers = f", {of_use} of {options.workers} workers, for the others there is nothing to do"
    data = study.train.data
    images = "/".join(f"{len(items_of(data, split)):,}" for split in SPLITS)
    console.print(
        f"Study {study.name}: {overview.finished_of(store.finished(), wanted(study, store))}, "
        f"{len(data.classes()):,} classes, {images} images to train, choose and test, "
        f"{overview.in_words(runtime.to_dict())}{workers}",
        highlight=False,
        soft_wrap=True,
    )
    if runtime.compiled:
        console.print("The model is compiled in its first steps; that takes minutes, once a process.")


def _end(
    found: Found, study: Study, store: Store, tracker: MLflowTracker, console: Any, failure: Exception | None
) -> int:
    """Write the report, describe and register the model, tell MLflow; unless another coordinator does."""
    from harness.final.model_files import is_untested
    from harness.report import overview
    from harness.report.write import write_report
    from harness.tracking import expected as tracking

    store.check_file()
    done = failure is None and store.is_complete(study)  # by another coordinator, for which this one waited
    if done or not store.lead():
        if done:
            tracker.finish(tracking.study_metrics(store), [], "complete")  # where each has an MLflow of its own
        else:
            tracker.leave()
        print(overview.summary(study.name, store, tracker.uri))
        store.check_file()
        return _failed(failure) if failure else ended(store)
    model_folder, report_folder = (found.beside(store.url, suffix) for suffix in (".model", ".report"))
    write_report(study.name, store, tracker.uri, report_folder)
    model = describe_model(study, store, model_folder, console)
    folders = [report_folder] if is_untested(model_folder) else [report_folder, model_folder]
    told = tracker.finish(tracking.study_metrics(store), folders, "failed" if failure else "complete")
    if failure:
        return _failed(failure)
    if told and model is not None and model_folder in folders:
        told = register(study, store, tracker, model, console)
    if told:
        store.set_attribute("published", store.finished())
    else:
        print(f"MLflow at {masked(tracker.uri)} lacks a part of this; the same command writes it when MLflow is back.")
    print(overview.summary(study.name, store, tracker.uri))
    print(f"report    {report_folder / 'report.html'}")
    store.check_file()
    return ended(store)


def _failed(failure: Exception) -> int:
    print(f"error: {failure}", file=sys.stderr)
    return FAILED


@contextmanager
def _workers(
    options: RunOptions,
    of_use: int,
    found: Found,
    study: Study,
    store: Store,
    tracker: MLflowTracker,
    runtime: Runtime,
    console: Any,
) -> Iterator[Workers | None]:
    """Who trains for this process; None when it does so itself, or nothing is left to train."""
    here = options.engine == "processes"
    if (here and options.workers == 1) or (store.finished() >= study.trials and store.is_settled()):
        yield None
        return
    from harness.workers.worker import Order

    order = Order(
        file=found.file,
        settings=options.set,
        data_root=options.data_root,
        device=options.device,
        trials=study.trials,
        url=store.url,
        checkpoints=found.beside(store.url, ".checkpoints"),
    )
    if here:
        from harness.workers.pool import Pool, surroundings

        environments = surroundings(options.workers, options.workers_per_gpu, runtime.device.type)
        with Pool(order, environments[:of_use], tracker.show) as pool:
            yield pool
        return
    from harness.workers.ray_cluster import in_words, needs
    from harness.workers.ray_workers import RayWorkers

    asked = needs(options.workers, options.workers_per_gpu, runtime.device.type)
    text = f"Asking Ray for {asked.workers} worker{'s' if asked.workers > 1 else ''}"
    console.print(f"{text}, {in_words(asked)} each; that takes some seconds.", highlight=False, soft_wrap=True)
    with ExitStack() as kept:
        with console.status(f"{text} …"):
            workers = kept.enter_context(RayWorkers(order, store, asked, tracker.show))
        yield workers


def _name_changes(store: Store, device: torch.device) -> None:
    """Say what is other than when the last trial ended and may change the last bits from here on."""
    from harness.training.checkpoint import differences

    before = store.environment()
    if before and (found := differences(before, environment(device))):
        print(f"Since the last trial, {found}: from here on the last bits may differ.", file=sys.stderr)


def ended(store: Store) -> int:
    """The exit code of a study with all its trials; without a complete one, or a whole ledger, it has no result."""
    if (fault := store.ledger_fault()) is not None:
        text = f"error: In {masked(store.url)}, {fault}; the test result is not to be trusted."
        print(f"{text} Take the storage from a copy.", file=sys.stderr)
        return FAILED
    if store.best() is not None:
        return DONE
    print(f"error: {_no_result(store)}", file=sys.stderr)
    return FAILED


def _no_result(store: Store) -> str:
    """Why no trial is complete, and what helps, in the words of what happened."""
    last = {trial.state: trial for trial in store.trials()}  # of each kind
    states = [trial.state for trial in store.trials()]
    if len(last) > 1:
        counted = ", ".join(f"{states.count(state)} {state}" for state in last)
    else:
        counted = f"{'all ' * (len(states) > 1)}{len(states)} {states[0]}"
    told = "; ".join(f"trial {trial.number}: {trial.reason}" for trial in last.values() if trial.reason)
    remedies = " ".join(remedy for state, remedy in REMEDIES.items() if state in last)
    what = f"{counted} ({told})" if told else counted
    return (
        f"No trial is complete: {what}. {remedies} Then start anew with --fresh, or try further ones with a larger "
        "--trials."
    )
