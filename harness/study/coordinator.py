"""The coordinator: start an open study, run it alone or with workers, show progress, publish the result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.environment import environment, versions
from harness.base.errors import InputError, StudyFailed, masked
from harness.base.files import sqlite_file
from harness.base.processes import in_words
from harness.config.contracts import name_of
from harness.config.jobs import Workers
from harness.config.study import Study
from harness.data.splits import SPLITS, items_of
from harness.final.model_files import is_untested
from harness.report import overview
from harness.report.display import Display
from harness.report.write import write_report
from harness.serving.checker import Checker
from harness.store import database, opening
from harness.store.store import Store, wanted
from harness.study.command import Command
from harness.study.publish import START, describe_model, register
from harness.tracking import expected
from harness.tracking.mlflow import MLflowTracker
from harness.workers import pool, ray_cluster, wire
from harness.workers.worker import WorkerConfig

if TYPE_CHECKING:
    import torch

    from harness.training.step import Runtime

# Remedies for trials without a result, by state.
REMEDIES = {
    "failed": "Fix the cause: the tracebacks are in MLflow and in the report.",
    "diverged": "Against divergence, search lower learning rates, warm up longer, or clip gradients (optim.clip_norm).",
    "pruned": "Against pruning, use a less aggressive pruner, or no_pruning().",
}


def run_study(command: Command, store: Store, tracker: MLflowTracker) -> None:
    """Run the study's missing parts, and publish. Raises StudyFailed if it ends without a result."""
    from harness.final.retrain import Context
    from harness.search.loop import TooManyFailures
    from harness.study.stages import run as events_of

    options, study = command.options, command.study
    runtime = _begin(command, store, tracker)
    here, reason = options.engine == "processes", options.reopen_test
    useful = pool.of_use(options.workers, study, store, bool(reason)) if here else options.workers
    _say_what_begins(command, useful, store, runtime)
    failure = None
    with _workers(command, useful, store, tracker, runtime) as workers:
        context = Context(
            study=study, store=store, runtime=runtime, checkpoints=command.beside(".checkpoints"), workers=workers
        )
        with (
            Display(study, store, command.console, workers.at_once if workers else 1, bool(reason)) as display,
            closing(events_of(context, command.beside(".model"), reason)) as events,
        ):
            try:
                for event in events:
                    tracker.show(event)
                    store.check_file()
                    display.show(event)
                    for hook in command.hooks:
                        hook(event)
            except (TooManyFailures, StudyFailed) as error:
                failure = error
    _end(command, store, tracker, failure)


def _begin(command: Command, store: Store, tracker: MLflowTracker) -> Runtime:
    """Prepare the first trial: decide the runtime, store it, and open the study's MLflow run."""
    from harness.training.assemble import decide_runtime
    from harness.training.features import keep_features
    from harness.training.step import free_memory

    options, study = command.options, command.study
    with store.exclusive(START):
        _check_versions(store)
        _keep_depths(study, store)
        among_others = store.facts().wanted if store.active_workers() else 0
        store.set_attribute("wanted", max(among_others, study.trials))
        if sqlite_file(store.url) is None:  # others must see this command before it has a trial
            key = f"command-{sha256(store.leases.owner.encode()).hexdigest()[:16]}"
            database.outlast(store.url, lambda: store.leases.claim(key))
        stopped = store.facts().stopped
        if stopped is not None and stopped["limits"] != study.limits():
            store.set_attribute("stopped", None)
        runtime = decide_runtime(study.train, store.facts().runtime, study.trials)
        store.set_attribute("runtime", runtime.to_dict())
        store.set_attribute("published", None)  # until MLflow has everything of this start
        if options.trains_itself and store.finished() < wanted(study, store):
            _name_changes(store, runtime.device)  # workers keep their shares of the cores between runs
        keep_features(study.train, runtime, with_validation=study.final.fit_on == "train+val")
        if runtime.device.type != "cpu":
            free_memory(runtime.device)  # for the workers
        tracker.start(study, store, expected.facts(study, runtime.to_dict(), environment(runtime.device)))
    return runtime


def _check_versions(store: Store) -> None:
    """Raise InputError if other processes run the study with other versions: trials would not be comparable."""
    known, here, others = store.facts().versions, versions(), store.active_workers()
    if others and known and known != here:
        names = [name for name in {**known, **here} if known.get(name) != here.get(name)]
        differing = ", ".join(f"{name} {known.get(name)} (here {here.get(name)})" for name in names)
        raise InputError(
            f"Process {in_words(next(iter(others.values())))} works on this study with {differing}; "
            "install the same versions, or wait for its end."
        )
    store.set_attribute("versions", versions())


def _keep_depths(study: Study, store: Store) -> None:
    """Store the names of the model's depths. Raises InputError if they differ from those of the study's start."""
    if len(study.backbones()) > 1:
        return
    depths = {by: [name_of(each) for each in study.backbones()[0].depths(by)] for by in ("block", "layer")}
    if store.facts().depths not in (None, depths):
        raise InputError(
            "The model's depths differ from those of the study's start, which had another version of this project or "
            f"of the model's library; install that version, or {opening.anew(store.url)}."
        )
    store.set_attribute("depths", depths)


def _say_what_begins(command: Command, useful: int, store: Store, runtime: Runtime) -> None:
    count, data = command.options.workers, command.study.train.data
    workers = f", {count} workers" if count > 1 else ""
    if useful < count:
        workers = f", {useful} of {count} workers, the others have nothing to do"
    images = "/".join(f"{len(items_of(data, split)):,}" for split in SPLITS)
    command.console.say(
        f"Study {command.study.name}: {overview.finished_of(store.finished(), wanted(command.study, store))}, "
        f"{len(data.classes()):,} classes, {images} training, validation and test images, "
        f"{overview.in_words(runtime.to_dict())}{workers}"
    )
    if runtime.compiled:
        command.console.say("The first steps compile the model; that takes minutes, once per process.")


