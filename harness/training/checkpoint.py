"""Checkpoints: everything that a training needs to resume to the same bits, in one safetensors file.

The file holds model and optimizer state, the generators' states and the epoch's running sums as tensors; the finished
epochs and the position in the current one as JSON in the file's metadata, with a sha256 of all of it. The schedule is
a function of the step and needs no state. Files are written under another name, synchronised and renamed, so a
write is atomic; nothing in them can execute.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.base.files import METADATA, Damaged, remove_abandoned, replace_file
from harness.base.processes import is_abandoned
from harness.config.events import EpochResult
from harness.config.space import leaves
from harness.config.train import is_default
from harness.training.loop import Training

SUFFIX = ".safetensors"


def fingerprint(tensors: Mapping[str, Tensor], record: str = "") -> str:
    """The sha256 of named tensors (names, types, shapes, bytes) and of a text.

    `harness.base.files.check_tensors` does the same for a file.
    """
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # torch calls any stride of a single number contiguous, and then cannot view its bytes.
        flat = tensor.reshape(-1).as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], check: Callable[[], object] | None = None
) -> None:
    """Write tensors and a JSON record to `path` atomically; `check` as in `harness.base.files.replacing`.

    Raises Halt if the disk is full.
    """
    text = json.dumps(record)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    for name, tensor in plain.items():
        if places[tensor.untyped_storage().data_ptr()] > 1:  # tied weights, which safetensors refuses
            plain[name] = tensor.clone()
    # One entry: safetensors writes several in any order, and equal trainings should give equal files.
    checked = json.dumps({"record": text, "sha256": fingerprint(plain, text)})
    replace_file(path, save(plain, {METADATA: checked}), check)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors (on the CPU) and record. Raises Damaged unless they are as written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if fingerprint(tensors, metadata["record"]) != metadata["sha256"]:
            raise Damaged(f"{path} is damaged (its checksum is wrong)")
        return tensors, json.loads(metadata["record"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:  # OSError: a folder of that name
        raise Damaged(f"{path} is damaged ({error})") from error


def identity_of(study_uid: str, key: str, seed: int, config: Any) -> dict[str, Any]:
    """Return a checkpoint's identity: the study, the run, its seed and configuration."""
    described = {path: repr(value) for path, value in leaves(config, identity_only=True)}
    return {"study": study_uid, "key": key, "seed": seed, "configuration": described}


