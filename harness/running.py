"""The `run` command: check everything, open and hold the study, run what is missing, say how to go on."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import interrupt
from harness.errors import Halt, masked, no_room

if TYPE_CHECKING:
    from harness.catalogue import Found
    from harness.config import Study
    from harness.mlflow_tracker import MLflowTracker
    from harness.storage import Store

DONE, FAILED, INTERRUPTED = 0, 1, 130


def run(args: argparse.Namespace) -> int:
    """Run or resume a study; returns the exit code. Raises InputError for what a user can mend."""
    interrupt.install()
    _share_cores()
    try:
        return _run(args)
    except KeyboardInterrupt:
        return _stopped(INTERRUPTED)
    except Halt as error:
        print(f"error: {error}", file=sys.stderr)
    except MemoryError as error:  # outside of a trial, which would have failed and let the next one try
        print(f"error: {str(error) or 'out of memory'}; free some, or take another device.", file=sys.stderr)
    except OSError as error:
        if not no_room(error):
            raise
        print(f"error: {error.filename or 'A file'} cannot be written ({error.strerror}); make room.", file=sys.stderr)
    return _stopped(FAILED)


def _stopped(code: int) -> int:
    """The command that goes on, as the last line; a password in it is the user's to fill in again."""
    from harness.display import StudyConsole

    command = [Path(sys.executable).name, *(arg for arg in sys.argv if arg != "--fresh")]
    text = f"Go on with:\n{shlex.join(map(masked, command))}"
    try:
        print(text, file=sys.stderr if StudyConsole.left else sys.stdout, flush=True)
    except BrokenPipeError:  # nobody reads stdout any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(text, file=sys.stderr)
    return code