def _end(command: Command, store: Store, tracker: MLflowTracker, failure: Exception | None) -> None:
    """Write the report, the model card and MLflow, and register the model, unless another coordinator does."""
    study, console = command.study, command.console
    store.check_file()
    done = failure is None and store.is_complete(study)  # another coordinator did it while this one waited
    if done or not store.lead():
        if done:
            tracker.finish(expected.study_metrics(store), [], "complete")  # coordinators may have their own MLflow
        else:
            tracker.leave()
        console.say(overview.summary(study.name, store, tracker.uri))
        store.check_file()
        return check_result(store, failure)
    model_folder, report_folder = map(command.beside, (".model", ".report"))
    write_report(study.name, store, tracker.uri, report_folder)
    publishing = study.final.publish and failure is None and store.has_final()
    with Checker() if publishing else nullcontext() as checker:
        model = describe_model(command, store)
        folders = [report_folder] if is_untested(model_folder) else [report_folder, model_folder]
        told = tracker.finish(expected.study_metrics(store), folders, "failed" if failure else "complete")
        if failure:
            return check_result(store, failure)
        if told and model is not None and model_folder in folders:
            told = register(command, store, tracker, model, checker)
    if told:
        store.set_attribute("published", store.finished())
    else:
        console.say(f"MLflow at {masked(tracker.uri)} is incomplete; run the same command when it is back.")
    console.say(overview.summary(study.name, store, tracker.uri))
    console.say(f"report    {report_folder / 'report.html'}")
    store.check_file()
    check_result(store)


@contextmanager
def _workers(
    command: Command, useful: int, store: Store, tracker: MLflowTracker, runtime: Runtime
) -> Iterator[Workers | None]:
    """Yield the workers; None if this process trains alone, or nothing is left to train."""
    options, study = command.options, command.study
    here = options.engine == "processes"
    settled = store.is_settled() and not options.reopen_test
    if options.trains_itself or (settled and store.finished() >= wanted(study, store)):
        yield None
        return
    config = WorkerConfig(
        file=command.found.file,
        home=command.found.home,
        settings=options.set,
        data_root=options.data_root and str(Path(options.data_root).resolve()),  # for other folders and machines
        device=options.device,
        trials=study.trials,
        limits=study.limits(),
        url=store.url,
        checkpoints=command.beside(".checkpoints"),
    )
    if here:
        environments = pool.surroundings(options.workers, options.workers_per_gpu, runtime.device.type)[:useful]
        with _here(command, config, environments, tracker) as processes:
            yield processes
        return
    from harness.workers.ray_workers import RayWorkers

    asked = ray_cluster.needs(options.workers, options.workers_per_gpu, runtime.device.type)
    text = f"Asking Ray for {asked.workers} worker{'s' if asked.workers > 1 else ''}"
    command.console.say(f"{text}, {ray_cluster.in_words(asked)} each; this takes some seconds.")
    with ExitStack() as kept:
        with command.console.status(f"{text} …"):
            workers = kept.enter_context(RayWorkers(config, store, asked, tracker.show))
        yield workers


def _here(
    command: Command, config: WorkerConfig, environments: Sequence[Mapping[str, str]], tracker: MLflowTracker
) -> pool.Pool:
    """Return the workers of this machine; with --serve also those that connect."""
    if command.options.serve is None:
        return pool.Pool(config, environments, tracker.show)
    from harness.workers.server import Server

    file = command.key_file()
    wire.make_key(file)
    server = Server(config, environments, tracker.show, command.options.serve, wire.read_key(file))
    work = f"python -m harness work {server.address} --key-file {shlex.quote(str(file))}"
    command.console.say(f"Waiting for workers on other machines. With a copy of the key file, run there:\n{work}")
    return server


def _name_changes(store: Store, device: torch.device) -> None:
    """Print the differences from the last trial's environment, which may change the last bits."""
    from harness.training.checkpoint import differences

    before = store.environment()
    if before and (found := differences(before, environment(device))):
        print(f"Since the last trial, {found}: the last bits may differ from here on.", file=sys.stderr)


def check_result(store: Store, failure: Exception | None = None) -> None:
    """Raise StudyFailed if a finished study has no complete trial, or a damaged ledger."""
    if failure is not None:
        raise StudyFailed(str(failure)) from failure
    if (fault := store.ledger_fault()) is not None:
        text = f"In {store.url}, {fault}; do not trust the test result."
        raise StudyFailed(f"{text} Restore the storage from a backup.")
    if store.best() is None:
        raise StudyFailed(_no_result(store))


def _no_result(store: Store) -> str:
    """Return why no trial is complete, and the remedies."""
    last = {trial.state: trial for trial in store.trials()}  # of each state
    states = [trial.state for trial in store.trials()]
    if len(last) > 1:
        counted = ", ".join(f"{states.count(state)} {state}" for state in last)
    else:
        counted = f"{'all ' * (len(states) > 1)}{len(states)} {states[0]}"
    reasons = "; ".join(f"trial {trial.number}: {trial.reason}" for trial in last.values() if trial.reason)
    remedies = " ".join(remedy for state, remedy in REMEDIES.items() if state in last)
    what = f"{counted} ({reasons})" if reasons else counted
    return (
        f"No trial is complete: {what}. {remedies} Then {opening.anew(store.url)}, or run more trials with a larger "
        "--trials."
    )
