"""Start a study: check all inputs, open and lock it, and run its missing parts."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import shlex
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness.base import mounts
from harness.base.errors import Halt, InputError, is_utf8, recordable
from harness.base.files import sqlite_file, sqlite_path, sqlite_url
from harness.base.processes import in_words
from harness.config import space as spaces
from harness.config.events import Event
from harness.config.find import Found
from harness.config.options import RunOptions
from harness.config.study import LIMITS, Study
from harness.data.splits import content_of, remarks
from harness.final import model_files
from harness.report import overview
from harness.report.display import StudyConsole
from harness.report.notices import check_command, telling
from harness.search.rehearsal import rehearse
from harness.search.samplers import earlier_trials
from harness.serving.card import CARD
from harness.store import database, opening
from harness.store.ledger import openings
from harness.store.locks import holder
from harness.store.store import Store, wanted
from harness.study import coordinator, publish
from harness.study.command import Command
from harness.tracking.expected import expected_runs
from harness.tracking.files import ARTIFACTS, lacking, move_in
from harness.tracking.places import check_writable, tracker_for, uri_of
from harness.workers import pool, ray_cluster, wire


def run(
    options: RunOptions, found: Found, console: StudyConsole, hooks: Sequence[Callable[[Event], object]] = ()
) -> None:
    """Run or resume a study; call `hooks` with its events.

    Raises InputError for user errors, and StudyFailed if it ends without a result.
    """
    command = _asked_for(options, found, console, hooks)
    study, url = command.study, command.url
    if options.fresh:
        opening.check_movable(url)
        _check_nobody_at_work(study, url)
    begun, model = not options.fresh and opening.exists(study.name, url), command.beside(".model")
    if begun:
        # Without --data-root, assume the same images: to check them would take longer than to answer.
        content = content_of(study) if options.data_root else None
        opening.compare(study, url, content)
        with opening.open_store(study, url, content) as store:
            model_files.check_folder(model, url, store.uid)
            opens = options.reopen_test is not None and _opens_again(study, store, options.reopen_test)
            saved = _is_saved(study, store, model)
            if store.is_complete(study) and saved and not opens:
                _keep_price(options, store)
                with telling(options, study, store):
                    _look_at_mlflow(command, store)
                    finished = store.finished()
                    console.say(f"Nothing is missing: {finished} trials are finished (asked for: {study.trials}).")
                    console.say(overview.summary(study.name, store, uri_of(options.tracking_uri, found.mlruns)))
                    return coordinator.check_result(store)
    else:
        if options.reopen_test:
            raise InputError("--reopen-test: this study has no test result yet; omit the option.")
        model_files.check_folder(model, url, opening.uid_of(study.name, url))
    _run_what_is_missing(command, begun)


def _asked_for(
    options: RunOptions, found: Found, console: StudyConsole, hooks: Sequence[Callable[[Event], object]]
) -> Command:
    """Return the study, changed by the options; check that its database can be opened or created."""
    if options.ray_address is not None and options.engine != "ray":
        raise InputError("--ray-address needs --engine ray; give both, or omit the option.")
    if options.serve is None and options.key_file is not None:
        raise InputError("--key-file needs --serve; give both, or omit the option.")
    if options.on_event is not None:
        check_command(options.on_event)
    if options.price is not None and not 0 < options.price <= 1e6:
        raise InputError(f"price must be a number above 0 and at most 1,000,000, not {options.price}.")
    if options.engine == "ray":  # even if a finished study needs no cluster
        ray_cluster.check_address(options.ray_address)
    study = found.study.with_settings(options.set).located(found.home, options.data_root, options.device)
    given = {name: getattr(options, name) for name in ("trials", *LIMITS)}
    study = dataclasses.replace(study, **{name: value for name, value in given.items() if value is not None})
    for path, value in spaces.leaves(study.train):
        if not is_utf8(json.dumps(value, ensure_ascii=False, default=str)):
            raise InputError(f"{path} is {value}, which is not UTF-8 and cannot be stored; rename it.")
    url = opening.url_of(found, options.storage)
    _check_apart(url, options.tracking_uri)
    database.check_database(url)
    _check_own_file(options, study, url)
    database.check_writable(sqlite_file(url))
    if (risk := mounts.warning(sqlite_file(url))) is not None:
        print(f"Warning: {risk}", file=sys.stderr)
    command = Command(options=options, found=found, study=study, url=url, console=console, hooks=hooks)
    if options.serve is not None:
        _check_serving(command, options.serve)
    return command


def _check_own_file(options: RunOptions, study: Study, url: str) -> None:
    """Raise InputError if the study would share a SQLite file: checkpoints, model and `--fresh` are the file's."""
    known = opening.names_in(url) if sqlite_file(url) is not None else []
    others = [name for name in known if name != study.name]
    if others and (study.name not in known or options.fresh):
        text = f"{sqlite_file(url)} holds the study {others[0]!r}"
        raise InputError(f"{text}; give {study.name!r} a file of its own with --storage.")


