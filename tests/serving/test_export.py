"""The final model outside of this project: the same logits, from files that execute nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from harness.base.errors import InputError
from harness.cli.commands import main
from harness.serving import export
from harness.serving.export import logits_of, program_weights, weights_of, write_onnx, write_program
from harness.serving.model import SavedModel, load_saved
from harness.store.opening import open_store, read_store
from tests.conftest import PROJECT, make_study
from tests.faulty import STUDY_FILE, complete, one_sentence, small_study
from tests.refusal import assert_refused

LOADER = """
import sys

import numpy
import torch

model = torch.export.load(sys.argv[1]).module()
numpy.save(sys.argv[3], model(torch.from_numpy(numpy.load(sys.argv[2]))).detach().numpy())
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def place(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small study that was run to its end."""
    place = tmp_path_factory.mktemp("finished")
    complete(small_study(image_cache), place)
    return place


@pytest.fixture
def saved(place: Path, image_cache: Path) -> Iterator[SavedModel]:
    study = small_study(image_cache)
    with read_store("tiny", f"sqlite:///{place}/tiny.db") as store:
        yield load_saved(study, store, place / "tiny.model")


def tiny_maxvit() -> SavedModel:
    """The demo's model with the pretrained weights and a drawn head."""
    study = make_study("cache")
    torch.manual_seed(0)
    config = dataclasses.replace(study.train, backbone=dataclasses.replace(study.train.backbone, pretrained=True))
    steps = {"centre_crop": 64, "mean": [0.5] * 3, "std": [0.2] * 3}
    description = {"classes": [f"flower {number}" for number in range(16)], "preprocessing": steps}
    model = config.backbone.build(16, 64).eval()
    return SavedModel(model=model, config=config, description=description)


def other(saved: SavedModel) -> SavedModel:
    """The same with other weights."""
    model = saved.config.backbone.build(len(saved.classes), saved.image_size).eval()
    return dataclasses.replace(saved, model=model)


def pixels(saved: SavedModel, count: int) -> Tensor:
    size = saved.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def in_a_clean_process(program: Path, images: Tensor, folder: Path) -> tuple[Any, set[str]]:
    """The logits that a process gets which knows nothing of this project, and the packages it has imported."""
    numpy.save(folder / "images.npy", images.numpy())
    command = [sys.executable, "-I", "-c", LOADER, str(program), str(folder / "images.npy"), str(folder / "out.npy")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return numpy.load(folder / "out.npy"), {name.split(".")[0] for name in done.stdout.split()}


# -- the program of torch.export -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_gives_the_same_logits_without_this_project(saved: SavedModel, tmp_path: Path) -> None:
    write_program(saved, tmp_path / "model.pt2")
    images = pixels(saved, 7)
    found, imported = in_a_clean_process(tmp_path / "model.pt2", images, tmp_path)
    assert numpy.abs(found - logits_of(saved, images)).max() < 1e-4
    assert not imported & {"harness", "torchvision", "mlflow", "optuna"}


@pytest.mark.slow
def test_nothing_in_the_program_is_pickled(saved: SavedModel, tmp_path: Path) -> None:
    """What is not JSON or a short text is the bytes of a tensor, as its description says; but for the example, a 0."""
    write_program(saved, tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    payloads: dict[str, Any] = {}
    for name, text in content.items():
        if name.endswith("_config.json"):
            payloads |= json.loads(text)["config"]
    assert payloads
    assert not any(each["use_pickle"] for each in payloads.values())
    files = {each["path_name"] for each in payloads.values()}
    for name, each in content.items():
        if name.endswith("sample_inputs/model.pt"):
            assert torch.load(io.BytesIO(each), weights_only=True) == ((0,), {})
        elif Path(name).name not in files:
            assert each.isascii(), name
            assert not each.startswith((b"PK", b"\x80")), name


def test_the_program_is_written_again_only_for_other_weights(saved: SavedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    write_program(saved, path)
    before = path.stat().st_mtime_ns
    write_program(saved, path)
    assert path.stat().st_mtime_ns == before
    assert program_weights(path) == weights_of(saved)
    new = other(saved)
    write_program(new, path)
    assert program_weights(path) == weights_of(new) != weights_of(saved)
    path.write_bytes(path.read_bytes()[:-100])
    assert program_weights(path) is None
    write_program(saved, path)
    assert program_weights(path) == weights_of(saved)


def test_the_weights_are_those_of_the_record(saved: SavedModel, place: Path) -> None:
    with read_store("tiny", f"sqlite:///{place}/tiny.db") as store:
        assert weights_of(saved) == store.attributes()["final"]["per_seed"][0]["weights"]


class Undecided(nn.Module):
    """It looks at the numbers to know what to compute; no graph can hold that."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if float(images.sum()) > 0 else images.amax((2, 3))


def test_a_model_that_cannot_be_exported_is_named_and_leaves_nothing(saved: SavedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch cannot export this model"):
        write_program(dataclasses.replace(saved, model=Undecided()), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


class Fickle(nn.Module):
    """It does something else while it is exported."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + (1.0 if torch.compiler.is_exporting() else 0.0)


def test_a_program_with_other_logits_is_not_kept(saved: SavedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"logits that differ by 1 from .* model\.safetensors"):
        write_program(dataclasses.replace(saved, model=Fickle()), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_program_of_a_maxvit_gives_the_same_logits(tmp_path: Path) -> None:
    saved = tiny_maxvit()
    write_program(saved, tmp_path / "model.pt2")
    images = pixels(saved, 3)
    found, _ = in_a_clean_process(tmp_path / "model.pt2", images, tmp_path)
    assert numpy.abs(found - logits_of(saved, images)).max() < 1e-4


# -- ONNX ----------------------------------------------------------------------------------------------------------


def assert_same_through_onnxruntime(saved: SavedModel, path: Path) -> dict[str, Any]:
    """Any number of images gives the model's own logits; returns the metadata."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    size = saved.image_size
    assert session.get_inputs()[0].shape == ["batch", 3, size, size]
    assert session.get_outputs()[0].shape == ["batch", len(saved.classes)]
    for count in (1, 2, 5):
        images = pixels(saved, count)
        (found,) = session.run(None, {"images": images.numpy()})
        assert numpy.abs(found - logits_of(saved, images)).max() < 1e-4
    return {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}


@pytest.mark.slow
def test_the_onnx_file_gives_the_same_logits_and_says_how_to_use_it(saved: SavedModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    write_onnx(saved, tmp_path / "model.onnx")
    metadata = assert_same_through_onnxruntime(saved, tmp_path / "model.onnx")
    assert metadata["classes"] == list(saved.classes)
    assert metadata["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert metadata["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert f"float32 [batch, 3, {saved.image_size}, {saved.image_size}]" in metadata["input"]
    assert metadata["centre_crop"] == metadata["resize_short_side"] == saved.image_size
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"], "one file, with the weights in it"


@pytest.mark.slow
def test_a_maxvit_as_onnx_gives_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    saved = tiny_maxvit()
    write_onnx(saved, tmp_path / "model.onnx")
    assert_same_through_onnxruntime(saved, tmp_path / "model.onnx")


# -- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workspace:
    folder: Path
    url: str


@pytest.fixture
def workspace_with_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A user's folder; the finished study lies elsewhere."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "tiny.py").write_text(STUDY_FILE)
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path, f"sqlite:///{place}/tiny.db")


@pytest.mark.slow
def test_the_command_writes_the_file(workspace_with_model: Workspace, saved: SavedModel) -> None:
    pytest.importorskip("onnxscript")
    assert main(["export", "tiny", "--storage", workspace_with_model.url, "--onnx", "model.onnx"]) == 0
    assert_same_through_onnxruntime(saved, workspace_with_model.folder / "model.onnx")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("studies", "give a file name"),
        ("/dev/null", "give a file name"),
        ("no/such/model.onnx", "there is no folder no/such; create it first"),
        ("studies/tiny.py", "would replace the study's own files"),
        ("notes.txt", "exists and is not a *.onnx; use a name that ends in .onnx"),
        ("studies/tiny.py/model.onnx", "there is no folder studies/tiny.py"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused(
    workspace_with_model: Workspace, capsys: pytest.CaptureFixture[str], target: str, words: str
) -> None:
    pytest.importorskip("onnxscript")
    (workspace_with_model.folder / "notes.txt").write_text("kept")
    arguments = ["export", "tiny", "--storage", workspace_with_model.url, "--onnx", target]
    assert_refused(workspace_with_model.folder, capsys, arguments, [target, words])


@pytest.mark.parametrize("name", ["tiny.model/model.safetensors", "tiny.db", "tiny.checkpoints/new.onnx"])
def test_a_target_among_the_studys_results_is_refused(
    workspace_with_model: Workspace, place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip("onnxscript")
    arguments = ["export", "tiny", "--storage", workspace_with_model.url, "--onnx", f"{place}/{name}"]
    (place / "tiny.checkpoints").mkdir(exist_ok=True)
    assert_refused(place, capsys, arguments, ["would replace the study's own files"])


def test_a_study_without_a_model_is_refused(
    workspace_with_model: Workspace, place: Path, image_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    with open_store(small_study(image_cache), f"sqlite:///{workspace_with_model.folder}/studies/tiny.db"):
        pass
    arguments = ["export", "tiny", "--onnx", "model.onnx"]
    assert_refused(workspace_with_model.folder, capsys, arguments, ["holds no model", "run the study to its end"])


def test_a_missing_package_is_refused(
    workspace_with_model: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx_of_another_world",))
    arguments = ["export", "tiny", "--storage", workspace_with_model.url, "--onnx", "model.onnx"]
    words = ["onnx_of_another_world", 'pip install -e ".[onnx]"']
    assert_refused(workspace_with_model.folder, capsys, arguments, words)


def test_the_command_itself_says_one_sentence(workspace_with_model: Workspace) -> None:
    command = [sys.executable, "-m", "harness", "export", "nothing", "--onnx", "model.onnx"]
    done = subprocess.run(
        command, cwd=workspace_with_model.folder, capture_output=True, text=True, env={"PYTHONPATH": str(PROJECT)}
    )
    assert done.returncode == 2
    assert one_sentence(done.stderr)
