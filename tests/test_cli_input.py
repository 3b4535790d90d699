"""Wrong input: exit code 2, one line that says what to do instead, no traceback, and nothing written."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from harness import catalogue
from harness.cli import main
from harness.storage import open_store
from tests.analytic import run_analytic
from tests.conftest import PROJECT

# An untrained tiny MaxViT on a folder of photographs, `pictures` beside `studies`.
FOLDER_STUDY = """
from harness.config import EngineConfig, OptimConfig, Study, TrainConfig
from harness.data.image_folder import ImageFolder
from harness.models.maxvit import TinyMaxViT
from harness.search import no_pruning, tpe
from harness.space import Float

STUDY = Study(
    name="folder",
    train=TrainConfig(
        data=ImageFolder(root="pictures", image_size=64, stored_size=72),
        backbone=TinyMaxViT(pretrained=False, hidden=()),
        optim=OptimConfig(base_lr=1e-3, depth_lr_mult=0.5),
        engine=EngineConfig(device="cpu", precision="fp32", channels_last="off"),
        epochs=1,
    ),
    space={"optim.base_lr": Float(1e-4, 1e-2, log=True)},
    sampler=tpe(),
    pruner=no_pruning(),
    trials=1,
)
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network and no cached weights, whatever this machine has; the handler of SIGTERM is put back."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes and every folder, but for what Python and the decoding of images keep."""
    found: dict[str, bytes | None] = {}
    for each in sorted(folder.rglob("*")):
        name = each.relative_to(folder)
        if "__pycache__" in name.parts or name.parts[0] == "data":
            continue
        found[str(name)] = each.read_bytes() if each.is_file() else None
    return found


