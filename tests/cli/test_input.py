"""Wrong input: exit code 2, one line that says what to do instead, no traceback, and nothing written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import run as running
from harness.cli.commands import main
from harness.config import find as catalogue
from harness.store.opening import open_store
from tests.analytic import run_analytic
from tests.conftest import PROJECT
from tests.refusal import assert_refused, pictures, tree

pytestmark = pytest.mark.usefixtures("offline")

# -- arguments -----------------------------------------------------------------------------------------------------


# Arguments of `run --study demo`, and words of the answer.
ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "no trials": (["--trials", "0"], ["argument --trials", "whole number of at least 1"]),
    "a negative number of trials": (["--trials=-3"], ["argument --trials", "at least 1"]),
    "trials that are no number": (["--trials", "abc"], ["argument --trials", "not 'abc'"]),
    "half a trial": (["--trials", "2.5"], ["argument --trials", "not '2.5'"]),
    "empty trials": (["--trials="], ["argument --trials", "at least 1"]),
    "trials in powers of ten": (["--trials", "1e3"], ["argument --trials", "not '1e3'"]),
    "trials beyond number": (["--trials", "9" * 20], ["argument --trials", "at most 1,000,000", "not '9999"]),
    "trials of thousands of digits": (["--trials", "9" * 5000], ["at most 1,000,000", "(5002 characters)"]),
    "trials without end": (["--trials", "inf"], ["argument --trials", "at most 1,000,000"]),
    "half a trial in one sign": (["--trials", "½"], ["argument --trials", "whole number"]),
    "trials in other digits": (["--trials", "٣"], ["argument --trials", "whole number"]),
    "a price of nothing": (["--price", "0"], ["argument --price", "a number above 0 and at most 1,000,000, not '0'"]),
    "a price that is no number": (["--price", "nan"], ["argument --price", "a number above 0", "not 'nan'"]),
    "a price with its currency": (["--price", "2.40€"], ["argument --price", "a number above 0"]),
    "no workers": (["--workers", "0"], ["argument --workers", "at least 1"]),
    "workers beyond number": (["--workers", "9" * 20], ["argument --workers", "at most 10,000"]),
    "workers that are not a number": (["--workers", "nan"], ["argument --workers", "whole number"]),
    "workers of a GPU beyond number": (
        ["--workers-per-gpu", "9" * 20],
        ["argument --workers-per-gpu", "at most 10,000"],
    ),
    "epochs beyond number": (["--set", "epochs=" + "9" * 30], ["epochs must lie between", "9,223,372,036,854,775,807"]),
    "epochs that nobody lives to see": (
        ["--set", "epochs=10000000"],
        ["epochs must be at least 1 and at most 1,000,000"],
    ),
    "a batch beyond number": (
        ["--set", "batch_size=" + "9" * 18],
        ["batch_size must be at least 1 and at most 1,000,000"],
    ),
    "a limit beyond number": (["--set", "data.limit=" + "9" * 30], ["data.limit must lie between"]),
    "a seed beyond number": (["--set", "seed=" + "9" * 30], ["seed must lie between"]),
    "a seed below number": (["--set", "seed=-" + "9" * 30], ["seed must lie between"]),
    "seeds beyond number": (["--set", "final.seeds=1000000"], ["final.seeds must be at least 1 and at most 1,000"]),
    "a second look without end": (["--set", "final.rerank=1000000"], ["final.rerank must be at least 2 and at most"]),
    "an image beyond number": (["--set", "data.stored_size=" + "9" * 12], ["data.stored_size must be at most 10,000"]),
    "pictures beyond number": (["--set", "data.train_per_class=" + "9" * 12], ["at most 100,000"]),
    "widths beyond number": (["--set", "backbone.hidden=" + "9" * 12], ["at most 1,000,000"]),
    "a width beyond number": (["--set", "backbone.hidden=64," + "9" * 30], ["backbone.hidden must lie between"]),
    "checkpoints never": (
        ["--set", "checkpoint_seconds=Infinity"],
        ["checkpoint_seconds must be 0 or more, and finite"],
    ),
    "gradients clipped at infinity": (["--set", "optim.clip_norm=1e999"], ["optim.clip_norm", "finite"]),
    "an unknown option": (["--trails", "3"], ["--trails"]),
    "an option without its value": (["--storage"], ["argument --storage", "expected one argument"]),
    "an unknown field": (["--set", "optim.lr=1"], ["--set optim.lr=1", "optim.base_lr", "batch_size"]),
    "a field that is a whole part": (["--set", "optim=1"], ["no field 'optim'", "optim.name"]),
    "a whole number in words": (["--set", "epochs=many"], ["epochs must be a whole number, not 'many'"]),
    "a broken whole number": (["--set", "epochs=2.5"], ["epochs must be a whole number, not 2.5"]),
    "a whole number that is a truth": (["--set", "epochs=true"], ["epochs must be a whole number, not True"]),
    "a whole number that is null": (["--set", "epochs=null"], ["epochs must be a whole number, not None"]),
    "a number of too many digits": (["--set", "epochs=" + "9" * 5000], ["epochs must be a whole number"]),
    "brackets without end": (["--set", "epochs=" + "[" * 5000], ["epochs must be a whole number"]),
    "an unhashable literal": (["--set", "epochs={[]: 1}"], ["epochs must be a whole number"]),
    "no value": (["--set", "epochs"], ["--set 'epochs'", "PATH=VALUE"]),
    "an empty value": (["--set", "epochs="], ["epochs must be a whole number, not ''"]),
    "an empty setting": (["--set", ""], ["PATH=VALUE"]),
    "a number in words": (["--set", "label_smoothing=much"], ["label_smoothing must be a number, not 'much'"]),
    "a value out of range": (["--set", "label_smoothing=2"], ["label_smoothing must lie"]),
    "a number that is none": (["--set", "label_smoothing=NaN"], ["label_smoothing must lie"]),
    "an infinite rate": (["--set", "optim.base_lr=Infinity"], ["optim.base_lr must be greater than 0 and finite"]),
    "a negative time between checkpoints": (["--set", "checkpoint_seconds=-1"], ["0 or more, and finite, not -1"]),
    "no time between checkpoints": (["--set", "checkpoint_seconds=nan"], ["checkpoint_seconds must be a number"]),
    "a time that is not a number": (["--set", "checkpoint_seconds=NaN"], ["checkpoint_seconds must be 0 or more"]),
    "a time in words": (["--set", 'checkpoint_seconds="x"'], ["checkpoint_seconds must be a number, not 'x'"]),
    "a truth in words": (["--set", "backbone.pretrained=maybe"], ["must be true or false, not 'maybe'"]),
    "a truth in numbers": (["--set", "backbone.pretrained=0"], ["must be true or false, not 0"]),
    "another choice": (["--set", "optim.name=lion"], ["optim.name must be adamw or adam or", "not 'lion'"]),
    "widths in words": (["--set", "backbone.hidden=wide"], ["must be a tuple of whole numbers such as (512, 256)"]),
    "broken widths": (["--set", "backbone.hidden=64,1.5"], ["must be a tuple of whole numbers such as (512, 256)"]),
    "a width of none": (["--set", "backbone.hidden=64,0"], ["widths of at least 1"]),
    "one end of a range": (["--set", "augment.crop_scale=0.5"], ["a tuple of 2 numbers such as (0.5, 1.0)"]),
    "an optional number in words": (["--set", "data.limit=all"], ["must be a whole number or null, not 'all'"]),
    "a seed that is no number": (["--set", "seed=abc"], ["seed must be a whole number, not 'abc'"]),
    "an unknown field of the final run": (["--set", "final.seed=1"], ["seeds", "fit_on"]),
    "no seeds": (["--set", "final.seeds=0"], ["final.seeds must be at least 1"]),
    "a base outside of the space": (["--set", "optim.base_lr=0.5"], ["outside of its search range"]),
    "a data root for drawn flowers": (["--data-root", "pictures"], ["--data-root", "Garden reads no folder"]),
    "an empty data root": (["--data-root="], ["argument --data-root", "it is empty"]),
    "an unknown device": (["--device", "abacus"], ["--device abacus", "cpu"]),
    "an empty device": (["--device="], ["--device", "cpu"]),
    "a device that has no such form": (["--device", "cuda:one"], ["--device cuda:one"]),
    "a device without memory": (["--device", "meta"], ["--device meta", "use --device cpu"]),
    "an image size that the model cannot take": (
        ["--set", "data.image_size=65", "--set", "data.stored_size=72"],
        ["data.image_size must be a multiple of 64"],
    ),
    "an empty reason": (["--reopen-test="], ["argument --reopen-test", "it is empty"]),
    "a blank reason": (["--reopen-test", " \t"], ["argument --reopen-test", "it is empty"]),
    "a blank storage": (["--storage", " "], ["argument --storage", "it is empty"]),
    "an empty storage": (["--storage="], ["argument --storage", "it is empty"]),
    "a storage that is no URL": (["--storage", "demo.db"], ["--storage 'demo.db'", "sqlite:///FILE"]),
    "a storage in memory": (["--storage", "sqlite://"], ["in memory"]),
    "a storage in no folder": (["--storage", "sqlite:///no/such/x.db"], ["no folder no/such"]),
    "a storage of no known kind": (["--storage", "flowerbase://x/y"], ["flowerbase"]),
    "a port that is no number": (["--storage", "postgresql://a@h:x/y"], ["is not a database URL"]),
    "a folder as storage": (["--storage", "sqlite:///studies"], ["studies"]),
    "a study file as storage": (["--storage", "sqlite:///studies/demo.py"], ["demo.py cannot be opened"]),
    "a device file as storage": (["--storage", "sqlite:////dev/null"], ["/dev/null is not a file"]),
    "a storage of an unknown driver": (["--storage", "sqlite+nodriver:///x.db"], ["is not a database URL"]),
    "a storage in SQLite's words": (["--storage", "sqlite:///file:x.db?uri=true"], ["use sqlite:///FILE"]),
    "a storage of another kind": (["--storage", "mysql://a@h/x"], ["SQLite or PostgreSQL"]),
    "a storage of another kind, moved aside": (["--fresh", "--storage", "mysql://a@h/x"], ["SQLite or PostgreSQL"]),
    "a storage by another driver": (["--storage", "postgresql+asyncpg://a@h/x"], ["asyncpg"]),
    "a folder as storage, moved aside": (["--fresh", "--storage", "sqlite:///studies"], ["studies"]),
}


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_wrong_arguments_are_refused(
    arguments: list[str], words: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(workspace, capsys, ["run", "--study", "demo", *arguments], words)


@pytest.mark.parametrize("arguments", [[], ["walk"], ["show"], ["reproduce", "demo"], ["show", "demo", "--colour"]])
def test_an_incomplete_or_unknown_command_is_refused(
    arguments: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(workspace, capsys, arguments, ["error: "])


def test_more_trials_than_the_grid_has_points_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--study", "flowers102_grid", "--trials", "10"]
    assert_refused(workspace, capsys, arguments, ["has 9 points", "not 10"])


def test_cuda_without_cuda_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    device = f"cuda:{torch.cuda.device_count()}"  # one more than there are
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--device", device], [f"--device {device}"])


def test_mlruns_that_is_a_file_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "mlruns").write_text("a file")
    assert_refused(workspace, capsys, ["run", "--study", "demo"], ["mlruns", "cannot be written"])


def test_a_database_that_is_no_study_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(workspace / "other.db")) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--storage", "sqlite:///other.db"], ["not a study"])
    assert_refused(workspace, capsys, ["show", "demo", "--storage", "sqlite:///other.db"], ["not a study"])


@pytest.mark.slow
def test_another_definition_is_refused_without_a_trace(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = catalogue.find("demo")
    with open_store(found.study, found.storage_url) as store:
        run_analytic(found.study, store, 1)
    arguments, words = ["run", "--study", "demo", "--set", "epochs=5"], ["epochs was 6, is 5", "--fresh"]
    assert_refused(workspace, capsys, arguments, [*words, "kept under another name).\n"])
    with open_store(found.study, found.storage_url) as store:
        store.set_attribute("command", "python run_study.py --study demo --set epochs=6")
    said = "It was run with: python run_study.py --study demo --set epochs=6\n"
    assert_refused(workspace, capsys, arguments, [*words, said])


# -- images and weights --------------------------------------------------------------------------------------------


def test_a_data_root_without_data_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(workspace, classes=0)
    assert_refused(
        workspace, capsys, ["run", "--study", "folder"], ["pictures", "holds no class folders", "--data-root"]
    )
    assert_refused(
        workspace, capsys, ["run", "--study", "folder", "--data-root", "nowhere"], ["nowhere", "--data-root"]
    )


def test_a_single_class_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(workspace, classes=1)
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["one class folder", "at least two"])


def test_a_class_without_images_is_refused_by_name(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures(workspace) / "class_empty").mkdir()
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["'class_empty' has no images"])


def test_a_broken_image_is_refused_by_name(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures(workspace) / "class_1" / "3.png").write_bytes(b"no image at all")
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["class_1/3.png", "cannot be read as an image"])


def test_a_truncated_image_is_refused_by_name(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pictures(workspace) / "class_0" / "5.png"
    image.write_bytes(image.read_bytes()[:-40])
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["class_0/5.png"])


def test_a_stray_file_is_refused_by_name(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures(workspace) / "class_1" / "notes.txt").write_text("mine")
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["notes.txt", "no image suffix"])


def test_pictures_in_a_folder_of_their_own_inside_a_class_are_refused_by_name(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = pictures(workspace) / "class_0" / "more"
    inner.mkdir()
    (inner.parent / "0.png").rename(inner / "0.png")
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["class_0/more", "move them up", "class_0,"])


@pytest.mark.parametrize("place", ["class_1/99.png", "class_2"])
def test_a_link_to_nothing_is_refused_by_name(place: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures(workspace) / place).symlink_to("/no/such/place")
    assert_refused(workspace, capsys, ["run", "--study", "folder"], [place, "/no/such/place", "remove the link"])


def test_a_class_folder_whose_name_is_no_utf8_is_refused_before_anything_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As out of an old archive, in train, valid and test."""
    whole = pictures(workspace)
    for split in ("train", "valid", "test"):
        shutil.copytree(whole, workspace / "sorted" / split)
        (workspace / "sorted" / split / "class_1").rename(workspace / "sorted" / split / os.fsdecode(b"r\xf6se"))
    words = ["sorted/train/r\\udcf6se is not UTF-8", "rename it"]
    assert_refused(workspace, capsys, ["run", "--study", "folder", "--data-root", "sorted"], words)


