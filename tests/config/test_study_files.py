"""A study file that cannot be used is refused with its line or its field, by every command, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.base.errors import InputError
from harness.config import find as catalogue
from tests.refusal import assert_refused, demo_with, write

pytestmark = pytest.mark.usefixtures("offline")

Row = tuple[Callable[[Path], None] | None, list[str], list[str]]


def changed(old: str, new: str, *words: str) -> Row:
    """The demo with one thing changed, and what the answer says about it."""
    return lambda home: demo_with(home, "bad", old, new), ["--study", "bad"], ["bad.py", *words]


def changed_space(new: str, *words: str) -> Row:
    """The demo with another space."""

    def prepare(home: Path) -> None:
        text = (home / "studies" / "demo.py").read_text(encoding="utf-8")
        start, end = text.index("space={"), text.index("    sampler=")
        write(home, "bad", f"{text[:start]}space={new},\n{text[end:]}")

    return prepare, ["--study", "bad"], ["bad.py", *words]


INT = "__import__('harness.config.space').config.space.Int"  # which the demo does not import
STUDIES: dict[str, Row] = {
    "an unknown study": (None, ["--study", "nothing"], ["no study 'nothing'", "demo", "flowers102", "flowers102_grid"]),
    "a missing file": (None, ["--study", "studies/nothing.py"], ["no study file", "nothing.py", "demo"]),
    "a folder": (None, ["--study", "studies/"], ["no study file"]),
    "a syntax error": (
        lambda home: write(home, "bad", "import os\nSTUDY = Study(\n"),
        ["--study", "bad"],
        ["bad.py, line 2", "'(' was never closed"],
    ),
    "a file without a study": (
        lambda home: write(home, "bad", "TRIALS = 3\n"),
        ["--study", "bad"],
        ["bad.py", "defines no STUDY"],
    ),
    "a STUDY that is none": (
        lambda home: write(home, "bad", "STUDY = {'trials': 3}\n"),
        ["--study", "bad"],
        ["bad.py", "defines no STUDY"],
    ),
    "an exception": (
        lambda home: write(home, "bad", "x = 1\ny = x / 0\n"),
        ["--study", "bad"],
        ["bad.py, line 2", "ZeroDivisionError"],
    ),
    "an exception of two lines": (
        lambda home: write(home, "bad", "raise ValueError('first\\nsecond')\n"),
        ["--study", "bad"],
        ["bad.py, line 1", "first"],
    ),
    "a missing import": (
        lambda home: write(home, "bad", "\nimport no_such_package\n"),
        ["--study", "bad"],
        ["bad.py, line 2", "no_such_package"],
    ),
    "a file that leaves": (
        lambda home: write(home, "bad", "raise SystemExit('bye')\n"),
        ["--study", "bad"],
        ["bad.py"],
    ),
    "bytes that are no text": (
        lambda home: (home / "studies" / "bad.py").write_bytes(b"\xff\xfe\x00"),
        ["--study", "bad"],
        ["bad.py"],
    ),
    "a path that does not exist": (
        lambda home: demo_with(home, "bad", '"optim.base_lr": Float', '"optim.lr": Float'),
        ["--study", "bad"],
        ["bad.py", "no field 'optim.lr'", "optim.base_lr"],
    ),
    "an inverted range": (
        lambda home: demo_with(home, "bad", "Float(0.0, 0.6)", "Float(0.6, 0.0)"),
        ["--study", "bad"],
        ["bad.py", "empty range", "low must be less"],
    ),
    "a range around something else": (
        lambda home: demo_with(home, "bad", "Float(0.0, 0.6)", "Float(0.5, 0.6)"),
        ["--study", "bad"],
        ["bad.py", "backbone.dropout", "outside of its search range"],
    ),
    "an unknown sampler": (
        lambda home: demo_with(home, "bad", "sampler=gp(n_startup_trials=4)", "sampler=gp(startup=4)"),
        ["--study", "bad"],
        ["bad.py", "ExtrapolatingGPSampler", "startup"],
    ),
    "a package that is missing": (
        lambda home: write(home, "bad", "from no_such_package.part import thing\n"),
        ["--study", "bad"],
        ["bad.py, line 1", "no_such_package", "fix the study file"],
    ),
    "an argument of the sampler that is unknown to it": changed("gp(n_startup_trials=4)", "gp(startup=4)", "startup"),
    "a sampler that is none": changed("gp(n_startup_trials=4)", "gp", "sampler must be gp(), tpe()"),
    "a pruner that is none": changed("asha(min_epochs=2, reduction=2)", "None", "pruner must be asha(), no_pruning()"),
    "a pruner of broken epochs": changed("min_epochs=2", "min_epochs=1.5", "whole numbers", "not 1.5 and 2"),
    "a sampler that needs a package": changed(
        "gp(n_startup_trials=4)",
        "__import__('harness.search.samplers').search.samplers.Sampler('CmaEsSampler')",
        "pip install cmaes",
    ),
    "no space": changed_space("{}", "space is empty"),
    "a space that is a list": changed_space('["optim.base_lr"]', "maps fields to ranges"),
    "a space of numbers": changed_space("{3: Float(0.0, 1.0)}", "maps fields to ranges"),
    "a range that is a tuple": changed_space('{"optim.base_lr": (0.1, 0.2)}', "must be Float(...), Int(...) or Choice"),
    "an option twice": changed("(64,), (128,)", "(64,), (64,)", "has the same value twice"),
    "options without a tuple": changed("Choice(((64,), (128,), (256,), (128, 64)))", "Choice('64')", "as one tuple"),
    "options that are lists": changed("((64,), (128,)", "([64], (128,)", "Choice cannot hold [64]"),
    "a range in words": changed("Float(0.0, 0.6)", 'Float("0", 0.6)', "needs numbers as bounds"),
    "widths for a rate": changed('"optim.base_lr": Float', '"batch_size": Float', "base configuration has batch_size"),
    "epochs in quotes": changed("epochs=6", 'epochs="8"', "epochs must be a whole number, not '8'"),
    "broken epochs": changed("epochs=6", "epochs=8.0", "epochs must be a whole number, not 8.0"),
    "a rate in words": changed("base_lr=5e-4", 'base_lr="x"', "optim.base_lr must be a number, not 'x'"),
    "no dropout": changed("TinyMaxViT()", "TinyMaxViT(dropout=None)", "backbone.dropout must be a number, not None"),
    "a width without a tuple": changed(
        "TinyMaxViT()", "TinyMaxViT(hidden=512)", "backbone.hidden must be a tuple of whole numbers", "not 512"
    ),
    "another optimizer": changed("base_lr=5e-4", 'name="lion", base_lr=5e-4', "optim.name must be adamw or adam"),
    "half a crop": changed("crop_scale=(0.6, 1.0)", "crop_scale=0.6", "augment.crop_scale must be a tuple of 2 num"),
    "a precision of its own": changed(
        'precision="fp32"', "precision=32", "runtime.precision must be auto or tune or fp32 or"
    ),
    "a range beyond what is stored": changed_space(f"{{'epochs': {INT}(1, 2**60)}}", "Int(", "is too wide"),
    "a range beyond all numbers": changed_space("{'optim.base_lr': Float(1e-4, 10**400)}", "is too wide"),
    "a range without end": changed_space("{'optim.base_lr': Float(1e-4, float('inf'))}", "or unbounded"),
    "a range wider than numbers": changed_space("{'optim.base_lr': Float(-1e308, 1e308)}", "is too wide"),
    "epochs beyond number in the space": changed_space(
        f"{{'epochs': {INT}(1, 2**40)}}", "epochs must be at least 1 and"
    ),
    "trials beyond number": changed("trials=10", "trials=10**30", "trials must lie between"),
    "more trials than anybody runs": changed("trials=10", "trials=10**9", "trials must be at least 1 and at most"),
    "epochs of thousands of digits": changed("epochs=6", "epochs=10**5000", "epochs must lie between", "thousands"),
    "seeds in quotes": changed(
        'FinalConfig(seeds=3, fit_on="train")', 'FinalConfig(seeds="3")', "final.seeds must be a whole number"
    ),
    "a final that is a number": changed(
        'FinalConfig(seeds=3, fit_on="train")', "3", "final must be FinalConfig(...), not 3"
    ),
    "data that are a path": changed(
        "data=Garden(val_per_class=30)", 'data="pictures"', "data must be a data set such as Garden()"
    ),
    "a garden of words": changed(
        "data=Garden(val_per_class=30)", 'data=Garden(image_size="64")', "data.image_size must be a whole"
    ),
    "a model that is a name": changed("TinyMaxViT()", '"maxvit"', "backbone must be a model such as MaxViTT()"),
    "no optimizer": changed("optim=OptimConfig(base_lr=5e-4, depth_lr_mult=0.8)", "optim=None", "optim must be OptimC"),
    "trials in quotes": changed("trials=10", 'trials="8"', "trials must be a whole number, not '8'"),
    "a name that is a number": changed('name="demo"', "name=5", "name must be text, not 5"),
    "a name that is a path": changed('name="demo"', 'name="../demo"', "letters, digits"),
    "a field that does not exist": (
        lambda home: demo_with(home, "bad", "batch_size=24", "batchsize=24"),
        ["--study", "bad"],
        ["bad.py", "batchsize"],
    ),
}


@pytest.mark.parametrize(("prepare", "arguments", "words"), STUDIES.values(), ids=STUDIES.keys())
def test_a_wrong_study_is_refused(
    prepare: Callable[[Path], None] | None,
    arguments: list[str],
    words: list[str],
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if prepare is not None:
        prepare(workspace)
    assert_refused(workspace, capsys, ["run", *arguments], words)
    assert_refused(workspace, capsys, ["show", arguments[1]], words)


def test_an_argument_that_optuna_looks_at_late_is_refused_before_the_start(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ('n_startup_trials="x"', 'n_ei_candidates="x"'):
        demo_with(
            workspace,
            "bad",
            "gp(n_startup_trials=4)",
            f"__import__('harness.search.samplers').search.samplers.tpe({given})",
        )
        words = [f"TPESampler({given.replace(chr(34), chr(39))})", "correct its arguments"]
        assert_refused(workspace, capsys, ["run", "--study", "bad", "--trials", "20"], words)


def test_a_study_file_may_define_a_data_set_of_its_own(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its fields are checked like all others."""
    own = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Plot(Garden):
    rows: int = 2

STUDY ="""
    demo_with(workspace, "own", "STUDY =", own)
    future = "from __future__ import annotations\n"
    text = (workspace / "studies" / "own.py").read_text(encoding="utf-8").replace(future, "")
    text = text.replace('"""\n\nfrom', f'"""\n\n{future}\nfrom', 1)
    write(workspace, "own", text.replace("data=Garden(val_per_class=30)", "data=Plot(rows=3)"))
    assert_refused(workspace, capsys, ["show", "own"], ["'demo' has no results yet"])
    write(workspace, "own", text.replace("data=Garden(val_per_class=30)", "data=Plot(rows='3')"))
    assert_refused(workspace, capsys, ["show", "own"], ["data.rows must be a whole number, not '3'"])
    write(workspace, "own", text.replace("data=Garden(val_per_class=30)", "data=Plot(image_size='3')"))
    assert_refused(workspace, capsys, ["show", "own"], ["data.image_size must be a whole number, not '3'"])


def test_a_studys_database_is_no_study_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    file.write_bytes(b"SQLite format 3\0")
    with pytest.raises(InputError, match=r"mine\.db is not a study file; give the study's \.py file"):
        catalogue.find(str(file))
