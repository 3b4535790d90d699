"""Arguments, messages and exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.

torch is imported only by what trains; `--help` and `show` answer without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness.errors import InputError

if TYPE_CHECKING:
    from harness.catalogue import Found
    from harness.config import Study
    from harness.storage import Store
    from harness.tracking import MLflowTracker

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


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
    except PermissionError as error:
        print(f"error: {error.filename} may not be read or written; change its permissions.", file=sys.stderr)
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
    show.add_argument("--groups", action="store_true", help="print the parameter groups of the base configuration")
    show.set_defaults(function=_show)
    report = commands.add_parser("report", help="write a study's report (HTML) and its trials (CSV)")
    report.add_argument("study", metavar="STUDY", help="a study's name or file")
    report.add_argument("--output", metavar="DIR", type=Path, help="where to (default: studies/NAME.report)")
    report.set_defaults(function=_report)
    for command in (show, report):
        _add_places(command)
    ui = commands.add_parser("ui", help="open the MLflow UI on the logged runs")
    ui.add_argument("--tracking-uri", metavar="URI", help="the MLflow database or server (default: mlruns/mlflow.db)")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    ui.set_defaults(function=_ui)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", metavar="NAME|FILE", default="flowers102", help="the study (default: %(default)s)")
    parser.add_argument(
        "--trials", metavar="N", type=_positive, help="how many finished trials the study should have in all"
    )
    parser.add_argument("--data-root", metavar="DIR", help="the folder that holds the data set")
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
        "--storage", metavar="URL", help="the study's database (default: sqlite, beside the study file)"
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="an MLflow server or database (default: mlruns/mlflow.db)"
    )


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text!r}")
    return number


def _run(args: argparse.Namespace) -> int:
    from harness import catalogue, database, storage

    signal.signal(signal.SIGTERM, _as_interrupt)
    _share_cores()
    found = catalogue.find(args.study)
    study = found.study.with_settings(args.set).located(found.home, args.data_root, args.device)
    if args.trials is not None:
        study = dataclasses.replace(study, trials=args.trials)
    url = args.storage or found.storage_url
    database.check_database(url)
    if not args.fresh and storage.exists(study.name, url):
        # Without --data-root nothing says that the images are others; to look would take longer than the answer.
        content = _prepare(study) if args.data_root else None
        with storage.open_store(study, url, content) as store:
            saved = not store.has_final() or storage.has_model(found.beside(url, ".model"))
            if store.is_complete(study) and saved:
                print(f"Nothing is missing: {store.finished()} trials are finished (asked for: {study.trials}).")
                print(_summary(study.name, store, _tracking_uri(args, found)))
                return DONE
    return _run_what_is_missing(args, found, study, url)


def _share_cores() -> None:
    """Let waiting threads of GNU OpenMP sleep sooner; must come before torch is imported.

    By default they spin for milliseconds, and two processes on the same cores keep each other from working: a step took
    1.7 s, against 0.36 s with a thirtieth of the spinning and 0.09 s alone (benchmarks/RESULTS.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _run_what_is_missing(args: argparse.Namespace, found: Found, study: Study, url: str) -> int:
    from rich.console import Console

    from harness import storage, tracking
    from harness.engine import find_device

    console = Console()
    find_device(study.train.engine.device)
    if not args.tracking_uri:
        tracking.check_writable(found.mlruns)
    study.train.data.samples("train")
    for image_size in study.image_sizes():
        study.train.backbone.check(image_size)
    with console.status("Looking at the images (the first time they are decoded and cached) …"):
        content = _prepare(study)
    tracker = _tracker(args, found)
    tracker.connect()
    if args.fresh:
        moved = storage.move_aside(study.name, url, found.beside(url, ".model"))
        if moved is not None:
            console.print(f"The old study is now {moved}.", highlight=False, soft_wrap=True)
    with storage.open_store(study, url, content) as store:
        try:
            return _run_study(found, study, store, tracker, console)
        except KeyboardInterrupt:
            tracker.interrupt()
            command = shlex.join([Path(sys.executable).name, *(arg for arg in sys.argv if arg != "--fresh")])
            console.print(
                f"Interrupted with {store.finished()} of {study.trials} trials finished. Go on with:", highlight=False
            )
            print(command)
            return INTERRUPTED


def _prepare(study: Study) -> dict[str, str]:
    """Decode the images once and fingerprint what the definition only names."""
    from harness.data.tensors import prepare

    return {"data": prepare(study.train.data), "weights": study.train.backbone.weights()}


def _run_study(found: Found, study: Study, store: Store, tracker: MLflowTracker, console: Any) -> int:
    from harness import report, tracking
    from harness.display import Display
    from harness.experiment import decide_runtime
    from harness.study import TooManyFailures, run

    runtime = decide_runtime(study.train, store.attribute("runtime"))
    store.set_attribute("runtime", runtime.to_dict())
    tracker.start(study, store, tracking.facts(study, runtime.to_dict()))
    console.print(
        f"Study {study.name}: {store.finished()} of {study.trials} trials finished, " + _in_words(runtime.to_dict()),
        highlight=False,
        soft_wrap=True,
    )
    failure = None
    model_folder, report_folder = (found.beside(store.url, suffix) for suffix in (".model", ".report"))
    with Display(study, store, console) as display:
        try:
            for event in run(study, store, tracker, runtime, model_folder):
                display.show(event)
        except TooManyFailures as error:
            failure = error
    report.write_report(study.name, store, tracker.uri, report_folder)
    final, best = store.attribute("final"), store.best()
    metrics = {} if best is None or best.value is None else {"best_val_accuracy": best.value}
    if final is not None:
        metrics |= {"test_accuracy": final["accuracy"]}
    model = [model_folder] if final is not None and model_folder.exists() else []
    tracker.finish(metrics, [report_folder, *model], "failed" if failure else "complete")
    if failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    store.set_attribute("published", store.finished())
    print(_summary(study.name, store, tracker.uri))
    print(f"report    {report_folder / 'report.html'}")
    return DONE


def _summary(name: str, store: Store, tracking: str) -> str:
    from harness import report

    counts = ", ".join(f"{number} {state}" for state, number in store.counts().items())
    best = store.best()
    values = {} if best is None else best.params
    shown = [
        f"{key} = {value:.4g}" if isinstance(value, float) else f"{key} = {value}" for key, value in values.items()
    ]
    params = "\n          " + ", ".join(shown) if shown else ""
    return "\n".join(
        [
            f"study     {name}: {counts}",
            f"best      {report.verdict(store)}{params}",
            f"final     {report.final_sentence(store.attribute('final'))}",
            f"runtime   {_in_words(store.attribute('runtime'))}",
            f"storage   {store.url}",
            f"tracking  {tracking}",
        ]
    )


def _in_words(runtime: dict[str, Any] | None) -> str:
    if runtime is None:
        return "not decided yet"
    layout = "channels last" if runtime["channels_last"] else "channels first"
    return f"{runtime['device']}, {runtime['precision']}, {layout}"


def _show(args: argparse.Namespace) -> int:
    from harness import catalogue, report, storage

    found = catalogue.find(args.study)
    if args.groups:
        print(_groups(found.study), end="")
        return DONE
    with storage.read_store(found.study.name, args.storage or found.storage_url) as store:
        uri = _tracking_uri(args, found)
        if args.json:
            print(json.dumps(report.overview(found.study.name, store, uri), indent=2, ensure_ascii=False))
        else:
            print(_summary(found.study.name, store, uri))
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
        page = report.write_report(found.study.name, store, _tracking_uri(args, found), folder)
    print(page)
    print(page.with_name("trials.csv"))
    return DONE


def _ui(args: argparse.Namespace) -> int:
    from harness import catalogue, tracking

    folder = catalogue.find_home() / "mlruns"
    uri = args.tracking_uri or tracking.local_uri(folder)
    if not args.tracking_uri and not (folder / "mlflow.db").is_file():
        raise InputError(f"There are no runs yet ({folder / 'mlflow.db'} does not exist); run a study first.")
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
        raise InputError(f"Nothing can listen at {host}:{port} ({error}); give another --port.") from error


def _tracking_uri(args: argparse.Namespace, found: Found) -> str:
    from harness import tracking

    return args.tracking_uri or tracking.local_uri(found.mlruns)


def _tracker(args: argparse.Namespace, found: Found) -> MLflowTracker:
    from harness import tracking

    if args.tracking_uri:
        return tracking.tracker_at(args.tracking_uri)
    return tracking.local_tracker(found.mlruns)


def _as_interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
