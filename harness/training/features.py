"""A frozen backbone's features, computed once and cached: a head-only study trains on them in seconds per trial.

Every image has a plain version and a number of augmented views, drawn from their own seeds, so that all
trials of all studies share them. The features of a version lie in the image cache's folder, one file per evaluation
batch, named by a hash of all that affects them. A killed process leaves complete files behind, and the next one
continues after them; a damaged file is reported and recomputed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.base.environment import versions
from harness.base.errors import InputError, first_line
from harness.base.files import Damaged
from harness.base.seeds import derive_seed
from harness.config.contracts import Backbone, Preprocessing, name_of, prefixes
from harness.config.train import AugmentConfig, TrainConfig
from harness.data.augment import IMAGENET, augment, normalise
from harness.data.splits import ImageSet, classes_of, fits, free_bytes, load_split
from harness.models.module import code_of
from harness.training.checkpoint import SUFFIX, fingerprint, read_tensors, write_tensors
from harness.training.loop import EVALUATION_BATCH, outputs_of
from harness.training.step import Runtime, is_device_failure, is_out_of_memory, seeded

FORMAT = 2  # increment when the same images give other features
SAY_EVERY_SECONDS = 30.0
WHOLE = "leave feature_views null, so that every trial runs the whole model"
FIXED = (nn.AdaptiveAvgPool2d, nn.Flatten)  # layers without parameters and randomness


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """`features` float32 [N, 1 + K, ...] of plain images and of their K views; `labels` int64 [N]."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.features.device

    def expect(self, chosen: Tensor) -> None:
        """Do nothing: features are in memory."""

    def batch(self, chosen: Tensor, config: TrainConfig, runtime: Runtime, generator: torch.Generator) -> Tensor:
        """Return a uniformly random version of every chosen image: [B, ...] on the device."""
        version = torch.randint(self.features.shape[1], (len(chosen),), generator=generator)
        version = version.to(self.device, non_blocking=self.device.type == "cuda")
        return self.features[chosen, version].to(runtime.device)

    def parts(self, size: int, runtime: Runtime) -> Iterator[Tensor]:
        """Yield all images' plain versions, `size` at a time."""
        for part in self.features[:, 0].split(size):
            yield part.to(runtime.device, copy=True)  # a layer of the head may work in place


def split(model: nn.Module, head: str) -> tuple[nn.Module, nn.Sequential]:
    """Split a model into its body and the submodule `head`; modules are shared, the model does not change.

    The head's leading pooling and flattening layers belong to the body: they make features smaller.
    """
    path, last = head.rpartition(".")[0], model.get_submodule(head)
    layers = list(last.children()) if isinstance(last, nn.Sequential) else [last]
    leading = next((place for place, layer in enumerate(layers) if not isinstance(layer, FIXED)), len(layers))
    body = owner = _shallow(model)
    for name in filter(None, path.split(".")):
        owner._modules[name] = inner = _shallow(owner.get_submodule(name))
        owner = inner
    owner._modules[head.rpartition(".")[2]] = nn.Sequential(*layers[:leading])
    return body, nn.Sequential(*layers[leading:])