def _check_apart(url: str, tracking_uri: str | None) -> None:
    """Raise InputError if MLflow would write into the study's database."""
    file = sqlite_file(url)
    other = None if tracking_uri is None else sqlite_path(tracking_uri)
    if file is not None and other is not None and other.resolve() == file.resolve():
        raise InputError(f"--tracking-uri {tracking_uri} is the study's own database; give MLflow another file.")


def _check_serving(command: Command, address: str) -> None:
    """Raise InputError unless workers on other machines can connect at this address, with a key."""
    if wire.parts(address) is None:
        raise InputError(f"--serve {address!r} is not HOST:PORT, for example 0.0.0.0:7000.")
    if command.options.engine == "ray":
        raise InputError("--serve and --engine ray are two ways to other machines; give one of them.")
    if sqlite_file(command.url) is None:
        raise InputError("--serve is for SQLite; with PostgreSQL, run the same command on every machine instead.")
    if (file := command.key_file()).exists():
        wire.read_key(file)
    elif not os.access(file.parent, os.W_OK):
        raise InputError(f"No key can be written to {file}; give --key-file in a folder that can be written to.")


def _keep_price(options: RunOptions, store: Store) -> None:
    """Store the price, if one is given, outside of the study's definition."""
    if options.price is not None:
        store.set_attribute("price", options.price)


def _look_at_mlflow(command: Command, store: Store) -> None:
    """Write a finished study to a local MLflow whose files were deleted; update the paths of a moved one."""
    study, model = command.study, command.beside(".model")
    uri, mlruns = command.options.tracking_uri, command.found.mlruns
    file = sqlite_path(uri_of(uri, mlruns))
    if file is None:  # a server: `doctor` checks it
        return
    if file.is_file() and file.stat().st_size:
        try:
            move_in(file, file.parent / ARTIFACTS)
        except sqlite3.Error as error:
            raise InputError(
                f"MLflow's database {file} cannot be used ({error}); wait for the process that writes it, or move it "
                "away: the same command then writes a new one."
            ) from error
    lack = lacking(
        file,
        store.uid,
        ["study", *(each.key for each in expected_runs(study, store))],
        [folder.name for folder in model_files.published(store, model)],
        study.name if model_files.is_registered(study, store, model) else None,
    )
    if lack is not None:
        print(f"{lack} Writing what is missing.", file=sys.stderr)
        publish.write_again(command, store, tracker_for(uri, mlruns))


def _check_nobody_at_work(study: Study, url: str) -> None:
    """Raise InputError if a process works on this study; orphaned workers do so for a while."""
    file = sqlite_file(url)
    if file is not None and holder(file) is not None:
        return  # a command runs it: renaming the study raises InputError
    if opening.exists(study.name, url):
        with opening.read_store(study.name, url, any_format=True) as store:
            others = sorted(map(in_words, set(store.active_workers().values())))
        if others:
            raise InputError(
                f"--fresh: process {others[0]} works on study {study.name!r}; wait for its end, or stop it first."
            )


def _is_saved(study: Study, store: Store, folder: Path) -> bool:
    """Return whether the final model's files are complete, if there is one; report and remove damaged files."""
    if not store.has_final():
        return True
    whole = (folder / CARD).is_file()
    for name, fault in model_files.wrong_files(store, folder):
        if name == model_files.CHECK_FILE:  # holds test images, which are not read again for it
            continue
        if (folder / name).exists():
            print(f"{fault}; writing it again.", file=sys.stderr)
            (folder / name).unlink()
        whole = False
    if not whole:
        return False
    program, card = model_files.PROGRAM, (folder / CARD).read_text(encoding="utf-8", errors="replace")
    if program in card and not (folder / program).is_file():
        return False
    if not study.final.publish or model_files.is_untested(folder):
        return True
    return store.facts().is_registered()


def _opens_again(study: Study, store: Store, reason: str) -> bool:
    """Return whether the test set is still to be opened for this reason; the command of a stopped study says it again.

    Raises InputError if there is nothing to open it for.
    """
    opened = openings(store.ledger())
    if store.opened_for() is None:
        raise InputError("--reopen-test: this study has no test result yet; omit the option.")
    if store.finished() >= wanted(study, store) and store.has_final():
        if store.facts().published != store.finished() or (opened and opened[-1]["reason"] == reason):
            return False
        raise InputError(
            f"--reopen-test: the chosen trial {store.opened_for()} is already tested, and would give the same number; "
            "omit the option, or ask for more --trials."
        )
    return True


