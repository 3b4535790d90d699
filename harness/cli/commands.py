"""Commands, messages and exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.

Only commands that need torch import it; `--help` and `show` do not.
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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from harness.base.errors import DONE, FAILED, INTERRUPTED, WRONG_INPUT, Halt, InputError, Told, no_room
from harness.cli.arguments import build_parser
from harness.cli.run import lasting_command, resumable
from harness.config.find import find, find_home
from harness.training import interrupt

if TYPE_CHECKING:
    from harness.api import Result

# The user can change the path or its permissions.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def process(arguments: Sequence[str], program: str = "python -m harness") -> NoReturn:
    """Run a command, and exit the process.

    Garbage collection is off during imports, which leave no garbage: with torch, torchvision, Optuna and MLflow it took
    1.0 of 4.4 s. Commands that train call `start.keep_imports` first. After the exit handlers, `os._exit` skips the
    teardown of all objects, which took 1.6 s.
    """
    gc.disable()
    interrupt.install()  # even if SIGINT is ignored, as in a shell's background commands
    code = main(arguments, program)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str], program: str = "python -m harness") -> int:
    """Run a command and return the exit code.

    Characters that the output's encoding lacks are printed as Python escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    trains = False
    try:
        # `run_study.py` is `run` alone; its parser has no command to name.
        args = build_parser(program).parse_args(arguments[1:] if program == "run_study.py" else arguments)
        trains = args.command in ("run", "work", "audit", "ablate", "reproduce")
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # `show | head`: the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED if trains else DONE
    except Told as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        if error.errno not in UNUSABLE or error.filename is None:
            raise
        print(f"error: {error.filename} cannot be read or written ({error.strerror}); give another.", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return code


@resumable
def _run(args: argparse.Namespace) -> int:
    from harness.config.options import RunOptions
    from harness.report.display import StudyConsole
    from harness.study import start

    given = {option: value for option, value in vars(args).items() if option not in ("command", "study")}
    StudyConsole.left = args.json
    start.run(RunOptions.of(given, lasting_command()), find(args.study), StudyConsole(stderr=args.json))
    return DONE


def _result(args: argparse.Namespace) -> Result:
    from harness.api import Result

    return Result(find(args.study), args.storage, getattr(args, "tracking_uri", None))


def _list(args: argparse.Namespace) -> int:
    from harness.api import rows
    from harness.report.display import print_studies

    found = rows()
    if args.json:
        _print_json([dataclasses.asdict(row) for row in found])
    else:
        print_studies(found)
    return DONE


def _init(args: argparse.Namespace) -> int:
    from harness.new_study import init

    made = init(args.path, args.model, args.name)
    for sentence in made.findings:
        print(sentence)
    print(f"\nWrote {made.file}. Run it with: {made.command()}")
    return DONE


def _branch(args: argparse.Namespace) -> int:
    from harness.new_study import branch

    made = branch(args.study, args.new, args.set, args.storage)
    for line in made.findings:
        print(line)
    print(f"Wrote {made.file}. Run it with: {made.command()}")
    return DONE


def _models(args: argparse.Namespace) -> int:
    from harness.models.catalog import find_models
    from harness.report.display import print_models

    found = find_models(args.pattern)
    if args.json:
        _print_json([dataclasses.asdict(each) for each in found])
    else:
        print_models(found)
        if not args.pattern:
            print("For those of timm, give a PATTERN.", file=sys.stderr)
    return DONE


def _show(args: argparse.Namespace) -> int:
    if args.groups:
        from harness.training.optim import groups_of

        print(groups_of(find(args.study).study), end="")
        return DONE
    result = _result(args)
    if args.digest:
        print(result.digest())
    elif args.json:
        _print_json(result.overview())
    else:
        print(result.summary())
    return DONE


def _print_json(value: object) -> None:
    """Print JSON, in ASCII unless the terminal's encoding is UTF-8."""
    escaped = (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8")
    print(json.dumps(value, indent=2, ensure_ascii=escaped))


def _report(args: argparse.Namespace) -> int:
    result = _result(args)
    page = _written(args.output, result.write_report)
    print(page)
    for table in (page.with_name("trials.csv"), page.with_name("suspects.csv")):
        if table.exists():
            print(table)
    return DONE


def _written(output: Path | None, write: Callable[[Path | None], Path]) -> Path:
    """Return the page that `write` writes into the folder `output`. Raises InputError if it cannot be written to."""
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder.")
    try:
        return write(output)
    except Halt as error:
        if not isinstance(error.__cause__, OSError) or no_room(error.__cause__):
            raise
        raise InputError(f"{error} Or give another --output.") from error


def _compare(args: argparse.Namespace) -> int:
    from harness.report.compare import compared, write_comparison
    from harness.report.display import print_comparison

    found, folder = compared(args.studies, args.storage)
    if args.json:
        _print_json(found)
        return DONE
    page = _written(args.output, lambda output: write_comparison(found, output or folder))
    print_comparison(found)
    print(page)
    return DONE


def _reproduce(args: argparse.Namespace) -> int:
    from harness.study.start import keep_imports

    again = _result(args).reproduce(args.trial, data_root=args.data_root, device=args.device)
    keep_imports()
    for each in again:
        print(each.line(), flush=True)
    print(again.verdict())
    return DONE if again.same else FAILED


def _replay(args: argparse.Namespace) -> int:
    return DONE if _result(args).replay() else FAILED


@resumable
def _audit(args: argparse.Namespace) -> int:
    _result(args).audit(args.fraction, args.seed, data_root=args.data_root, device=args.device)
    return DONE


@resumable
def _ablate(args: argparse.Namespace) -> int:
    _result(args).ablate(data_root=args.data_root, device=args.device)
    return DONE


def _try(args: argparse.Namespace) -> int:
    from harness.search import by_hand

    print(by_hand.queue(find(args.study), args.storage, args.settings))
    return DONE


def _skip(args: argparse.Namespace) -> int:
    from harness.search import by_hand

    print(by_hand.skip(find(args.study), args.storage, args.trial))
    return DONE


@resumable
def _work(args: argparse.Namespace) -> int:
    from harness.study.start import keep_imports
    from harness.workers.client import work

    keep_imports()
    work(args.address, args.key_file, args.data_root, args.device)
    return DONE


def _doctor(args: argparse.Namespace) -> int:
    return DONE if _result(args).doctor(fix=args.fix) else FAILED


def _export(args: argparse.Namespace) -> int:
    _result(args).export_onnx(args.onnx)
    print(args.onnx)
    return DONE


def _demo(args: argparse.Namespace) -> int:
    from harness.serving import demo_page as page
    from harness.serving.predict import load_predictor
    from harness.serving.ui import check_port
    from harness.study.start import keep_imports

    page.check_installed()
    check_port(args.host, args.port)
    predictor = load_predictor(find(args.study), args.storage, args.device, args.data_root)
    keep_imports()
    page.serve(predictor, args.host, args.port)
    return DONE


def _ui(args: argparse.Namespace) -> int:
    from harness.serving.ui import serve_ui

    return DONE if serve_ui(find_home() / "mlruns", args.tracking_uri, args.host, args.port) else FAILED


def _predict(args: argparse.Namespace) -> int:
    from harness.base.files import check_place
    from harness.serving import predict
    from harness.store import opening
    from harness.study.start import keep_imports

    files, left_out = predict.find_images(args.images)
    found = find(args.study)
    if args.csv not in (None, predict.STDOUT):
        check_place(args.csv, "--csv", ".csv", [*files, *found.kept(opening.url_of(found, args.storage))])
    predictor = predict.load_predictor(found, args.storage, args.device)
    count = predict.top(args.top, len(predictor.saved.classes))
    keep_imports()
    return DONE if predict.predict(predictor, files, count, args.csv, left_out) else FAILED


COMMANDS = {
    "run": _run,
    "list": _list,
    "init": _init,
    "branch": _branch,
    "models": _models,
    "show": _show,
    "report": _report,
    "compare": _compare,
    "reproduce": _reproduce,
    "replay": _replay,
    "audit": _audit,
    "ablate": _ablate,
    "try": _try,
    "skip": _skip,
    "work": _work,
    "doctor": _doctor,
    "predict": _predict,
    "demo": _demo,
    "export": _export,
    "ui": _ui,
}
