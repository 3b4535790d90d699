"""The final model in formats that need nothing of this project: a program of torch.export, and ONNX.

Both take standardised images, float32 [B, 3, S, S] with any B, and give logits, float32 [B, classes]; both are compared
with the model that they were made from before they get their name.
"""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.errors import Halt, InputError, first_line, no_room
from harness.base.files import check_place, replace_file, replacing

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.export import ExportedProgram

    from harness.config.find import Found
    from harness.serving.model import SavedModel

WEIGHTS = "weights.sha256"  # an entry of the archive: the fingerprint of the weights that it was made of
TOLERANCE = 1e-4  # of a logit
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 3)  # a program whose batch size is not free fails with one of them
EXAMPLE_BATCH = 2  # torch.export takes a size of 1 for a constant


def weights_of(saved: SavedModel) -> str:
    """The sha256 of the weights, the same as in the final result's record."""
    from harness.training.checkpoint import fingerprint

    return fingerprint(saved.model.state_dict())


def logits_of(saved: SavedModel, images: Tensor) -> NDArray[numpy.float32]:
    """What the model itself says of standardised images, float32 [B, 3, S, S]: float32 [B, classes]."""
    import torch

    with torch.inference_mode():
        return saved.model(images).numpy()


def write_program(saved: SavedModel, path: Path) -> None:
    """Write the model as a program of torch.export to `path`, unless it is there with these weights already.

    `torch.export.load` reads it without executing code of its own: graph, weights and shapes are JSON and plain bytes,
    and the example input, which torch would pickle, is left out. Raises InputError when the model cannot be exported or
    the program gives other logits, Halt when there is no room.
    """
    import torch

    weights = weights_of(saved)
    if program_weights(path) == weights:
        return
    program = _program(saved)
    program.example_inputs = None
    written = io.BytesIO()  # not to the file itself: torch hides from a full disk's message what is full
    torch.export.save(program, written, extra_files={WEIGHTS: weights})
    loaded = torch.export.load(written).module()
    _check(f"The exported program {path}", saved, lambda images: loaded(images).detach().numpy())
    replace_file(path, written.getvalue())


def program_weights(path: Path) -> str | None:
    """The fingerprint of the weights that the program was made of; None when there is no such program."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((name for name in archive.namelist() if name.endswith(WEIGHTS)), None)
            return None if entry is None else archive.read(entry).decode()
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError):
        return None


def export_onnx(found: Found, url: str, path: Path) -> None:
    """Write the model of a study's final run as ONNX to `path`. Raises InputError for what a user can mend."""
    check_packages()
    check_place(path, "--onnx", ".onnx", found.kept(url))
    from harness.serving.model import load_saved
    from harness.store import opening

    with opening.read_store(found.study.name, url) as store:
        study = opening.as_begun(found.study, store)
        saved = load_saved(study, store, found.beside(store.url, ".model"))
    try:
        write_onnx(saved, path)
    except Halt as error:
        if error.__cause__ is not None and no_room(error.__cause__):
            raise
        raise InputError(f"{error} --onnx takes another file.") from error


def check_packages() -> None:
    """Raise InputError unless what ONNX needs is installed."""
    absent = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f'ONNX needs {" and ".join(absent)}; install what is missing with pip install -e ".[onnx]".')


def write_onnx(saved: SavedModel, path: Path) -> None:
    """Write the model as one ONNX file, with input `images` and output `logits`; classes and preprocessing lie in it.

    The file is there whole and checked, or not at all. Raises InputError when the model cannot be exported or
    onnxruntime gives other logits, Halt when the file cannot be written.
    """
    import onnxruntime

    with replacing(path) as file:  # first of all, for exporting takes a minute
        file.write(_onnx(saved))
        file.flush()
        session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
        _check(f"The ONNX file {path}", saved, lambda images: session.run(["logits"], {"images": images.numpy()})[0])


def preprocessing_of(saved: SavedModel) -> dict[str, str]:
    """What a user of the bare network must know, each entry as JSON: the ONNX file's metadata."""
    size = saved.image_size
    what = f"RGB, 0 to 1, minus mean, divided by std; float32 [batch, 3, {size}, {size}], with any batch"
    described = {**saved.description["preprocessing"], "classes": saved.description["classes"], "input": what}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in described.items()}


def _program(saved: SavedModel) -> ExportedProgram:
    import torch

    size = saved.image_size
    example = torch.zeros(EXAMPLE_BATCH, 3, size, size)
    try:
        with torch.no_grad():
            return torch.export.export(saved.model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # the exporter runs the backbone's own code, which may fail in any way
        raise InputError(f"This model cannot be exported by torch ({first_line(error)}).") from error


def _onnx(saved: SavedModel) -> bytes:
    import torch

    program, batch = _program(saved), ({0: "batch"},)  # torch's own name for it would be something like s77
    try:
        made: Any = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], dynamic_shapes=batch, verbose=False
        )
    except Exception as error:  # an operator of the backbone may have no counterpart
        raise InputError(f"This model cannot be written as ONNX ({first_line(error)}).") from error
    made.model.metadata_props.update(preprocessing_of(saved))
    return bytes(made.model_proto.SerializeToString())


def _check(what: str, saved: SavedModel, logits: Callable[[Tensor], NDArray[Any]]) -> None:
    """Raise InputError when a program's logits are not the model's own.

    They are compared on standard normal pixels, seeded, in several batch sizes.
    """
    import torch

    generator, size = torch.Generator().manual_seed(0), saved.image_size
    for count in BATCHES:
        images = torch.randn(count, 3, size, size, generator=generator)
        if (wrong := disagreement(logits(images), logits_of(saved, images))) is not None:
            raise InputError(f"{what} {wrong}, and is not kept; use model.safetensors instead.")


def disagreement(found: NDArray[Any], wanted: NDArray[Any]) -> str | None:
    """How logits differ from the model's own, in words; None when by no more than the tolerance."""
    import numpy

    if found.shape != wanted.shape:
        return f"gives logits of shape {list(found.shape)} instead of {list(wanted.shape)}"
    apart = float(numpy.abs(found - wanted).max())
    # Not `apart > TOLERANCE`, which no NaN is.
    return None if apart <= TOLERANCE else f"gives logits that are {apart:.2g} away from the model's own"
