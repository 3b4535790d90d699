"""Arguments, messages and exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.

torch is imported only by what trains; `--help` and `show` answer without it.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness.errors import Halt, InputError, no_room

if TYPE_CHECKING:
    from harness.catalogue import Found
    from harness.config import Study

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
# A place that a user named, or whose permissions a user can change.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def process(arguments: Sequence[str], program: str = "python -m harness") -> NoReturn:
    """Run a command as a process of its own, and end it.

    Garbage is not looked for among what is imported, which is none: for torch, torchvision, Optuna and MLflow that took
    1.0 of 4.4 s at the start. Whoever trains calls `running.keep_imports` first. Nor is every object taken apart at the
    end, 1.6 s, once what is registered for the exit is done.
    """
    gc.disable()
    code = main(arguments, program)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str], program: str = "python -m harness") -> int:
    """Run a command and return the exit code."""
    args = build_parser(program).parse_args(_with_command(arguments, program))
    try:
        code: int = args.function(args)
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


def build_parser(program: str) -> argparse.ArgumentParser:
    """The command line; `run_study.py` is `run` alone."""
    if program == "run_study.py":
        parser = argparse.ArgumentParser(prog=program, description="Run or resume a hyperparameter study.")
        _add_run(parser)
        return parser
    parser = argparse.ArgumentParser(prog=program, description="Hyperparameter studies of image classifiers.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run or resume a study (the same as run_study.py)")
    _add_run(run)
    show = commands.add_parser("show", help="what a study found so far")
    show.add_argument("study", metavar="STUDY", help="a study's name or file")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.add_argument("--digest", action="store_true", help="print a sha256 of the results: equal ones, equal studies")
    show.add_argument("--groups", action="store_true", help="print the parameter groups of the base configuration")
    show.set_defaults(function=_show)
    report = commands.add_parser("report", help="write a study's report (HTML) and its trials (CSV)")
    report.add_argument("study", metavar="STUDY", help="a study's name or file")
    report.add_argument("--output", metavar="DIR", type=_folder, help="where to (default: studies/NAME.report)")
    report.set_defaults(function=_report)
    reproduce = commands.add_parser("reproduce", help="train a trial again and compare every epoch with the record")
    reproduce.add_argument("study", metavar="STUDY", help="a study's name or file")
    reproduce.add_argument("trial", metavar="N", type=_number, help="the trial's number")
    reproduce.add_argument("--data-root", metavar="DIR", type=_given, help="the folder that holds the data set")
    reproduce.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps (default: what the study ran on)")
    reproduce.set_defaults(function=_reproduce)
    doctor = commands.add_parser("doctor", help="whether storage, MLflow, checkpoints and processes agree")
    doctor.add_argument("study", metavar="STUDY", help="a study's name or file")
    doctor.add_argument("--fix", action="store_true", help="mend what disagrees; the storage is right")
    doctor.set_defaults(function=_doctor)
    for command in (show, report, reproduce, doctor):
        _add_places(command)
    ui = commands.add_parser("ui", help="open the MLflow UI on the logged runs")
    ui.add_argument(
        "--tracking-uri", metavar="URI", type=_given, help="the MLflow database or server (default: mlruns/mlflow.db)"
    )
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    ui.set_defaults(function=_ui)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", metavar="NAME|FILE", default="flowers102", help="the study (default: %(default)s)")
    parser.add_argument(
        "--trials", metavar="N", type=_positive, help="how many finished trials the study should have in all"
    )
    parser.add_argument("--data-root", metavar="DIR", type=_given, help="the folder that holds the data set")
    parser.add_argument(
        "--set",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="change a field of the base configuration, e.g. epochs=5, data.limit=204, optim.weight_decay=0.05, "
        "final.seeds=1; repeatable",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps (default: what the study says, else auto)")
    parser.add_argument("--fresh", action="store_true", help="move an existing study of this name aside and start anew")
    _add_places(parser)
    parser.set_defaults(function=_run)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage", metavar="URL", type=_given, help="the study's database (default: sqlite, beside the study file)"
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", type=_given, help="an MLflow server or database (default: mlruns/mlflow.db)"
    )


def _given(text: str) -> str:
    """An empty text is a variable that was not set; the default would go elsewhere than was meant."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a value or leave it out")
    return text