def _shallow(module: nn.Module) -> nn.Module:
    """Return a module with the same submodules and parameters, whose submodules can be replaced."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other


class FrozenBody:
    """The part of a model that does not train, and the folder that caches its features.

    `code` is a digest of the model's code, if it is not a library's. Raises InputError if the model is not this body
    followed by its head.
    """

    def __init__(
        self, model: nn.Module, head: str, image_size: int, runtime: Runtime, folder: Path, code: str = ""
    ) -> None:
        if head not in dict(model.named_modules()):
            raise InputError(f"The last depth, {head}, is not a module: features cannot be cached; {WHOLE}.")
        self.head = head
        self._body, rest = split(model.eval(), head)
        self._size, self._runtime, self._folder = image_size, runtime, folder / "features"
        self._weights = {name: each for name, each in model.state_dict().items() if not name.startswith(f"{head}.")}
        pixels = torch.linspace(-2, 2, 2 * 3 * image_size**2, device=runtime.device).view(2, 3, image_size, image_size)
        whole = outputs_of(model, pixels.split, runtime)
        try:
            features = outputs_of(self._body, pixels.split, runtime)
            is_split = torch.allclose(whole, outputs_of(rest, features.split, runtime), rtol=1e-2, atol=1e-2)
        except Exception as error:  # its forward uses parts of the head
            if is_out_of_memory(error) or is_device_failure(error):
                raise
            raise InputError(f"The model is not its body and then {head} ({first_line(error)}); {WHOLE}.") from error
        if not is_split:
            raise InputError(f"The model is not its body and then {head}: features cannot be cached; {WHOLE}.")
        self._identity = {
            "format": FORMAT,
            "weights": fingerprint(self._body.state_dict()),
            "layers": hashlib.sha256(repr(self._body).encode()).hexdigest(),
            "code": code,
            "runtime": runtime.to_dict(),
            "versions": {name: versions()[name] for name in ("torch", "torchvision")},
            "batch": EVALUATION_BATCH,
        }

    def give_to(self, model: nn.Module) -> None:
        """Make this the body of another model of the same backbone; the tensors are shared, as none of them changes.

        Raises ValueError if its body has other tensors.
        """
        keys = model.load_state_dict(self._weights, strict=False, assign=True)
        missing = [name for name in keys.missing_keys if not name.startswith(f"{self.head}.")]
        if missing or keys.unexpected_keys:
            raise ValueError(f"The fields of the head change the backbone: {[*missing, *keys.unexpected_keys]}.")

    def as_they_are(self, images: ImageSet) -> FeatureSet:
        """Return features of plain images."""
        features = self._kept([(images, None)])
        return FeatureSet(features=features, labels=images.labels.to(features.device))

    def with_views(self, plain: ImageSet, stored: ImageSet, config: AugmentConfig, views: int) -> FeatureSet:
        """Return features of training images: the `plain` ones, and `views` augmented from `stored` ones."""
        # What does not change a view must not change its name.
        config = replace(config, mixup=0.0, cutmix=0.0, early_size=None, tail=AugmentConfig.tail)
        drawn = [(stored, View(config=config, size=self._size, number=number)) for number in range(views)]
        features = self._kept([(plain, None), *drawn])
        return FeatureSet(features=features, labels=plain.labels.to(features.device))

    def _kept(self, versions: Sequence[tuple[ImageSet, View | None]]) -> Tensor:
        """Read features float32 [N, versions, ...], or compute and write them. Raises Halt if the disk is full."""
        parts = [
            (self._folder / self._name(images, view) / f"{first:06d}{SUFFIX}", images, view, first)
            for images, view in versions
            for first in range(0, len(images), EVALUATION_BATCH)
        ]
        work = _Work(sum(_length(images, first) for path, images, _, first in parts if not path.exists()))
        found = []
        for path, images, view, first in parts:
            place = {"of": path.parent.name, "first": first, "images": _length(images, first)}
            features = _read(path, place)
            if features is None:
                features = self._made(images, view, first)
                write_tensors(path, {"features": features}, place)
                work.done(len(features))
            found.append(features)
        features = torch.cat(found).unflatten(0, (len(versions), -1)).transpose(0, 1).contiguous()
        device = self._runtime.device
        has_room = device.type != "cuda" or fits(features.nbytes, free_bytes(device))
        return features.to(device) if has_room else features

    def _name(self, images: ImageSet, view: View | None) -> str:
        """Hash all that affects the features of a version."""
        assert images.key, "features are cached per split"
        described = {**self._identity, "images": images.key, "view": None if view is None else asdict(view)}
        if images.preprocessing != IMAGENET:
            described["preprocessing"] = asdict(images.preprocessing)
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]

    def _made(self, images: ImageSet, view: View | None, first: int) -> Tensor:
        """Compute one file's features of a version of the images from `first` on: float32 [B, ...]."""
        pixels = images.images[first : first + EVALUATION_BATCH].to(self._runtime.device)
        preprocessing = images.preprocessing
        batch = normalise(pixels, preprocessing) if view is None else view.of(pixels, first, preprocessing)
        return outputs_of(self._body, batch.split, self._runtime).cpu()


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented view of every image of a split."""

    config: AugmentConfig
    size: int  # pixels
    number: int

    def of(self, stored: Tensor, first: int, preprocessing: Preprocessing) -> Tensor:
        """Return the view of images from `first` on: uint8 [B, S, S, 3] to float32 [B, 3, size, size]."""
        generator = torch.Generator().manual_seed(derive_seed("view", self.number, first))
        return augment(stored, self.config, self.size, generator, preprocessing)


def _length(images: ImageSet, first: int) -> int:
    return min(EVALUATION_BATCH, len(images) - first)


def _read(path: Path, place: Mapping[str, Any]) -> Tensor | None:
    """Read a file's features; None if it is missing, or damaged or of other images, as reported on stderr."""
    if not path.exists():
        return None
    try:
        tensors, record = read_tensors(path)
        if record != place:
            raise Damaged(f"{path} belongs to other images")
        return tensors["features"]
    except Damaged as error:
        print(f"{error}; recomputing these features.", file=sys.stderr)
        return None


