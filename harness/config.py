"""What a study is: frozen, keyword-only dataclasses that hold data and check themselves.

Fields marked `identity=False` say where something runs or lies, not what is computed; they may differ between the
start of a study and its resumption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from harness import space as spaces
from harness.contracts import Backbone, Dataset, PrunerLike, SamplerLike
from harness.errors import InputError

if TYPE_CHECKING:
    pass


def location(default: Any) -> Any:
    """A field that says where, not what: left out of a study's identity."""
    return field(default=default, metadata={"identity": False})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_count(path: str, value: int, most: int) -> None:
    require(1 <= value <= most, f"{path} must be at least 1 and at most {most:,}, not {value}.")


def check_sizes(image_size: int, stored_size: int, limit: int | None) -> None:
    require(image_size >= 1, f"data.image_size must be at least 1 pixel, not {image_size}.")
    require(stored_size <= 10_000, f"data.stored_size must be at most 10,000 pixels, not {stored_size}.")
    require(
        stored_size >= image_size,
        f"data.stored_size ({stored_size}) must not be smaller than data.image_size ({image_size}).",
    )
    require(limit is None or limit >= 1, f"data.limit must be at least 1, or null for all images, not {limit}.")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training image, drawn for each image anew. Ranges follow torchvision's transforms."""

    crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5  # probability
    rotation_degrees: float = 30.0  # drawn from -r to +r
    brightness: float = 0.03
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.03  # in turns of the colour circle

    def __post_init__(self) -> None:
        spaces.check_types(self, "augment.")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"augment.crop_scale must satisfy 0 < low <= high <= 1, not {self.crop_scale}.")
        low, high = self.crop_ratio
        fits = 0 < low <= high < math.inf
        require(fits, f"augment.crop_ratio must satisfy 0 < low <= high and be finite, not {self.crop_ratio}.")
        require(0 <= self.flip <= 1, f"augment.flip is a probability between 0 and 1, not {self.flip}.")
        require(0 <= self.rotation_degrees <= 180, "augment.rotation_degrees must lie between 0 and 180.")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name} must lie between 0 and 1.")
        require(0 <= self.hue <= 0.5, "augment.hue must lie between 0 and 0.5 (half a turn of the colour circle).")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and how the learning rate falls with depth (`harness.optim`)."""

    name: Literal["adamw", "adam"] = "adamw"
    base_lr: float
    depth_lr_mult: float  # a block's rate is base_lr * depth_lr_mult ** (its distance from the head)
    depth_by: Literal["block", "layer"] = "block"
    weight_decay: float = 0.02
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 1.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        spaces.check_types(self, "optim.")
        require(0 < self.base_lr < math.inf, f"optim.base_lr must be greater than 0 and finite, not {self.base_lr}.")
        require(0 <= self.depth_lr_mult <= 1, f"optim.depth_lr_mult must lie in 0..1, not {self.depth_lr_mult}.")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optim.{name} must be a finite number of at least 0, not {value}.")
        fits = self.clip_norm is None or 0 < self.clip_norm < math.inf
        require(fits, f"optim.clip_norm must be greater than 0 and finite, or null, not {self.clip_norm}.")
        # Adam adds the decay to the gradient and divides it by the gradient's size: not the decay that is asked for.
        require(
            self.name == "adamw" or self.weight_decay == 0,
            f"optim.name adam has no decoupled weight decay, and optim.weight_decay is or may become "
            f"{self.weight_decay:g}: set optim.weight_decay to 0, or optim.name to adamw.",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step runs. "auto" goes by a rule, "tune" by timing; decided once a study, and kept (`harness.auto`)."""

    device: str = location("auto")  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "tune", "fp32", "bf16"] = "auto"
    channels_last: Literal["auto", "tune", "on", "off"] = "auto"
    compile: Literal["auto", "tune", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        spaces.check_types(self, "engine.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One complete, runnable training job: the base that a study's space perturbs."""

    data: Dataset
    backbone: Backbone
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    batch_size: int = 34
    epochs: int = 15
    label_smoothing: float = 0.1
    feature_views: int | None = (
        None  # augmented views an image of which a frozen backbone's features are kept; None: none
    )
    checkpoint_seconds: float = location(60.0)  # time between two checkpoints of a training, at least

    def __post_init__(self) -> None:
        spaces.check_types(self)
        require(hasattr(self.data, "samples"), f"data must be a data set such as Garden(), not {self.data!r}.")
        require(hasattr(self.backbone, "build"), f"backbone must be a model such as MaxViTT(), not {self.backbone!r}.")
        for name, kind in (("augment", AugmentConfig), ("optim", OptimConfig), ("engine", EngineConfig)):
            held = getattr(self, name)
            require(isinstance(held, kind), f"{name} must be {kind.__name__}(...), not {held!r}.")
        require_count("batch_size", self.batch_size, 1_000_000)
        require_count("epochs", self.epochs, 1_000_000)
        warmup = self.optim.warmup_epochs
        require(
            warmup <= self.epochs,
            f"optim.warmup_epochs is or may become {warmup:g}, longer than the whole training, whose epochs are or may "
            f"become {self.epochs}; choose a shorter warm-up or more epochs.",
        )
        fits = 0 <= self.checkpoint_seconds < math.inf
        require(fits, f"checkpoint_seconds must be 0 or more, and finite, not {self.checkpoint_seconds}.")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, f"label_smoothing must lie in 0..1, 1 excluded, not {smoothing}.")
        if self.feature_views is not None:
            fits = 0 <= self.feature_views <= 1000
            require(fits, f"feature_views must lie in 0..1000, or be null, not {self.feature_views}.")
            require(
                self.optim.depth_lr_mult == 0,
                "feature_views keeps the features of a frozen backbone, and optim.depth_lr_mult is or may become "
                f"{self.optim.depth_lr_mult:g}: set it to 0 and take it out of the study's space, "
                "or leave feature_views null.",
            )


@dataclass(frozen=True, kw_only=True)
class FinalConfig:
    """The step after the search: the best configuration retrained, and the test set opened."""

    seeds: int = 3
    fit_on: Literal["train", "train+val"] = "train+val"
    rerank: int = 0  # so many of the best are retrained on fresh seeds before one is chosen; 0: the search chooses
    compare_base: bool = True  # train the base from the same seeds, too, and compare the two on the test set
    publish: bool = location(True)  # export the final model, and register it in MLflow

    def __post_init__(self) -> None:
        spaces.check_types(self, "final.")
        require_count("final.seeds", self.seeds, 1000)
        fits = self.rerank == 0 or 2 <= self.rerank <= 1000
        require(fits, f"final.rerank must be at least 2 and at most 1,000, or 0 for no second look, not {self.rerank}.")

    def trainings(self, trials: int) -> int:
        """How many trainings come after a search of so many trials, at most."""
        return self.seeds * (1 + self.compare_base + min(self.rerank, trials))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A search: a base configuration, the fields to vary, who chooses and who stops. The base is trial 0."""

    name: str
    train: TrainConfig
    space: spaces.Space
    sampler: SamplerLike
    pruner: PrunerLike
    trials: int = 50
    seed: int = 0
    final: FinalConfig = FinalConfig()

    def __post_init__(self) -> None:
        spaces.check_types(self)
        fits = self.name.replace("_", "").replace("-", "").isalnum()
        require(fits, f"A study's name has letters, digits, - and _ only, not {self.name!r}.")
        require(isinstance(self.train, TrainConfig), f"train must be TrainConfig(...), not {self.train!r}.")
        require(isinstance(self.final, FinalConfig), f"final must be FinalConfig(...), not {self.final!r}.")
        require(self.space != {}, "A study's space is empty; name at least one field to search.")
        require_count("trials", self.trials, spaces.MOST_TRIALS)
        spaces.check(self.space, self.train)
        require(
            hasattr(self.sampler, "check"), f'sampler must be tpe(), grid() or Sampler("NAME"), not {self.sampler!r}.'
        )
        require(hasattr(self.pruner, "build"), f'pruner must be asha() or Pruner("NAME"), not {self.pruner!r}.')
        for path, value in self.definition().items():
            require(
                _survives(value),
                f"{path} is {value!r}, which a study cannot keep and compare when it is resumed; use numbers, texts, "
                "true, false, null, or tuples of them.",
            )
        self.sampler.check(self)

    def image_sizes(self) -> set[int]:
        """The sides of the images that the model may be asked to take."""
        searched = self.space.get("data.image_size")
        return {self.train.data.image_size, *(spaces.extremes(searched) if searched is not None else ())}

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The training configuration of stored parameters."""
        return spaces.apply(self.space, self.train, params)

    def with_settings(self, settings: Sequence[str]) -> Study:
        """This study with each "PATH=VALUE" applied to its base configuration, or to `final.*` or `seed`."""
        return _in_any_order(self, settings, Study._with_setting)

    def _with_setting(self, setting: str) -> Study:
        path, equals, text = setting.partition("=")
        require(bool(equals), f"--set {spaces.shortened(setting)} has no value; write --set PATH=VALUE.")
        known = [*spaces.paths(self.train), *(f"final.{name}" for name in spaces.paths(self.final)), "seed"]
        try:
            if path not in known:
                raise spaces.unknown_field(path, known)
            part, inner = _owner(self, path)
            changed = spaces.replace(part, inner, spaces.parse(part, inner, text))
            if part is self:
                return changed
            return dataclasses.replace(self, **{"final" if part is self.final else "train": changed})
        except InputError as error:
            raise InputError(f"--set {spaces.shortened(setting)[1:-1]}: {error}") from error

    def with_definition(self, stored: Mapping[str, Any]) -> Study:
        """This study with the base configuration, the final step and the seed of a stored definition."""
        return _in_any_order(self, list(stored.items()), lambda study, field: study._with_stored(*field))

    def _with_stored(self, path: str, value: Any) -> Study:
        if path == "seed":
            return dataclasses.replace(self, seed=value)
        owner = self.final if path.startswith("final.") else self.train
        inner = path.removeprefix("final.")
        if inner not in spaces.paths(owner) or _plain(spaces.get(owner, inner)) == value:
            return self
        changed = spaces.replace(owner, inner, tuple(value) if isinstance(value, list) else value)
        part: Any = {"final" if owner is self.final else "train": changed}
        return dataclasses.replace(self, **part)

    def located(self, home: Path, data_root: str | None, device: str | None) -> Study:
        """This study with its folders made absolute: relative ones are taken from `home`, `data_root` from here."""
        data: Any = self.train.data
        changes = {"cache": str(home / data.cache)}
        if hasattr(data, "root"):
            changes["root"] = str(Path(data_root).resolve() if data_root else home / data.root)
        elif data_root is not None:
            raise InputError(f"--data-root: {type(data).__name__} draws its own images and reads none; leave it out.")
        train = dataclasses.replace(self.train, data=dataclasses.replace(data, **changes))
        if device is not None:
            train = dataclasses.replace(train, engine=dataclasses.replace(train.engine, device=device))
        return dataclasses.replace(self, train=train)

    def definition(self) -> dict[str, Any]:
        """Everything that decides the results, flat and ready for JSON; `trials` is left out, for it may grow."""
        flat = {path: _plain(value) for path, value in spaces.leaves(self.train, identity_only=True)}
        flat |= {f"space.{path}": repr(dimension) for path, dimension in self.space.items()}
        flat |= {f"final.{path}": _plain(value) for path, value in spaces.leaves(self.final, identity_only=True)}
        return flat | {"sampler": repr(self.sampler), "pruner": repr(self.pruner), "seed": self.seed}


ChangeT = TypeVar("ChangeT")


def _in_any_order(study: Study, changes: Sequence[ChangeT], change: Callable[[Study, ChangeT], Study]) -> Study:
    """The study with all changes, of which one may need another first: a larger image a larger stored one."""
    while changes:
        refused = []
        for each in changes:
            try:
                study = change(study, each)
            except InputError as error:
                refused.append((each, error))
        if len(refused) == len(changes):
            raise refused[0][1]
        changes = [each for each, _ in refused]
    return study


def fingerprint(config: TrainConfig) -> str:
    """Sixteen hexadecimal digits that stand for everything which decides a configuration's result."""
    described = {path: _plain(value) for path, value in spaces.leaves(config, identity_only=True)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _owner(study: Study, path: str) -> tuple[Any, str]:
    if path.startswith("final."):
        return study.final, path.removeprefix("final.")
    if path == "seed":
        return study, path
    return study.train, path


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that a stored definition compares equal to a fresh one."""
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _survives(value: Any) -> bool:
    """Whether JSON gives a value back as it was; not so objects, functions, sets, and what is not a number."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
