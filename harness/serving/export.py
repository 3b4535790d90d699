"""Export the final model to formats that do not need this project: a torch.export program, and ONNX.

Both take standardised images, float32 [B, 3, S, S] with any B, and return logits, float32 [B, classes]; both are
compared with the original model before they are saved.
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

WEIGHTS = "weights.json"  # the archive's entry with the fingerprint of its weights
TOLERANCE = 1e-4  # of a logit
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 3)  # a program with a fixed batch size fails with one of them
EXAMPLE_BATCH = 2  # torch.export treats a size of 1 as a constant


def weights_of(saved: SavedModel) -> str:
    """Return the sha256 of the weights, as in the final result's record."""
    from harness.training.checkpoint import fingerprint

    return fingerprint(saved.trained.state_dict())


def logits_of(saved: SavedModel, images: Tensor) -> NDArray[numpy.float32]:
    """Return the model's logits, float32 [B, classes], for standardised images, float32 [B, 3, S, S]."""
    import torch

    with torch.inference_mode():
        return saved.model(images).numpy()


def write_program(saved: SavedModel, path: Path) -> None:
    """Write the model as a torch.export program to `path`, unless it exists with the same weights.

    It holds no code to execute: graph, weights and shapes are JSON and plain bytes, and in place of the example input,
    which torch pickles, there is a 0. Raises InputError if the model cannot be exported or the program gives other
    logits, Halt if the disk is full.
    """
    import torch

    weights = weights_of(saved)
    if program_weights(path) == weights:
        return
    program = _program(saved)
    program.example_inputs = ((0,), {})  # an archive without any does not pass MLflow's check for pickles
    written = io.BytesIO()  # not the file itself: torch's error for a full disk does not name the disk
    torch.export.save(program, written, extra_files={WEIGHTS: json.dumps(weights)})
    loaded = torch.export.load(written).module()
    _check(f"The exported program {path}", saved, lambda images: loaded(images).detach().numpy())
    replace_file(path, written.getvalue())


def program_weights(path: Path) -> str | None:
    """Return the fingerprint of a program's weights; None if there is no program, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
            entry = next((name for name in archive.namelist() if name.endswith(WEIGHTS)), None)
            return None if entry is None else json.loads(archive.read(entry))
    except (OSError, zipfile.BadZipFile, ValueError):
        return None


def export_onnx(found: Found, url: str, path: Path) -> None:
    """Write the model of a study's final run as ONNX to `path`. Raises InputError for user errors."""
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
        raise InputError(f"{error} Or give another --onnx.") from error


def check_packages() -> None:
    """Raise InputError unless ONNX's packages are installed."""
    absent = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f'ONNX needs {" and ".join(absent)}; install with pip install -e ".[onnx]".')


def write_onnx(saved: SavedModel, path: Path) -> None:
    """Write the model as one ONNX file with input `images`, output `logits`, and classes and preprocessing as metadata.

    The file is written atomically, after a check. Raises InputError if the model cannot be exported or onnxruntime
    gives other logits, Halt if the file cannot be written.
    """
    import onnxruntime

    with replacing(path) as file:  # first, because exporting takes a minute
        file.write(_onnx(saved))
        file.flush()
        session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
        _check(f"The ONNX file {path}", saved, lambda images: session.run(["logits"], {"images": images.numpy()})[0])


def preprocessing_of(saved: SavedModel) -> dict[str, str]:
    """Return the ONNX file's metadata: how to use the network, each entry as JSON."""
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
    except Exception as error:  # the exporter runs the backbone's code, which may raise any error
        raise InputError(f"torch cannot export this model ({first_line(error)}).") from error


def _onnx(saved: SavedModel) -> bytes:
    import torch

    program, batch = _program(saved), ({0: "batch"},)  # torch's own name would be something like s77
    try:
        made: Any = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], dynamic_shapes=batch, verbose=False
        )
    except Exception as error:  # ONNX may lack an operator of the backbone
        raise InputError(f"torch cannot export this model to ONNX ({first_line(error)}).") from error
    made.model.metadata_props.update(preprocessing_of(saved))
    return bytes(made.model_proto.SerializeToString())


def _check(what: str, saved: SavedModel, logits: Callable[[Tensor], NDArray[Any]]) -> None:
    """Raise InputError if a program's logits differ from the model's.

    They are compared on seeded standard normal pixels, in several batch sizes.
    """
    import torch

    generator, size = torch.Generator().manual_seed(0), saved.image_size
    for count in BATCHES:
        images = torch.randn(count, 3, size, size, generator=generator)
        if (wrong := disagreement(logits(images), logits_of(saved, images))) is not None:
            raise InputError(f"{what} {wrong}, and is not saved; use model.safetensors instead.")


def disagreement(found: NDArray[Any], wanted: NDArray[Any]) -> str | None:
    """Return how logits differ from the model's, as a clause; None if within the tolerance."""
    import numpy

    if found.shape != wanted.shape:
        return f"gives logits of shape {list(found.shape)} instead of {list(wanted.shape)}"
    apart = float(numpy.abs(found - wanted).max())
    # Not `apart > TOLERANCE`, which is False for NaN.
    return None if apart <= TOLERANCE else f"gives logits that differ by {apart:.2g} from the model's"
