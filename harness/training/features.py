"""A frozen backbone's features, computed once and kept: a head-only study trains on them in seconds a trial.

Of every image there is a version as it is and a number of augmented views, drawn from seeds of their own, so that all
trials of all studies share them. The features of a version lie in the image cache's folder, a file for as many images
as an evaluation takes at once, named by all that decides them. A process that is killed leaves whole files behind, and
the next one goes on after them; a damaged file is named and made again.
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
from harness.base.errors import InputError
from harness.base.files import Damaged
from harness.base.seeds import derive_seed
from harness.config.contracts import Backbone
from harness.config.train import AugmentConfig, TrainConfig
from harness.data.augment import augment, normalise
from harness.data.splits import ImageSet, load_split
from harness.training.checkpoint import SUFFIX, fingerprint, read_tensors, write_tensors
from harness.training.loop import EVALUATION_BATCH, outputs_of
from harness.training.step import Runtime, seeded

FORMAT = 2  # raise it whenever the same images would give other features
SAY_EVERY_SECONDS = 30.0
WHOLE = "leave feature_views null, and every trial passes the whole model"
FIXED = (nn.AdaptiveAvgPool2d, nn.Flatten)  # layers that learn nothing and draw nothing


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """`features` float32 [N, 1 + K, ...] of images as they are and of their K views; `labels` int64 [N]."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: Tensor, config: TrainConfig, runtime: Runtime, generator: torch.Generator) -> Tensor:
        """Of every chosen image one of its versions, each as likely: [B, ...] on the device."""
        version = torch.randint(self.features.shape[1], (len(chosen),), generator=generator)
        return self.features[chosen, version].to(runtime.device)

    def parts(self, size: int, runtime: Runtime) -> Iterator[Tensor]:
        """Of all images the version as it is, `size` at a time."""
        for part in self.features[:, 0].split(size):
            yield part.to(runtime.device)


def split(model: nn.Module, head: str) -> tuple[nn.Module, nn.Sequential]:
    """The model without the submodule `head`, and that head; modules are shared, the model stays as it is.

    The head's first layers that only pool and flatten count to the body: an image has fewer numbers after them.
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
    """Another module with the same submodules and parameters, whose submodules can be exchanged."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other