def keep_imports() -> None:
    """Turn garbage collection on for what comes from here on; `cli.process` starts without it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _share_cores() -> None:
    """Let waiting threads of GNU OpenMP sleep sooner; must come before torch is imported.

    By default they spin for milliseconds, and two processes on the same cores keep each other from working: a step took
    1.7 s, against 0.36 s with a thirtieth of the spinning and 0.09 s alone (benchmarks/RESULTS.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _run(args: argparse.Namespace) -> int:
    from harness import catalogue, database, report, storage
    from harness.mlflow_places import uri_of

    found = catalogue.find(args.study)
    study = found.study.with_settings(args.set).located(found.home, args.data_root, args.device)
    if args.trials is not None:
        study = dataclasses.replace(study, trials=args.trials)
    url = args.storage or found.storage_url
    database.check_database(url)
    database.check_writable(database.sqlite_file(url))
    begun = not args.fresh and storage.exists(study.name, url)
    if begun:
        # Without --data-root nothing says that the images are others; to look would take longer than the answer.
        content = _prepare(study) if args.data_root else None
        storage.compare(study, url, content)
        with storage.open_store(study, url, content) as store:
            saved = not store.has_final() or storage.has_model(found.beside(url, ".model"))
            if store.is_complete(study) and saved:
                print(f"Nothing is missing: {store.finished()} trials are finished (asked for: {study.trials}).")
                print(report.summary(study.name, store, uri_of(args.tracking_uri, found.mlruns)))
                return _ended(store)
    return _run_what_is_missing(args, found, study, url, begun)


def _run_what_is_missing(args: argparse.Namespace, found: Found, study: Study, url: str, begun: bool) -> int:
    from harness import storage
    from harness.display import StudyConsole
    from harness.engine import find_device
    from harness.mlflow_places import check_writable, tracker_for
    from harness.search import rehearse

    console = StudyConsole()
    rehearse(study)
    find_device(study.train.engine.device)
    if not args.tracking_uri:
        check_writable(found.mlruns)
    study.train.data.samples("train")
    for image_size in study.image_sizes():
        study.train.backbone.check(image_size)
    with console.status("Looking at the images (the first time they are decoded and cached) …"):
        content = _prepare(study)
    tracker = tracker_for(args.tracking_uri, found.mlruns)
    if not begun:  # one that has begun goes on without MLflow, too
        tracker.check()
    if args.fresh:
        folders = (found.beside(url, suffix) for suffix in (".model", ".checkpoints", ".report"))
        moved = storage.move_aside(study.name, url, *folders)
        if moved is not None:
            text = f"The old study is now {moved}; look at it with --storage sqlite:///{moved}."
            console.print(text, highlight=False, soft_wrap=True)
    with storage.open_store(study, url, content) as store:
        try:
            return _run_study(found, study, store, tracker, console)
        except KeyboardInterrupt:
            tracker.interrupt()
            counted = f"{store.finished()} of {study.trials} trials finished"
            if store.finished() >= study.trials and not store.has_final():
                counted += ", the final run is missing"
            console.print(f"Interrupted with {counted}.", highlight=False, soft_wrap=True)
            raise
        except (Exception, SystemExit):
            tracker.interrupt()
            raise


def _prepare(study: Study) -> dict[str, str]:
    """Decode the images once and fingerprint what the definition only names."""
    from harness.data.tensors import prepare

    return {"data": prepare(study.train.data), "weights": study.train.backbone.weights()}


def _run_study(found: Found, study: Study, store: Store, tracker: MLflowTracker, console: Any) -> int:
    from harness import report, tracking
    from harness.display import Display
    from harness.experiment import decide_runtime
    from harness.features import keep_features
    from harness.study import TooManyFailures
    from harness.study import run as events_of

    runtime = decide_runtime(study.train, store.attribute("runtime"), study.trials)
    store.set_attribute("runtime", runtime.to_dict())
    _name_changes(store, runtime.device.type)
    keep_features(study.train, runtime, with_validation=study.final.fit_on == "train+val")
    tracker.start(study, store, tracking.facts(study, runtime.to_dict()))
    console.print(
        f"Study {study.name}: {store.finished()} of {study.trials} trials finished, "
        + report.in_words(runtime.to_dict()),
        highlight=False,
        soft_wrap=True,
    )
    if runtime.compiled:
        console.print("The model is compiled in its first steps; that takes minutes, once a process.")
    failure = None
    model_folder, report_folder, checkpoints = (
        found.beside(store.url, suffix) for suffix in (".model", ".report", ".checkpoints")
    )
    with (
        Display(study, store, console) as display,
        closing(events_of(study, store, tracker, runtime, model_folder, checkpoints)) as events,
    ):
        try:
            for event in events:
                keep_imports()
                display.show(event)
        except TooManyFailures as error:
            failure = error
    report.write_report(study.name, store, tracker.uri, report_folder)
    told = tracker.finish(
        tracking.study_metrics(store), [report_folder, model_folder], "failed" if failure else "complete"
    )
    if failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    if told:
        store.set_attribute("published", store.finished())
    else:
        print(f"MLflow at {masked(tracker.uri)} lacks a part of this; the same command writes it when MLflow is back.")
    print(report.summary(study.name, store, tracker.uri))
    print(f"report    {report_folder / 'report.html'}")
    return _ended(store)


def _name_changes(store: Store, device: str) -> None:
    """Say what is other than when the last trial ended and may change the last bits from here on."""
    from harness.checkpoint import differences
    from harness.environment import environment

    ended = [trial.environments[-1] for trial in store.trials() if trial.environments]
    if ended and (found := differences(ended[-1], environment(device))):
        print(f"Since the last trial, {found}: from here on the last bits may differ.", file=sys.stderr)


def _ended(store: Store) -> int:
    """The exit code of a study with all its trials; without a complete one it has no result."""
    if store.best() is not None:
        return DONE
    last = store.trials()[-1]
    print(
        f"error: No trial is complete (trial {last.number}: {last.reason or last.state}); tracebacks are in MLflow. "
        "Mend the cause and give a larger --trials, or start anew with --fresh.",
        file=sys.stderr,
    )
    return FAILED