@pytest.mark.parametrize(
    "text", ['"r\\udcf6se"', '"a\\nb"', '"iris"', '""'], ids=["not utf-8", "two lines", "twice", "blank"]
)
def test_a_name_of_a_class_that_cannot_be_used_is_refused_before_anything_runs(
    text: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures(workspace) / "names.json").write_text(f'{{"class_0": "iris", "class_1": {text}}}')
    words = ["class", "'class_1'", "names.json"]
    assert_refused(workspace, capsys, ["run", "--study", "folder", "--set", "data.names=names.json"], words)


@pytest.mark.parametrize("option", ["--data-root", "--storage", "--tracking-uri", "--set"])
def test_an_option_that_would_be_recorded_is_utf8(
    option: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(workspace)
    value = os.fsdecode(b"data.names=\xf6") if option == "--set" else os.fsdecode(b"sqlite:///\xf6.db")
    assert_refused(workspace, capsys, ["run", "--study", "folder", option, value], ["\\udcf6", "UTF-8", "rename it"])


@pytest.mark.parametrize("command", [["run", "--study"], ["show"], ["doctor"], ["report"]])
def test_a_study_in_a_folder_whose_name_is_no_utf8_is_refused(
    command: list[str], workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "here").mkdir()
    (workspace / "studies").rename(workspace / "here" / "studies")
    (workspace / "here").rename(workspace / os.fsdecode(b"\xf6rt"))
    monkeypatch.chdir(workspace / os.fsdecode(b"\xf6rt"))
    assert_refused(workspace, capsys, [*command, "demo"], ["\\udcf6rt/studies/demo.py", "not UTF-8", "rename it"])


def test_a_file_whose_name_has_a_line_break_is_refused_on_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures(workspace) / "class_1" / os.fsdecode(b"\xf6\n.txt")).write_text("mine")
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["class_1/\\udcf6\\n.txt has no image suffix"])