class _Work:
    """Report on stderr what is computed, and how long it will take."""

    def __init__(self, images: int) -> None:
        self._images, self._did = images, 0
        self._began = self._said = time.monotonic()
        if images:
            text = f"Computing the frozen backbone's features of {images:,} images and views, once for all trials."
            print(text, file=sys.stderr, flush=True)

    def done(self, images: int) -> None:
        """Count more images; report after the first and then periodically."""
        first, self._did = not self._did, self._did + images
        now, left = time.monotonic(), self._images - self._did
        seconds = left * (now - self._began) / self._did
        if seconds > SAY_EVERY_SECONDS and (first or now - self._said > SAY_EVERY_SECONDS):
            self._said = now
            text = f"Features: {self._did:,} of {self._images:,}, about {seconds / 60:.1f} min left."
            print(text, file=sys.stderr, flush=True)


def keep_features(config: TrainConfig, runtime: Runtime, with_validation: bool) -> None:
    """Compute the features that a head-only study needs before the test set is opened, unless they are cached.

    `with_validation`: the final run trains on validation images, too.
    """
    if config.feature_views is None:
        return
    _frozen_body.cache_clear()  # in a program's second study, a file of weights may have changed
    features_to_train_on(config, runtime, "train")
    if with_validation:
        features_to_train_on(config, runtime, "val")
    else:
        val = load_split(config.data, config.backbone.preprocessing(), "val")
        frozen_body(config, runtime).as_they_are(val)


def frozen_body(config: TrainConfig, runtime: Runtime) -> FrozenBody:
    """Return the backbone without its head. Weights that are not pretrained are the same in every trial."""
    # The head's fields change from trial to trial; without them, all trials share one body.
    without = {"hidden": (), "dropout": 0.0}
    known = {field.name for field in fields(config.backbone)}  # type: ignore[arg-type]
    backbone: Any = config.backbone
    backbone = replace(backbone, **{name: value for name, value in without.items() if name in known})
    data = config.data
    return _frozen_body(backbone, len(classes_of(data)), data.image_size, runtime, Path(data.cache))


@lru_cache(maxsize=2)
def _frozen_body(backbone: Backbone, classes: int, image_size: int, runtime: Runtime, folder: Path) -> FrozenBody:
    with seeded(derive_seed("frozen body"), runtime.device):
        model = runtime.place(backbone.build(classes, image_size))
    last = prefixes(backbone.depths("block")[-1])
    if len(last) > 1:
        raise InputError(f"The last depth is {' and '.join(last)}, not one module: features cannot be cached; {WHOLE}.")
    return FrozenBody(model, name_of(last), image_size, runtime, folder, code_of(backbone))


def features_to_train_on(config: TrainConfig, runtime: Runtime, split: Literal["train", "val"]) -> FeatureSet:
    """Return features of a split, plain and in the configuration's views."""
    data, preprocessing = config.data, config.backbone.preprocessing()
    plain, stored = (load_split(data, preprocessing, split, margin=margin) for margin in (False, True))
    return frozen_body(config, runtime).with_views(plain, stored, config.augment, config.feature_views or 0)