class Checkpoint:
    """The checkpoint file of one training: written periodically while it runs, read on resume.

    A file with another `identity` is not used. `check` raises LeaseLost if another process has taken over the training:
    its file must not change.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        training: Training,
        environment: Mapping[str, str],
        check: Callable[[], object] | None = None,
    ) -> None:
        self.path = path
        self._check = check
        self.environments = [dict(environment)]  # of all processes so far, in order
        self.seconds_before = 0.0  # spent by earlier processes on this training
        self._began = time.monotonic()
        self._identity = dict(identity)
        self.training = training
        self._written = self._began

    def _is_of_this(self, identity: Any) -> bool:
        """Return whether an identity is that of this training; fields that came later have their defaults."""
        mine = dict(self._identity)
        if isinstance(identity, dict) and "configuration" in mine.keys() & identity.keys():
            here, there = mine["configuration"], identity["configuration"]
            later = {path for path in here if path not in there and is_default(self.training.config, path)}
            mine["configuration"] = {path: value for path, value in here.items() if path not in later}
        return bool(mine == identity)

    def restore(self) -> bool:
        """Restore model, optimizer and progress from the file; return False if there is none to use."""
        if not self.path.exists():
            return False
        try:
            tensors, record = read_tensors(self.path)
        except Damaged as error:
            print(f"{error}; it is ignored, and the training starts again.", file=sys.stderr)
            return False
        if not self._is_of_this(record.get("identity")):
            print(f"{self.path} belongs to another training; it is ignored.", file=sys.stderr)
            return False
        training, progress = self.training, self.training.progress
        training.model.load_state_dict(_part(tensors, "model"))
        if optimizer := _part(tensors, "optimizer"):  # a finished training keeps none
            _load_optimizer(training.optimizer, optimizer)
        progress.epochs[:] = [EpochResult.from_dict(each) for each in record["epochs"]]
        progress.step, progress.steps = record["step"], record["steps"]
        progress.micro_batch, progress.seconds = record["micro_batch"], record["seconds"]
        progress.random_states = _part(tensors, "random")
        if training.average:
            average = training.average.tensors
            for name, kept in _part(tensors, "average").items():
                if name in average:  # earlier versions averaged masks of infinities, too
                    average[name].copy_(kept)
        self.seconds_before = record["training_seconds"]
        progress.trace = tensors["trace"].to(training.runtime.device)
        before, here = record["environments"], self.environments
        self.environments = before
        if progress.epoch <= training.config.epochs and before[-1] != here[0]:
            differing = differences(before[-1], here[0])
            print(f"{self.path.stem} resumes elsewhere ({differing}): its last bits may differ.", file=sys.stderr)
            self.environments = [*before, *here]
        return True

    def seconds(self) -> float:
        """Return the training's time so far in all processes."""
        return self.seconds_before + time.monotonic() - self._began

    @contextlib.contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save when the process is asked to stop."""
        try:
            yield
        except (KeyboardInterrupt, GeneratorExit):
            # A database that does not answer must not block it; a lost lease costs only time.
            self.save(checked=False)
            raise

    def after_batch(self) -> None:
        """Save if the last save (or the start) is `checkpoint_seconds` ago."""
        if time.monotonic() - self._written >= self.training.config.checkpoint_seconds:
            self.save()

    def save(self, checked: bool = True) -> None:
        """Save, unless the training is inside a batch or has not begun. Raises Halt if the disk is full."""
        training, progress = self.training, self.training.progress
        if not progress.whole or (progress.step == 0 and not progress.epochs):
            return
        finished = progress.epoch > training.config.epochs
        tensors = {
            **_named("model", training.model.state_dict()),
            **({} if finished else _named("optimizer", _optimizer_tensors(training.optimizer))),
            **(_named("average", training.average.tensors) if training.average and not finished else {}),
            **_named("random", progress.random_states),
            "trace": progress.trace,
        }
        record = {
            "identity": self._identity,
            "epochs": [result.to_dict() for result in progress.epochs],
            "step": progress.step,
            "steps": progress.steps,
            "micro_batch": progress.micro_batch,
            "seconds": progress.elapsed() if progress.step else 0.0,
            "training_seconds": self.seconds(),
            "environments": self.environments,
        }
        write_tensors(self.path, tensors, record, self._check if checked else None)
        self._written = time.monotonic()


def remove(path: Path) -> None:
    """Remove a checkpoint, temporary files of killed processes, and the folder if it is empty."""
    path.unlink(missing_ok=True)
    remove_abandoned(path)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def stale(folder: Path, wanted: Collection[str], study: str) -> list[Path]:
    """Return the files in a checkpoint folder that no process writes and none of the `wanted` keys needs.

    Without those of another study than that of the uid: studies of one name on several servers share a folder.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    unused = [path for path in files if (is_abandoned(path) if path.suffix == ".partial" else path.stem not in wanted)]
    return [path for path in unused if study_of(path) in (None, study)]


def study_of(path: Path) -> str | None:
    """Return the uid of a checkpoint's study; None if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(json.loads((file.metadata() or {})[METADATA])["record"])
        return str(record["identity"]["study"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Describe the entries of two environments that differ; empty if none does."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return "; ".join(f"{key} was {one.get(key)}, is {other.get(key)}" for key in keys)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return every parameter's state as NUMBER/NAME, numbered as in `optimizer.state_dict()`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}/{name}": value for number, values in state.items() for name, value in values.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state in the parameters' memory layout: fused steps go by storage order, not by index."""
    parameters = [(each, group) for group in optimizer.param_groups for each in group["params"]]
    for key, value in tensors.items():
        number, name = key.split("/")
        parameter, group = parameters[int(number)]
        on_device = group.get("fused") or group.get("capturable") or isinstance(optimizer, torch.optim.ASGD)
        if name in ("step", "mu_product") and not on_device:
            kept = value  # read in every step, which would wait for the device
        elif value.shape == parameter.shape:
            kept = torch.empty_like(parameter, requires_grad=False, dtype=value.dtype).copy_(value)
        else:
            kept = value.to(parameter.device)
        optimizer.state[parameter][name] = kept
