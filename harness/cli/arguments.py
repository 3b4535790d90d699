"""The command line: commands, options, and their types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.base.errors import is_utf8, shown
from harness.base.files import as_meant
from harness.config.options import MOST_WORKERS
from harness.config.space import LARGEST, MOST_TRIALS, shortened

DEVICE = "auto, cpu, cuda, cuda:1 or mps"
IS = "(default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated options: commands are stored, and run again later."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def build_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser; `run_study.py` is `run` alone."""
    if program == "run_study.py":
        parser = Parser(prog=program, description="Run or resume a hyperparameter study.")
        _add_run(parser)
        parser.set_defaults(command="run")
        return parser
    parser = Parser(prog=program, description="Hyperparameter studies of image classifiers.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def add(name: str, about: str, of_a_study: bool = True) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=about)
        if of_a_study:
            command.add_argument("study", metavar="STUDY", help="a study's name or file")
        return command

    _add_run(add("run", "run or resume a study (the same as run_study.py)", of_a_study=False))
    _add_overviews(add)
    show = add("show", "show a study's results")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.add_argument("--digest", action="store_true", help="print a sha256 of the results, to compare studies")
    show.add_argument("--groups", action="store_true", help="print the parameter groups of the base configuration")
    report = add("report", "write a study's report (HTML) and its trials (CSV)")
    report.add_argument("--output", metavar="DIR", type=_path, help="the folder (default: studies/NAME.report)")
    reproduce = add("reproduce", "train a trial again and compare every epoch with the record")
    reproduce.add_argument("trial", metavar="N", type=_whole(0), help="the trial's number")
    replay = add("replay", "ask the sampler for every trial again and compare with the record")
    audit = add("audit", "train some pruned trials to the end: what did pruning cost?")
    audit.add_argument(
        "--fraction", metavar="F", type=_positive(1), default=0.1, help=f"minimum share of the pruned trials {IS}"
    )
    audit.add_argument("--seed", metavar="N", type=_whole(0, LARGEST), default=0, help=f"seed of the sample {IS}")
    ablate = add("ablate", "from the base to the chosen configuration, one field at a time: what made the difference?")
    queued, skip = _add_by_hand(add)
    doctor = add("doctor", "check that storage, MLflow, checkpoints and processes agree")
    doctor.add_argument("--fix", action="store_true", help="repair what differs from the storage")
    export = add("export", "write the final model as an ONNX file")
    export.add_argument("--onnx", metavar="FILE", type=_path, required=True, help="the file")
    for command in (reproduce, audit, ablate):
        _add_shared(command, "--data-root", "--device")
    for command in (show, report, reproduce, replay, audit, ablate, queued, skip, doctor, export):
        _add_shared(command, "--storage")
    for command in (show, report, reproduce, audit, ablate, doctor):
        _add_shared(command, "--tracking-uri")
    _add_predict(add("predict", "classify photographs with the saved model"))
    _add_demo(add("demo", "open a page where the saved model classifies a photograph"))
    _add_ui(add("ui", "open the MLflow UI on the logged runs", of_a_study=False))
    return parser


def _add_by_hand(add: Callable[..., argparse.ArgumentParser]) -> tuple[argparse.ArgumentParser, ...]:
    """Add the commands that change a running study."""
    queued = add("try", "queue a configuration in a study, which may be running")
    queued.add_argument("settings", metavar="PATH=VALUE", nargs="+", type=_recorded, help="a searched field's value")
    skip = add("skip", "end a trial at its next batch")
    skip.add_argument("trial", metavar="N", type=_whole(0), help="the trial's number")
    return queued, skip


def _add_overviews(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that are not about one study."""
    listed = add("list", "list the studies here: state, trials, best and test result", False)
    listed.add_argument("--json", action="store_true", help="print a JSON list")
    compare = add("compare", "compare studies: definitions, best so far, test results (HTML)", False)
    compare.add_argument("studies", metavar="STUDY", nargs="+", help="two or more studies, by their names or files")
    compare.add_argument("--json", action="store_true", help="print one JSON object, and write no page")
    folder = "the folder of the page (default: studies/NAME.report of the first study)"
    compare.add_argument("--output", metavar="DIR", type=_path, help=folder)
    _add_shared(compare, "--storage")
    init = add("init", "look at photographs and write a study file for them", False)
    init.add_argument(
        "path", metavar="PATH", type=_path, help="a folder of photographs, or a table (CSV, JSON lines, Parquet)"
    )
    init.add_argument("--model", metavar="NAME", help="a model of torchvision or timm (default: a small one)")
    init.add_argument("--name", metavar="NAME", help="the study's name (default: the folder's)")
    branch = add("branch", "write a study file from another one, changed, with its trials as the sampler's history")
    branch.add_argument("new", metavar="NEW", type=_given, help="the new study's name")
    _add_shared(branch, "--set", "--storage")
    models = add("models", "list the models that a study file can name", False)
    models.add_argument("pattern", metavar="PATTERN", nargs="?", default="", help="a part of the name, or * and ?")
    models.add_argument("--json", action="store_true", help="print a JSON list")
    _add_work(add("work", "train for a study that another machine runs with --serve", False))


def _add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options that several commands share."""
    options: dict[str, dict[str, Any]] = {
        "--data-root": {
            "metavar": "DIR",
            "type": _recorded,
            "help": "the folder that holds the data set (default: the study's)",
        },
        "--set": {
            "metavar": "PATH=VALUE",
            "action": "append",
            "default": [],
            "help": "change a field of the base configuration, e.g. epochs=5, data.limit=204, optim.weight_decay=0.05, "
            "final.seeds=1; repeatable",
        },
        "--device": {"help": f"{DEVICE} (default: the study's device)"},
        "--storage": {
            "metavar": "URL",
            "type": _url,
            "help": "the study's database (default: SQLite beside the study file)",
        },
        "--tracking-uri": {
            "metavar": "URI",
            "type": _url,
            "help": "an MLflow server or database (default: mlruns/mlflow.db)",
        },
    }
    for name in names:
        parser.add_argument(name, **options[name])


def _add_ui(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tracking-uri",
        metavar="URI",
        type=_url,
        help="the MLflow database (default: mlruns/mlflow.db); a server has its own UI",
    )
    _add_address(parser, 5000)


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", type=_recorded, default="127.0.0.1", help=f"address to listen on {IS}")
    parser.add_argument("--port", type=_whole(1, 65_535), default=port, help=f"port to listen on {IS}")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--study", metavar="NAME|FILE", default="flowers102", help=f"the study {IS}")
    trials = "total number of finished trials (default: the study's)"
    add("--trials", metavar="N", type=_whole(1, MOST_TRIALS), help=trials)
    hours = "hours of training, over all workers and restarts, with the time that the final run needs"
    add("--hours", metavar="H", type=_positive(1_000_000), help=hours)
    patience = "stop after this many finished trials without a new best"
    add("--patience", metavar="N", type=_whole(1, MOST_TRIALS), help=patience)
    until = "stop when a trial reaches this value of the objective, a share such as 0.97"
    add("--until", metavar="V", type=_positive(1), help=until)
    price = "price of an hour of one worker's training, in any currency; `show` and the report say what is spent"
    add("--price", metavar="P", type=_positive(1_000_000), help=price)
    _add_shared(parser, "--data-root", "--set")
    add("--device", help=f"{DEVICE} (default: the study's, else auto)")
    _add_workers(parser)
    add("--json", action="store_true", help="print a JSON object per line for what happens; text goes to stderr")
    command = "a command that gets these lines, one at a time, on its standard input"
    add("--on-event", metavar="COMMAND", type=_recorded, help=command)
    reason = "open the test set again for a better trial; the reason is recorded in the ledger and in every report"
    add("--reopen-test", metavar="REASON", type=_recorded, help=reason)
    add("--fresh", action="store_true", help="rename an existing study of this name and start a new one")
    _add_shared(parser, "--storage", "--tracking-uri")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, _whole(1, MOST_WORKERS)
    workers = (
        "parallel training processes, each with its own GPU or its share of the cores (default: 1; "
        "with --serve 0; with --engine ray one per GPU of the cluster, without GPUs one per node)"
    )
    add("--workers", metavar="N", type=count, default=0, help=workers)
    add("--workers-per-gpu", metavar="N", type=count, default=1, help=f"workers that share a GPU {IS}")
    engine = f"where the workers run: processes of this machine, or tasks on a Ray cluster {IS}"
    add("--engine", choices=["processes", "ray"], default="processes", help=engine)
    cluster = "with --engine ray: the cluster (default: auto, the cluster of this machine)"
    add("--ray-address", metavar="auto|HOST:PORT", type=_recorded, help=cluster)
    serve = "listen there for workers on other machines (`work`); this one trains only with --workers"
    add("--serve", metavar="HOST:PORT", type=_recorded, help=serve)
    _add_key_file(parser, "beside the study's database; a new one if there is none")


def _add_key_file(parser: argparse.ArgumentParser, default: str) -> None:
    known = f"the key that the machines share (default: HARNESS_KEY_FILE, else {default})"
    parser.add_argument("--key-file", metavar="FILE", type=_recorded, help=known)


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="HOST:PORT", type=_recorded, help="the address that `run --serve` prints")
    _add_key_file(parser, "none")
    _add_shared(parser, "--data-root", "--device")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", metavar="IMAGE|DIR", nargs="+", type=_path, help="photographs, or folders of them")
    add("--top", metavar="N", type=_whole(1), help="number of classes to show (default: 5)")
    table = "write a CSV table instead (-: stdout): file, rank, class, probability"
    add("--csv", metavar="FILE", type=_path, help=table)
    add("--device", default="auto", help=f"{DEVICE} {IS}")
    _add_shared(parser, "--storage")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_address(parser, 7860)
    add(
        "--data-root",
        metavar="DIR",
        type=_recorded,
        help="the folder that holds the data set, from which the page takes its examples",
    )
    add("--device", default="auto", help=f"{DEVICE} {IS}")
    _add_shared(parser, "--storage")


def _given(text: str) -> str:
    """Refuse a blank text: it comes from an unset variable, and the default would not be what the user meant."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value or omit it")
    return text


def _recorded(text: str) -> str:
    """Check a text that goes into records and messages."""
    if not is_utf8(_given(text)):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not UTF-8 and cannot be stored; rename it")
    return text


def _url(text: str) -> str:
    return as_meant(_recorded(text))


def _path(text: str) -> Path:
    return Path(_given(text))


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a function that reads an integer from `low` to `high`."""

    def read(text: str) -> int:
        # Check the length first: Python refuses to parse thousands of digits.
        number = int(text) if len(text) <= 30 and re.fullmatch(r"\s*[+-]?[0-9]+\s*", text, re.ASCII) else None
        if number is None or number < low or (high is not None and number > high):
            least = "0 or more" if low == 0 else f"of at least {low}"
            most = "" if high is None else f" and at most {high:,}"
            raise argparse.ArgumentTypeError(f"it must be a whole number {least}{most}, not {shortened(text)}")
        return number

    return read


def _positive(most: float) -> Callable[[str], float]:
    """Return a function that reads a number above 0 and at most `most`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(f"it must be a number above 0 and at most {most:,}, not {shortened(text)}")
        return number

    return read