def _run_what_is_missing(command: Command, begun: bool) -> None:
    from harness.training.assemble import check_early_size
    from harness.training.runtime import find_device

    study, found, url = command.study, command.found, command.url
    rehearse(study)
    device = find_device(study.train.runtime.device)
    options = _with_workers(command.options, study.train.runtime.device, device.type)
    command = dataclasses.replace(command, options=options)
    if not options.tracking_uri:
        check_writable(found.mlruns)
    study.train.data.samples("train")
    for backbone, image_size in itertools.product(study.backbones(), study.image_sizes()):
        backbone.check(image_size)
        for early_size in study.early_sizes():
            check_early_size(backbone, image_size, early_size)
    study.check_frozen_depths()
    with command.console.status("Checking the images (the first run decodes and caches them) …"):
        content = content_of(study)
    earlier = None
    if study.after is not None and (not begun or not _knows_earlier(study, url)):
        earlier = _earlier(study, study.after, url, found.file.parent)
        content["after"] = sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()
    tracker = tracker_for(options.tracking_uri, found.mlruns)
    if not begun:  # a resumed study continues without MLflow
        tracker.check(study.name)
    for line in remarks(study.train.data):
        print(line, file=sys.stderr)
    if options.fresh:
        moved = opening.move_aside(study.name, url, *map(command.beside, (".model", ".checkpoints", ".report")))
        if moved is not None:
            command.console.say(f"The old study is now {moved}; open it with --storage {sqlite_url(moved)}.")
        sys.argv = [word for word in sys.argv if word != "--fresh"]  # the printed command resumes the new study
    with opening.open_store(study, url, content) as store:
        try:
            if earlier is not None:
                store.set_attribute("after", earlier)
            known = options.command and shlex.join(recordable(shlex.split(options.command)))
            store.set_attribute("command", known)
            _keep_price(options, store)
            store.set_attribute("file", found.file.name)
            store.set_attribute("data_root", options.data_root and str(Path(options.data_root).resolve()))
            keep_imports()
            with telling(options, study, store) as hooks:
                coordinator.run_study(dataclasses.replace(command, hooks=[*command.hooks, *hooks]), store, tracker)
        except BaseException as error:
            tracker.interrupt()
            if isinstance(error, KeyboardInterrupt):
                _say_how_far(command, store)
            raise


def _say_how_far(command: Command, store: Store) -> None:
    with suppress(Halt), database.without_waiting():  # the server may be why it is interrupted
        finished, asked = store.finished(), wanted(command.study, store)
        missing = ", the final run is missing" if finished >= asked and not store.is_settled() else ""
        command.console.say(f"Interrupted with {overview.finished_of(finished, asked)}{missing}.")


def _knows_earlier(study: Study, url: str) -> bool:
    """Return whether the study has kept the earlier one's trials; a start that was interrupted before has not."""
    with opening.read_store(study.name, url) as store:
        return store.facts().after is not None


def _earlier(study: Study, name: str, url: str, folder: Path) -> dict[str, Any]:
    """Return what a study keeps of an earlier one, as `StudyFacts.after`. Raises InputError if no trial is of use."""
    with opening.read_earlier(name, url, folder) as store:
        trials = store.optuna_study.get_trials(deepcopy=False)
        definition = store.facts().definition or {}
        if trials and not study.space.keys() & {path for trial in trials for path in trial.params}:
            raise InputError(f"after: {name!r} searched none of this study's hyperparameters; remove after.")
        kept = earlier_trials(study, trials, definition)
        if not kept:
            raise InputError(
                f"after: none of the {len(trials)} trials of {name!r} fits this study's space; remove after."
            )
        objective = definition.get("objective", "accuracy")
        return {"study": name, "uid": store.uid, "of": len(trials), "objective": objective, "trials": kept}


def _with_workers(options: RunOptions, named: str, device: str) -> RunOptions:
    """Return the options with the resolved number of workers.

    Raises InputError if the `device`, given as `named`, has no room for them.
    """
    several = options.engine == "ray" or options.serve is not None or options.workers > 1
    if named.startswith("cuda:") and several:
        raise InputError(
            f"--device {named} names one GPU, but each worker gets its own; give --device cuda, and select GPUs with "
            "CUDA_VISIBLE_DEVICES."
        )
    if device != "cuda" and options.workers_per_gpu > 1:
        raise InputError(
            f"--workers-per-gpu {options.workers_per_gpu} lets workers share a GPU, but this study is computed on "
            f"{device}; omit the option, and give --workers only."
        )
    if options.engine == "ray":
        ray_cluster.connect(options.ray_address)
        count = ray_cluster.needs(options.workers or None, options.workers_per_gpu, device).workers
    else:
        count = options.workers or int(options.serve is None)
        pool.surroundings(count, options.workers_per_gpu, device)
    if options.serve is not None:
        wire.listen(options.serve).close()  # before the images are decoded
    return dataclasses.replace(options, workers=count)


def keep_imports() -> None:
    """Freeze the imported objects and turn garbage collection on; `commands.process` starts without it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