def test_missing_weights_are_refused_with_where_to_put_them(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(workspace)
    words = ["weights", "maxvit_t", os.environ["TORCH_HOME"], "backbone.pretrained=false"]
    arguments = ["run", "--study", "flowers102_grid", "--data-root", "pictures", "--device", "cpu"]
    assert_refused(workspace, capsys, arguments, words)


def test_missing_flowers_are_refused_with_what_is_wanted(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "empty").mkdir()
    arguments = ["run", "--data-root", "empty", "--set", "backbone.pretrained=false", "--device", "cpu"]
    assert_refused(workspace, capsys, arguments, ["flowers-102", "imagelabels.mat", "--data-root"])


# -- in a process of its own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--study", "nothing"], "no study 'nothing'"), (["--study", "demo", "--device", "abacus"], "--device abacus")],
)
def test_the_command_itself_exits_with_2(arguments: list[str], words: str, workspace: Path) -> None:
    before = tree(workspace)
    done = subprocess.run(
        [sys.executable, str(PROJECT / "run_study.py"), *arguments], cwd=workspace, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert tree(workspace) == before


def test_in_a_folder_without_studies_the_projects_own_are_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(tmp_path, capsys, ["show", "nothing"], ["no study 'nothing'", "demo"])


def test_where_there_are_no_studies_none_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_refused(tmp_path, capsys, ["show", "tiny"], [f"nor any other in {tmp_path / 'studies'}; go to the folder"])
    assert_refused(tmp_path, capsys, ["show", "x/tiny.py"], ["x/tiny.py; give another file"])


def test_a_shortened_option_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--study", "demo", "--trial", "3"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --trial" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["README.md", "/proc/nothing"])
def test_a_cache_that_can_be_no_folder_is_wrong_input(
    cache: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "README.md").write_text("a file", encoding="utf-8")
    cache = str(workspace / cache)
    assert_refused(
        workspace, capsys, ["run", "--study", "demo", "--set", f"data.cache={cache}"], ["data.cache", "give a folder"]
    )


def test_the_command_that_goes_on_sets_the_old_study_aside_as_long_as_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["run_study.py", "--study", "demo", "--fresh"])
    assert running._command().endswith("run_study.py --study demo --fresh")
