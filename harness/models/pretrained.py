"""Pretrained weights: a published file of torch's hub, or a file of the user."""

from __future__ import annotations

import difflib
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from harness.base.errors import InputError, first_line
from harness.base.files import file_sha256
from harness.config.train import require

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchvision.models import WeightsEnum

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
SCRATCH = "train from scratch with --set backbone.pretrained=false"
COMPUTED = ("relative_position_index", "num_batches_tracked")
KEPT = 2  # files whose weights stay in memory
WRAPPERS = ("state_dict", "model")  # keys under which training scripts save the weights


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a remedy for a model's name that is unknown."""
    near = difflib.get_close_matches(name.lower(), known, 3)
    return f"nearest: {', '.join(near)}" if near else "find one with `python -m harness models PATTERN`"


def is_file(weights: str | None) -> TypeGuard[str]:
    return weights is not None and weights.endswith(SUFFIXES)


def check_file(weights: str | None) -> None:
    """Raise InputError unless the weights are a file, or None."""
    fits, endings = weights is None or is_file(weights), ", ".join(SUFFIXES)
    require(fits, f"backbone.weights must be null or a file ({endings}), not {weights!r}.")


def fingerprint(file: str) -> str:
    """Return 16 hexadecimal digits of a file's sha256. Raises InputError if it cannot be read."""
    try:
        return file_sha256(file)[:16]
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: OSError) -> InputError:
    place = "" if os.path.isabs(file) else f" in {os.getcwd()}"
    why = f"backbone.weights {file} cannot be read{place} ({error.strerror or error})"
    return InputError(f"{why}; give a file, or {SCRATCH}.")


def path(weights: WeightsEnum) -> Path:
    """Return where torch keeps published weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name


def published(weights: WeightsEnum) -> dict[str, Tensor]:
    """Return published weights from torch's hub cache, downloaded if missing. Raises InputError if that fails.

    They stay in memory; see `read`.
    """
    place = path(weights)
    if not os.path.isfile(place):
        return _downloaded(weights)
    return dict(_published(weights, _stamp(place)))


@lru_cache(KEPT)
def _published(weights: WeightsEnum, _stamp: tuple[int, ...]) -> dict[str, Tensor]:
    return _downloaded(weights)


def _downloaded(weights: WeightsEnum) -> dict[str, Tensor]:
    from urllib.error import URLError

    place = path(weights)
    # By default torchvision calls torch.load without weights_only, which can execute code.
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise InputError(
            f"The pretrained weights are missing and cannot be downloaded ({error}); save {weights.url} as {place}, "
            f"name a file with --set backbone.weights=FILE, or {SCRATCH}."
        ) from error
    # A damaged pickle can raise any exception.
    except Exception as error:
        raise InputError(f"The weights file {place} is damaged ({first_line(error)}); delete it.") from error
    return _tensors(state, f"The weights file {place}", "delete it")


def read(file: str) -> dict[str, Tensor]:
    """Read a state dictionary: safetensors, or saved by torch. Raises InputError if the file holds none.

    It is read once in a process, unless it changes: every trial begins with it. Do not change the tensors in place.
    """
    try:
        stamp = _stamp(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    return dict(_read(file, stamp))


def _stamp(file: str | Path) -> tuple[int, ...]:
    """Return numbers that change with a file."""
    stat = os.stat(file)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@lru_cache(KEPT)
def _read(file: str, _stamp: tuple[int, ...]) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    is_safe = file.endswith(".safetensors")
    try:
        state: Any = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(file, error) from error
    # A damaged file can raise any exception. torch's text would advise to run the code in it.
    except Exception as error:
        raise InputError(f"backbone.weights {file} is not a file of weights; save a model's state_dict().") from error
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    return _tensors(state, f"backbone.weights {file}", "save a model's state_dict()")


def unwrapped(state: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Remove the prefixes that all names share, until some are the `wanted` ones.

    DataParallel and AveragedModel put `module.` before them, torch.compile `_orig_mod.`, a LightningModule the name of
    its attribute.
    """
    found = {name: each for name, each in state.items() if name in wanted or name != "n_averaged"}  # of AveragedModel
    while not found.keys() & set(wanted):
        parts = [name.partition(".") for name in found]
        if len({first for first, _, _ in parts}) != 1 or not all(rest for _, _, rest in parts):
            break
        found = {rest: each for (_, _, rest), each in zip(parts, found.values(), strict=True)}
    return found


def _tensors(state: Any, source: str, remedy: str) -> dict[str, Tensor]:
    import torch

    if (
        not isinstance(state, Mapping)
        or not all(isinstance(name, str) and isinstance(each, torch.Tensor) for name, each in state.items())
        or not state
    ):
        raise InputError(f"{source} is not a dictionary of tensors; {remedy}.")
    return dict(state)


def load(model: nn.Module, state: Mapping[str, Tensor], head: str, source: str) -> None:
    """Load all weights but those of the linear layer `head`, which is replaced.

    Raises InputError naming the first tensor of `source` that is missing, unknown, or of another shape. Tables of
    positions and counters of batches may be missing.
    """
    wanted = {name: each for name, each in model.state_dict().items() if not name.startswith(f"{head}.")}
    given = {name: each for name, each in unwrapped(state, wanted).items() if not name.startswith(f"{head}.")}
    other = "it is of another model"
    for name, tensor in wanted.items():
        if name not in given and name.endswith(COMPUTED):
            continue
        if name not in given:
            raise InputError(f"{source} lacks the tensor {name}; {other}.")
        if given[name].shape != tensor.shape:
            found, needed = tuple(given[name].shape), tuple(tensor.shape)
            raise InputError(f"{source} has the tensor {name} of shape {found} instead of {needed}; {other}.")
    if extra := sorted(given.keys() - wanted.keys()):
        raise InputError(f"{source} has the tensor {extra[0]}, which the model lacks; {other}.")
    versioned = OrderedDict(given)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # MNASNet loads nothing without
    model.load_state_dict(versioned, strict=False)