def assert_refused(workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    before = tree(workspace)
    capsys.readouterr()
    code = main(arguments)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    after = tree(workspace)
    assert sorted(set(after) - set(before)) == []
    assert after == before


def write(workspace: Path, name: str, text: str) -> None:
    (workspace / "studies" / f"{name}.py").write_text(text, encoding="utf-8")


def demo_with(workspace: Path, name: str, old: str, new: str) -> None:
    """A copy of the demo with one thing changed."""
    text = (workspace / "studies" / "demo.py").read_text(encoding="utf-8")
    assert old in text
    write(workspace, name, text.replace(old, new))


def pictures(workspace: Path, classes: int = 2, images: int = 8) -> Path:
    root = workspace / "pictures"
    for label in range(classes):
        (root / f"class_{label}").mkdir(parents=True)
        for number in range(images):
            colour = (label * 100, number * 20, 50)
            Image.new("RGB", (80, 80), colour).save(root / f"class_{label}" / f"{number}.png")
    root.mkdir(exist_ok=True)
    write(workspace, "folder", FOLDER_STUDY)
    return root


# -- study files ---------------------------------------------------------------------------------------------------

STUDIES: dict[str, tuple[Callable[[Path], None] | None, list[str], list[str]]] = {
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
        ["bad.py", "empty range", "smaller one"],
    ),
    "a range around something else": (
        lambda home: demo_with(home, "bad", "Float(0.0, 0.6)", "Float(0.5, 0.6)"),
        ["--study", "bad"],
        ["bad.py", "backbone.dropout", "outside of its search range"],
    ),
    "an unknown sampler": (
        lambda home: demo_with(home, "bad", "sampler=tpe(n_startup_trials=4)", "sampler=tpe(startup=4)"),
        ["--study", "bad"],
        ["bad.py", "TPESampler", "startup"],
    ),
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


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["0", "-3", "abc", "2.5", "", "1e3"])
def test_a_wrong_number_of_trials_is_a_usage_error(
    number: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(workspace)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--study", "demo", f"--trials={number}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "argument --trials" in error
    assert "at least 1" in error
    assert "Traceback" not in error
    assert tree(workspace) == before


ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "an unknown field": (["--set", "optim.lr=1"], ["--set optim.lr=1", "optim.base_lr", "batch_size"]),
    "a wrong type": (["--set", "epochs=many"], ["--set epochs=many", "epochs must be a whole number, not 'many'"]),
    "no value": (["--set", "epochs"], ["--set 'epochs'", "PATH=VALUE"]),
    "an empty value": (["--set", "epochs="], ["epochs must be a whole number"]),
    "a value out of range": (["--set", "label_smoothing=2"], ["label_smoothing must lie"]),
    "a seed that is no number": (["--set", "seed=abc"], ["seed must be a whole number"]),
    "an unknown field of the final run": (["--set", "final.seed=1"], ["seeds", "fit_on"]),
    "a base outside of the space": (["--set", "optim.base_lr=0.5"], ["outside of its search range"]),
    "a data root for drawn flowers": (["--data-root", "pictures"], ["--data-root", "Garden draws its own images"]),
    "an unknown device": (["--device", "abacus"], ["--device abacus", "cpu"]),
    "a device that has no such form": (["--device", "cuda:one"], ["--device cuda:one"]),
    "an image size that the model cannot take": (
        ["--set", "data.image_size=65", "--set", "data.stored_size=72"],
        ["data.image_size must be a multiple of 64"],
    ),
    "a storage that is no URL": (["--storage", "demo.db"], ["--storage 'demo.db'", "sqlite:///FILE"]),
    "a storage in memory": (["--storage", "sqlite://"], ["in memory"]),
    "a storage in no folder": (["--storage", "sqlite:///no/such/x.db"], ["no folder no/such"]),
    "a storage of no known kind": (["--storage", "flowerbase://x/y"], ["flowerbase"]),
    "a server that is not there": (["--storage", "postgresql://a@127.0.0.1:1/x"], ["cannot be opened"]),
    "a folder as storage": (["--storage", "sqlite:///studies"], ["studies"]),
    "a study file as storage": (["--storage", "sqlite:///studies/demo.py"], ["demo.py cannot be opened"]),
}


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_wrong_arguments_are_refused(
    arguments: list[str], words: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(workspace, capsys, ["run", "--study", "demo", *arguments], words)


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:///studies/demo.py"])
def test_a_tracking_uri_that_cannot_be_used_is_refused(
    uri: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [f"--set=data.{split}_per_class=1" for split in ("train", "val", "test")]
    assert_refused(workspace, capsys, ["run", "--study", "demo", *few, "--tracking-uri", uri], ["--tracking-uri"])


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


def test_another_definition_is_refused_without_a_trace(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = catalogue.find("demo")
    with open_store(found.study, found.storage_url) as store:
        run_analytic(found.study, store, 1)
    words = ["epochs was 8, is 5", "--fresh"]
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--set", "epochs=5"], words)


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
    assert_refused(workspace, capsys, ["run", "--study", "folder"], ["notes.txt", "not an image by its name"])


def test_missing_weights_are_refused_with_where_to_put_them(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(workspace)
    words = ["weights", "maxvit_t", "sha256", os.environ["TORCH_HOME"], "backbone.pretrained=false"]
    arguments = ["run", "--study", "flowers102_grid", "--data-root", "pictures", "--device", "cpu"]
    assert_refused(workspace, capsys, arguments, words)


def test_missing_flowers_are_refused_with_what_is_wanted(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "empty").mkdir()
    arguments = ["run", "--data-root", "empty", "--set", "backbone.pretrained=false", "--device", "cpu"]
    assert_refused(workspace, capsys, arguments, ["flowers-102", "imagelabels.mat", "--data-root"])


# -- looking -------------------------------------------------------------------------------------------------------


def test_a_study_that_never_ran_has_nothing_to_show(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["show", "demo"], ["show", "demo", "--json"], ["report", "demo"]):
        assert_refused(workspace, capsys, command, ["'demo' has no results yet", "--study demo"])


def test_there_is_no_ui_without_runs(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(workspace, capsys, ["ui"], ["no runs yet", "mlflow.db"])


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