def _folder(text: str) -> Path:
    return Path(_given(text))


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"it must be a trial's number, 0 or more, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text!r}")
    return number


def _run(args: argparse.Namespace) -> int:
    from harness.running import run

    return run(args)


def _show(args: argparse.Namespace) -> int:
    from harness import catalogue, report, storage

    found = catalogue.find(args.study)
    if args.groups:
        print(_groups(found.study), end="")
        return DONE
    with storage.read_store(found.study.name, args.storage or found.storage_url) as store:
        uri = _tracking_uri(args, found)
        if args.digest:
            print(report.digest(store))
        elif args.json:
            print(json.dumps(report.overview(found.study.name, store, uri), indent=2, ensure_ascii=False))
        else:
            print(report.summary(found.study.name, store, uri))
    return DONE


def _groups(study: Study) -> str:
    """The parameter groups of the base configuration; the weights' values do not matter for them."""
    from harness.optim import group_table, parameter_groups

    config: Any = study.train
    backbone = dataclasses.replace(config.backbone, pretrained=False)
    try:
        classes = len(config.data.classes())
    except InputError:
        classes = 102  # the data are not here; only the last layer's count depends on them
    model = backbone.build(classes, config.data.image_size)
    return group_table(parameter_groups(model, backbone.depths(config.optim.depth_by), config.optim))


def _report(args: argparse.Namespace) -> int:
    from harness import catalogue, report, storage

    found = catalogue.find(args.study)
    with storage.read_store(found.study.name, args.storage or found.storage_url) as store:
        folder = args.output or found.beside(store.url, ".report")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output {folder} is a file; give a folder.")
        try:
            page = report.write_report(found.study.name, store, _tracking_uri(args, found), folder)
        except Halt as error:
            if error.__cause__ is not None and no_room(error.__cause__):
                raise
            raise InputError(f"{error} --output gives another folder.") from error
    print(page)
    print(page.with_name("trials.csv"))
    return DONE


def _reproduce(args: argparse.Namespace) -> int:
    from harness import catalogue, storage
    from harness.data.tensors import prepare
    from harness.experiment import decide_runtime
    from harness.reproduce import explanation, reproduce
    from harness.running import keep_imports

    found = catalogue.find(args.study)
    study = found.study.located(found.home, args.data_root, args.device)
    with storage.read_store(study.name, args.storage or found.storage_url) as store:
        study = storage.as_begun(study, store)
        trials = {trial.number: trial for trial in store.trials()}
        if args.trial not in trials:
            has = f"it has 0 to {max(trials)}" if trials else "it has none yet"
            raise InputError(f"Study {study.name!r} has no trial {args.trial}; {has}.")
        runtime = decide_runtime(study.train, store.attribute("runtime"))
        content = {"data": prepare(study.train.data), "weights": study.train.backbone.weights()}
        storage.as_begun(study, store, content)
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


def _doctor(args: argparse.Namespace) -> int:
    from harness import catalogue
    from harness.doctor import consult

    found = catalogue.find(args.study)
    return DONE if consult(found, args.storage or found.storage_url, args.tracking_uri, fix=args.fix) else FAILED


def _ui(args: argparse.Namespace) -> int:
    from harness import catalogue
    from harness.mlflow_places import local_uri, tracker_for

    folder = catalogue.find_home() / "mlruns"
    uri = args.tracking_uri or local_uri(folder)
    if not args.tracking_uri and not (folder / "mlflow.db").is_file():
        raise InputError(f"There are no runs yet ({folder / 'mlflow.db'} does not exist); run a study first.")
    if uri.startswith(("http://", "https://")):
        raise InputError(f"--tracking-uri {uri} is a server with pages of its own; open it in a browser.")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(f"--tracking-uri {uri}: there is no such file; give the MLflow database of a study.")
    tracker_for(uri, folder).check()
    _check_port(args.host, args.port)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    print(f"The MLflow UI opens at http://{args.host}:{args.port} (Ctrl-C ends it).", flush=True)
    signal.signal(signal.SIGTERM, _as_interrupt)
    # A session of its own: MLflow's servers have workers, and all of them should go when this process does.
    server = subprocess.Popen(
        [*command, "--host", args.host, "--port", str(args.port)],
        start_new_session=True,
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
    from harness.mlflow_places import uri_of

    return uri_of(args.tracking_uri, found.mlruns)


def _as_interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