class FrozenBody:
    """The part of a model that does not train, and the folder where the features that it makes are kept.

    Raises InputError when the model is more than this body and its head one after the other.
    """

    def __init__(self, model: nn.Module, head: str, image_size: int, runtime: Runtime, folder: Path) -> None:
        if head not in dict(model.named_modules()):
            raise InputError(f"The last depth, {head}, is no module: its features cannot be kept; {WHOLE}.")
        self.head = head
        self._body, rest = split(model.eval(), head)
        self._size, self._runtime, self._folder = image_size, runtime, folder / "features"
        self._weights = {name: each for name, each in model.state_dict().items() if not name.startswith(f"{head}.")}
        pixels = torch.linspace(-2, 2, 2 * 3 * image_size**2, device=runtime.device).view(2, 3, image_size, image_size)
        whole, features = (outputs_of(each, pixels.split, runtime) for each in (model, self._body))
        if not torch.allclose(whole, outputs_of(rest, features.split, runtime), rtol=1e-2, atol=1e-2):
            raise InputError(f"The model is not its body and then {head}: its features cannot be kept; {WHOLE}.")
        self._identity = {
            "format": FORMAT,
            "weights": fingerprint(self._body.state_dict()),
            "layers": hashlib.sha256(repr(self._body).encode()).hexdigest(),
            "runtime": runtime.to_dict(),
            "versions": {name: versions()[name] for name in ("torch", "torchvision")},
            "batch": EVALUATION_BATCH,
        }

    def give_to(self, model: nn.Module) -> None:
        """Make this the body of another model of the same backbone; the tensors are shared, for none of them changes.

        Raises ValueError when its body has other tensors.
        """
        told = model.load_state_dict(self._weights, strict=False, assign=True)
        missing = [name for name in told.missing_keys if not name.startswith(f"{self.head}.")]
        if missing or told.unexpected_keys:
            raise ValueError(f"The fields of the head change the backbone: {[*missing, *told.unexpected_keys]}.")

    def as_they_are(self, images: ImageSet) -> FeatureSet:
        """The features of evaluated images."""
        return FeatureSet(features=self._kept([(images, None)]), labels=images.labels)

    def with_views(self, plain: ImageSet, stored: ImageSet, config: AugmentConfig, views: int) -> FeatureSet:
        """The features of training images: `plain` as they are, and `views` augmented from the `stored` ones."""
        drawn = [(stored, View(config=config, size=self._size, number=number)) for number in range(views)]
        return FeatureSet(features=self._kept([(plain, None), *drawn]), labels=plain.labels)

    def _kept(self, versions: Sequence[tuple[ImageSet, View | None]]) -> Tensor:
        """float32 [N, versions, ...]: read where there are files, else made and written. Raises Halt without room."""
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
        return torch.cat(found).unflatten(0, (len(versions), -1)).transpose(0, 1).contiguous().to(self._runtime.device)

    def _name(self, images: ImageSet, view: View | None) -> str:
        """Names all that decides the features of a version."""
        assert images.key, "features are kept of single splits"
        described = {**self._identity, "images": images.key, "view": None if view is None else asdict(view)}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]

    def _made(self, images: ImageSet, view: View | None, first: int) -> Tensor:
        """The features of a version of the images from the `first` on, as many as a file holds: float32 [B, ...]."""
        pixels = images.images[first : first + EVALUATION_BATCH].to(self._runtime.device)
        batch = normalise(pixels) if view is None else view.of(pixels, first)
        return outputs_of(self._body, batch.split, self._runtime).cpu()


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented view of every image of a split."""

    config: AugmentConfig
    size: int  # pixels
    number: int

    def of(self, stored: Tensor, first: int) -> Tensor:
        """The view of the images from the `first` on: uint8 [B, S, S, 3] to float32 [B, 3, size, size]."""
        generator = torch.Generator().manual_seed(derive_seed("view", self.number, first))
        return augment(stored, self.config, self.size, generator)


def _length(images: ImageSet, first: int) -> int:
    return min(EVALUATION_BATCH, len(images) - first)


def _read(path: Path, place: Mapping[str, Any]) -> Tensor | None:
    """The features of a file, None when it is not there, damaged or of another place; then it is named on stderr."""
    if not path.exists():
        return None
    try:
        tensors, record = read_tensors(path)
        if record != place:
            raise Damaged(f"{path} belongs to other images")
        return tensors["features"]
    except Damaged as error:
        print(f"{error}; these features are computed again.", file=sys.stderr)
        return None


class _Work:
    """Says on stderr what is being computed, and how long it will take."""

    def __init__(self, images: int) -> None:
        self._images, self._did = images, 0
        self._began = self._said = time.monotonic()
        if images:
            text = f"Computing the frozen backbone's features of {images:,} images and views, once; they are kept."
            print(text, file=sys.stderr, flush=True)

    def done(self, images: int) -> None:
        """So many more; says so after the first ones and then now and then."""
        first, self._did = not self._did, self._did + images
        now, left = time.monotonic(), self._images - self._did
        seconds = left * (now - self._began) / self._did
        if seconds > SAY_EVERY_SECONDS and (first or now - self._said > SAY_EVERY_SECONDS):
            self._said = now
            text = f"Features: {self._did:,} of {self._images:,}, about {seconds / 60:.1f} min left."
            print(text, file=sys.stderr, flush=True)


def keep_features(config: TrainConfig, runtime: Runtime, with_validation: bool) -> None:
    """Compute the features that a head-only study needs before the test set is opened, unless they are kept already.

    `with_validation`: the final run trains on validation images, too.
    """
    if config.feature_views is None:
        return
    features_to_train_on(config, runtime, "train")
    if with_validation:
        features_to_train_on(config, runtime, "val")
    else:
        frozen_body(config, runtime).as_they_are(load_split(config.data, "val", config.data.image_size))


def frozen_body(config: TrainConfig, runtime: Runtime) -> FrozenBody:
    """The configuration's backbone without its head. What is not pretrained is drawn alike in every trial."""
    # The head's fields change from trial to trial; without them, all trials have one and the same body.
    without = {"hidden": (), "dropout": 0.0}
    known = {field.name for field in fields(config.backbone)}  # type: ignore[arg-type]
    backbone: Any = config.backbone
    backbone = replace(backbone, **{name: value for name, value in without.items() if name in known})
    data = config.data
    return _frozen_body(backbone, len(data.classes()), data.image_size, runtime, Path(data.cache))


@lru_cache(maxsize=2)
def _frozen_body(backbone: Backbone, classes: int, image_size: int, runtime: Runtime, folder: Path) -> FrozenBody:
    with seeded(derive_seed("frozen body"), runtime.device):
        model = runtime.place(backbone.build(classes, image_size))
    return FrozenBody(model, backbone.depths("block")[-1].rstrip("."), image_size, runtime, folder)


def features_to_train_on(config: TrainConfig, runtime: Runtime, split: Literal["train", "val"]) -> FeatureSet:
    """The features of a split, as it is and in the configuration's views."""
    data = config.data
    plain, stored = (load_split(data, split, size) for size in (data.image_size, data.stored_size))
    return frozen_body(config, runtime).with_views(plain, stored, config.augment, config.feature_views or 0)
