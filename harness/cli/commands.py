"""Commands, messages and exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.

torch is imported only by what trains; `--help` and `show` answer without it.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import errno
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness.base.errors import DONE, FAILED, INTERRUPTED, WRONG_INPUT, Halt, InputError, no_room
from harness.cli.arguments import build_parser
from harness.training import interrupt

if TYPE_CHECKING:
    from harness.config.find import Found
    from harness.config.study import Study

# A place that a user named, or whose permissions a user can change.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def process(arguments: Sequence[str], program: str = "python -m harness") -> NoReturn:
    """Run a command as a process of its own, and end it.

    Garbage is not looked for among what is imported, which is none: for torch, torchvision, Optuna and MLflow that took
    1.0 of 4.4 s at the start. Whoever trains calls `running.keep_imports` first. Nor is every object taken apart at the
    end, 1.6 s, once what is registered for the exit is done.
    """
    gc.disable()
    interrupt.install()  # also where SIGINT is ignored, as by a shell that starts a command in the background
    code = main(arguments, program)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str], program: str = "python -m harness") -> int:
    """Run a command and return the exit code.

    Where output has another encoding than UTF-8, what it has no sign for is printed as Python escapes it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser(program).parse_args(_with_command(arguments, program))
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # `show | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except Halt as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in UNUSABLE or error.filename is None:
            raise
        print(f"error: {error.filename} cannot be read or written ({error.strerror}); give another.", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return code


def _with_command(arguments: Sequence[str], program: str) -> list[str]:
    """`run_study.py` is `run` alone; its parser has no command to name."""
    return list(arguments[1:]) if program == "run_study.py" else list(arguments)


def _run(args: argparse.Namespace) -> int:
    from harness.cli.run import run
    from harness.config.options import RunOptions

    return run(RunOptions.of(args))


def _show(args: argparse.Namespace) -> int:
    from harness.config import find as catalogue
    from harness.report import overview
    from harness.store import opening

    found = catalogue.find(args.study)
    if args.groups:
        print(_groups(found.study), end="")
        return DONE
    with opening.read_store(found.study.name, opening.url_of(found, args.storage)) as store:
        uri = _tracking_uri(args, found)
        if args.digest:
            print(overview.digest(store))
        elif args.json:
            escaped = (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8")  # JSON has escapes of its own
            print(json.dumps(overview.overview(found.study.name, store, uri), indent=2, ensure_ascii=escaped))
        else:
            print(overview.summary(found.study.name, store, uri))
    return DONE


def _groups(study: Study) -> str:
    """The parameter groups of the base configuration; the weights' values do not matter for them."""
    from harness.training.optim import group_table, parameter_groups

    config: Any = study.train
    backbone = config.backbone
    if "pretrained" in getattr(backbone, "__dataclass_fields__", {}) and backbone.pretrained is True:
        backbone = dataclasses.replace(backbone, pretrained=False)
    try:
        classes = len(config.data.classes())
    except InputError:
        classes = 102  # the data are not here; only the last layer's count depends on them
    model = backbone.build(classes, config.data.image_size)
    return group_table(parameter_groups(model, backbone.depths(config.optim.depth_by), config.optim))


def _report(args: argparse.Namespace) -> int:
    from harness.config import find as catalogue
    from harness.report.write import write_report
    from harness.store import opening

    found = catalogue.find(args.study)
    with opening.read_store(found.study.name, opening.url_of(found, args.storage)) as store:
        folder = args.output or found.beside(store.url, ".report")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output {folder} is a file; give a folder.")
        try:
            page = write_report(found.study.name, store, _tracking_uri(args, found), folder)
        except Halt as error:
            if error.__cause__ is not None and no_room(error.__cause__):
                raise
            raise InputError(f"{error} --output gives another folder.") from error
    print(page)
    print(page.with_name("trials.csv"))
    return DONE


def _reproduce(args: argparse.Namespace) -> int:
    from harness.cli.reproduce import explanation, reproduce
    from harness.cli.run import keep_imports
    from harness.config import find as catalogue
    from harness.data.splits import prepare
    from harness.store import opening
    from harness.training.job import decide_runtime

    found = catalogue.find(args.study)
    study = found.study.located(found.home, args.data_root, args.device)
    with opening.read_store(study.name, opening.url_of(found, args.storage)) as store:
        study = opening.as_begun(study, store)
        trials = {trial.number: trial for trial in store.trials()}
        if args.trial not in trials:
            has = f"it has 0 to {max(trials)}" if trials else "it has none yet"
            raise InputError(f"Study {study.name!r} has no trial {args.trial}; {has}.")
        runtime = decide_runtime(study.train, store.facts().runtime)
        content = {"data": prepare(study.train.data), "weights": study.train.backbone.weights()}
        opening.as_begun(study, store, content)
    keep_imports()
    trial, same = trials[args.trial], True
    for each in reproduce(study, trial, runtime):
        print(each.line(), flush=True)
        same = same and each.same
    if same:
        count = f"{len(trial.epochs)} epochs" if len(trial.epochs) > 1 else "1 epoch"
        print(f"Trial {trial.number} is reproduced to the last bit: {count}.")
        return DONE
    print(f"Trial {trial.number} is not reproduced. {explanation(trial, runtime)}")
    return FAILED


def _replay(args: argparse.Namespace) -> int:
    from harness.cli.replay import replay_study
    from harness.config import find as catalogue
    from harness.store import opening

    found = catalogue.find(args.study)
    with opening.read_store(found.study.name, opening.url_of(found, args.storage)) as store:
        return DONE if replay_study(opening.as_begun(found.study, store), store) else FAILED


def _audit(args: argparse.Namespace) -> int:
    from harness.cli.run import resumable

    def work() -> int:
        from harness.cli.audit import audit_study
        from harness.config.options import RunOptions

        return audit_study(RunOptions.of(args), args.fraction, args.seed)

    return resumable(work)


def _doctor(args: argparse.Namespace) -> int:
    from harness.cli.doctor import consult
    from harness.config import find as catalogue
    from harness.store import opening

    found = catalogue.find(args.study)
    return DONE if consult(found, opening.url_of(found, args.storage), args.tracking_uri, fix=args.fix) else FAILED


def _predict(args: argparse.Namespace) -> int:
    from harness.base.files import check_place
    from harness.cli.run import keep_imports
    from harness.config import find as catalogue
    from harness.serving import predict
    from harness.store import opening

    files, left_out = predict.find_images(args.images)
    if args.csv not in (None, predict.STDOUT):
        found = catalogue.find(args.study)
        check_place(args.csv, "--csv", ".csv", [*files, *found.kept(opening.url_of(found, args.storage))])
    predictor = predict.load_predictor(args.study, args.storage, args.device)
    count = predict.top(args.top, len(predictor.saved.classes))
    keep_imports()
    return DONE if predict.predict(predictor, files, count, args.csv, left_out) else FAILED


def _demo(args: argparse.Namespace) -> int:
    from harness.cli.run import keep_imports
    from harness.serving import page as demo_page
    from harness.serving.predict import load_predictor

    demo_page.check_installed()
    _check_port(args.host, args.port)
    predictor = load_predictor(args.study, args.storage, args.device, args.data_root)
    keep_imports()
    demo_page.serve(predictor, args.host, args.port)
    return DONE


def _export(args: argparse.Namespace) -> int:
    from harness.config import find as catalogue
    from harness.serving.export import export_onnx
    from harness.store import opening

    found = catalogue.find(args.study)
    export_onnx(found, opening.url_of(found, args.storage), args.onnx)
    print(args.onnx)
    return DONE


def _ui(args: argparse.Namespace) -> int:
    from harness.base.files import sqlite_path, sqlite_url
    from harness.config import find as catalogue
    from harness.tracking.files import ARTIFACTS, move_in
    from harness.tracking.places import local_uri, tracker_for

    folder = catalogue.find_home() / "mlruns"
    uri = args.tracking_uri or local_uri(folder)
    if not args.tracking_uri and not (folder / "mlflow.db").is_file():
        raise InputError(f"There are no runs yet ({folder / 'mlflow.db'} does not exist); run a study first.")
    if uri.startswith(("http://", "https://")):
        raise InputError(f"--tracking-uri {uri} is a server with pages of its own; open it in a browser.")
    file = sqlite_path(uri)
    if file is not None and not file.is_file():
        raise InputError(f"--tracking-uri {uri}: there is no such file; give the MLflow database of a study.")
    tracker = tracker_for(uri, folder)
    tracker.check()
    if file is not None:
        move_in(file, file.parent / ARTIFACTS)
    _check_port(args.host, args.port)
    # Named from its own folder: MLflow would make one of an escaped path's letters.
    store = uri if file is None else sqlite_url(Path(file.name))
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store]
    address = f"http://{args.host}:{args.port}"
    print(f"The MLflow UI opens at {address} (Ctrl-C ends it).", flush=True)
    for name, path in tracker.pages():  # the UI itself opens a study on its traces, of which there are none
        print(f"{name:<9} {address}/{path}", flush=True)
    # A session of its own: MLflow's servers have workers, and all of them should go when this process does.
    server = subprocess.Popen(
        [*command, "--host", args.host, "--port", str(args.port)],
        start_new_session=True,
        cwd=None if file is None else file.parent,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # its libraries' deprecations are no news to a user
    )
    try:
        return DONE if server.wait() == 0 else FAILED
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def _check_port(host: str, port: int) -> None:
    """Raise InputError when nothing can listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"Nothing can listen at {host}:{port} ({error}); give another --port or --host.") from error


def _tracking_uri(args: argparse.Namespace, found: Found) -> str:
    from harness.tracking.places import uri_of

    return uri_of(args.tracking_uri, found.mlruns)


COMMANDS = {
    "run": _run,
    "show": _show,
    "report": _report,
    "reproduce": _reproduce,
    "replay": _replay,
    "audit": _audit,
    "doctor": _doctor,
    "predict": _predict,
    "demo": _demo,
    "export": _export,
    "ui": _ui,
}
