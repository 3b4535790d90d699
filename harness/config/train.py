"""Training configurations: frozen, keyword-only dataclasses that validate themselves.

Fields marked `identity=False` say where something runs or lies, not what is computed; they may change when a study
is resumed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.base.errors import InputError
from harness.config import space as spaces
from harness.config.contracts import Backbone, Dataset


def location(default: Any) -> Any:
    """Define a field that is not part of a study's identity."""
    return field(default=default, metadata={"identity": False})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_count(path: str, value: int, most: int) -> None:
    require(1 <= value <= most, f"{path} must be at least 1 and at most {most:,}, not {value}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Base of data sets: sides of their images in pixels, and the folder of the decoded ones."""

    image_size: int = 224
    stored_size: int = 256  # of the cached training images; the margin is for crops
    limit: int | None = None  # maximum images per split, spread over the classes
    cache: str = location("data/cache")

    def __post_init__(self) -> None:
        spaces.check_types(self, "data.")
        size, stored, limit = self.image_size, self.stored_size, self.limit
        require(size >= 1, f"data.image_size must be at least 1 pixel, not {size}.")
        require(stored <= 10_000, f"data.stored_size must be at most 10,000 pixels, not {stored}.")
        require(stored >= size, f"data.stored_size ({stored}) must not be smaller than data.image_size ({size}).")
        require(limit is None or limit >= 1, f"data.limit must be at least 1, or null for all images, not {limit}.")

    def is_here(self) -> bool:
        """Return False if `samples` would download the images first."""
        return True


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random augmentation, drawn anew for each training image. Ranges follow torchvision's transforms.

    TrivialAugment: Müller and Hutter, 2021. Random erasing: Zhong et al., 2020. Mixup: Zhang et al., 2018. CutMix:
    Yun et al., 2019; with both, each image has one of the two. Smaller images first: Touvron et al., 2019.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5  # probability
    rotation_degrees: float = 30.0  # drawn from -r to +r
    brightness: float = 0.03
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.03  # in turns of the colour circle
    trivial_augment: bool = False  # one of its operations per image, after crop, flip and rotation
    random_erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha of the Beta distribution that draws each image's share; 0: none
    cutmix: float = 0.0  # alpha
    early_size: int | None = None  # side of training images before the tail, in pixels; None: data.image_size
    tail: float = 0.2  # share of the epochs, the last ones, without mixup and cutmix and in full size

    def __post_init__(self) -> None:
        spaces.check_types(self, "augment.")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"augment.crop_scale must satisfy 0 < low <= high <= 1, not {self.crop_scale}.")
        low, high = self.crop_ratio
        fits = 0 < low <= high < math.inf
        require(fits, f"augment.crop_ratio must satisfy 0 < low <= high and be finite, not {self.crop_ratio}.")
        for name in ("flip", "random_erasing"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name} is a probability between 0 and 1, not {value}.")
        for name, most in (("rotation_degrees", 180), ("brightness", 1), ("contrast", 1), ("saturation", 1)):
            require(0 <= getattr(self, name) <= most, f"augment.{name} must lie between 0 and {most}.")
        require(0 <= self.hue <= 0.5, "augment.hue must lie between 0 and 0.5 (half a turn of the colour circle).")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            fits = value == 0 or 0.01 <= value <= 100
            require(fits, f"augment.{name} must lie between 0.01 and 100, or be 0 for none, not {value}.")
        size = self.early_size
        require(size is None or size >= 1, f"augment.early_size must be at least 1 pixel, or null, not {size}.")
        require(0 <= self.tail <= 1, f"augment.tail is a share of the epochs between 0 and 1, not {self.tail}.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and the learning rate decay by depth (`harness.training.optim`)."""

    # Those of torch.optim that take parameters of any shape, and a weight decay.
    name: Literal[
        "adamw", "adam", "nadam", "radam", "adamax", "sgd", "asgd", "rmsprop", "adagrad", "adadelta", "adafactor"
    ] = "adamw"
    base_lr: float
    depth_lr_mult: float  # a block's rate is base_lr * depth_lr_mult ** (its distance from the head)
    depth_by: Literal["block", "layer"] = "block"
    frozen_depths: int = 0  # number of first depths that do not train, and cost no backward pass
    head_epochs: int = 0  # first epochs, in which only the head trains; then the other blocks warm up
    weight_decay: float = 0.02
    momentum: float = 0.9  # of Adam and its kin the first beta
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_floor: float = 0.0  # at which the cosine ends, as a share of the rate
    warmup_epochs: float = 1.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        spaces.check_types(self, "optim.")
        require(0 < self.base_lr < math.inf, f"optim.base_lr must be greater than 0 and finite, not {self.base_lr}.")
        require(0 <= self.depth_lr_mult <= 1, f"optim.depth_lr_mult must lie in 0..1, not {self.depth_lr_mult}.")
        for name in ("head_epochs", "frozen_depths"):
            require(getattr(self, name) >= 0, f"optim.{name} must be 0 or more, not {getattr(self, name)}.")
        require(0 <= self.lr_floor <= 1, f"optim.lr_floor must lie in 0..1, not {self.lr_floor}.")
        require(0 <= self.momentum < 1, f"optim.momentum must lie in 0..1, 1 excluded, not {self.momentum}.")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optim.{name} must be a finite number of at least 0, not {value}.")
        fits = self.clip_norm is None or 0 < self.clip_norm < math.inf
        require(fits, f"optim.clip_norm must be greater than 0 and finite, or null, not {self.clip_norm}.")
        # They add the decay to the gradient and divide it by the gradient's size: not the configured decay.
        require(
            self.name not in ("adam", "adamax", "rmsprop", "adagrad", "adadelta") or self.weight_decay == 0,
            f"optim.name {self.name} has no decoupled weight decay, and optim.weight_decay is or may become "
            f"{self.weight_decay:g}: set optim.weight_decay to 0, or optim.name to adamw.",
        )
        require(
            self.name not in ("adagrad", "adadelta", "adafactor", "asgd") or self.momentum == 0.9,
            f"optim.name {self.name} has no momentum, and optim.momentum is or may become {self.momentum:g}: leave "
            "optim.momentum at 0.9, or set optim.name to sgd.",
        )


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a step runs. "auto" uses a rule, "tune" timing; decided once per study (`harness.training.runtime`)."""

    device: str = location("auto")  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "tune", "fp32", "bf16"] = "auto"
    channels_last: Literal["auto", "tune", "on", "off"] = "auto"
    compile: Literal["auto", "tune", "on", "off"] = "auto"
    deterministic: bool = True  # false: faster kernels on CUDA and when compiled, whose last bits differ in each run

    def __post_init__(self) -> None:
        spaces.check_types(self, "runtime.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One complete training job: the base that a study's space varies."""

    data: Dataset
    backbone: Backbone
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig
    runtime: RuntimeConfig = RuntimeConfig()
    batch_size: int = 34
    epochs: int = 15
    label_smoothing: float = 0.1
    class_weight: float = 0.0  # power of 1 / images of the class in its loss: 0 no weights, 1 equal weight per class
    ema: float = 0.0  # time constant of the weights' moving average, as a share of the training; 0: none
    # Augmented views per image whose frozen features are cached; None: no features.
    feature_views: int | None = None
    checkpoint_seconds: float = location(60.0)  # minimum time between two checkpoints

    def __post_init__(self) -> None:
        spaces.check_types(self)
        require(hasattr(self.data, "samples"), f"data must be a data set such as Garden(), not {self.data!r}.")
        require(hasattr(self.backbone, "build"), f"backbone must be a model such as MaxViTT(), not {self.backbone!r}.")
        for name in ("check", "depths", "preprocessing", "no_decay", "fingerprint"):
            advice = "inherit from harness.config.contracts.Backbone, which says what it should return"
            require(hasattr(self.backbone, name), f"{type(self.backbone).__name__} has no method {name}; {advice}.")
        for name, kind in (("augment", AugmentConfig), ("optim", OptimConfig), ("runtime", RuntimeConfig)):
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
        head = self.optim.head_epochs
        require(
            head == 0 or head < self.epochs,
            f"optim.head_epochs is or may become {head}, and epochs is or may become {self.epochs}; choose fewer, so "
            "that the other blocks train, too, or freeze them with optim.depth_lr_mult=0.",
        )
        early, size = self.augment.early_size, self.data.image_size
        require(
            early is None or early <= size,
            f"augment.early_size ({early}) must not be greater than data.image_size ({size}).",
        )
        fits = 0 <= self.checkpoint_seconds < math.inf
        require(fits, f"checkpoint_seconds must be 0 or more, and finite, not {self.checkpoint_seconds}.")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, f"label_smoothing must lie in 0..1, 1 excluded, not {smoothing}.")
        require(0 <= self.class_weight <= 1, f"class_weight must lie in 0..1, not {self.class_weight}.")
        require(0 <= self.ema <= 1, f"ema must lie in 0..1, not {self.ema}.")
        if self.feature_views is not None:
            whole = self.augment.cutmix == 0 and self.augment.early_size is None
            require(whole, "feature_views has no images to cut: leave augment.cutmix 0 and augment.early_size null.")
            fits = 0 <= self.feature_views <= 1000
            require(fits, f"feature_views must lie in 0..1000, or be null, not {self.feature_views}.")
            require(
                self.optim.depth_lr_mult == 0,
                "feature_views needs a frozen backbone, but optim.depth_lr_mult is or may become "
                f"{self.optim.depth_lr_mult:g}: set it to 0 and remove it from the study's space, "
                "or leave feature_views null.",
            )


@dataclass(frozen=True, kw_only=True)
class FinalConfig:
    """The step after the search: retrain the best configuration and open the test set."""

    seeds: int = 3
    fit_on: Literal["train", "train+val"] = "train+val"
    rerank: int = 0  # number of best trials retrained on fresh seeds to choose one; 0: choose from the search
    flip: bool = False  # also report the test result of each image and its mirror image, averaged
    compare_base: bool = True  # train the base from the same seeds, too, and compare both on the test set
    publish: bool = location(True)  # export the final model, and register it in MLflow

    def __post_init__(self) -> None:
        spaces.check_types(self, "final.")
        require_count("final.seeds", self.seeds, 1000)
        fits = self.rerank == 0 or 2 <= self.rerank <= 1000
        require(fits, f"final.rerank must be at least 2 and at most 1,000, or 0 for no reranking, not {self.rerank}.")

    def trainings(self, trials: int) -> int:
        """Return the maximum number of trainings after a search of `trials`; if only the base is tried, of it alone."""
        others = self.compare_base + min(self.rerank, trials) if trials > 1 else 0
        return self.seeds * (1 + others)


def fingerprint(config: TrainConfig) -> str:
    """Return sixteen hexadecimal digits that identify what decides a configuration's result."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def identity(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return what decides a configuration's result, flat, for JSON."""
    return {path: plain(value) for path, value in spaces.leaves(config, prefix, identity_only=True)}


def is_default(config: Any, path: str) -> bool:
    """Return whether a field has its class's default."""
    *folders, name = path.split(".")
    holder = functools.reduce(getattr, folders, config)
    # The defaults of a dataclass are attributes of the class.
    return hasattr(type(holder), name) and bool(plain(getattr(type(holder), name)) == plain(getattr(holder, name)))


def plain(value: Any) -> Any:
    """Convert tuples to lists, as JSON does, to compare with a stored definition."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def survives(value: Any) -> bool:
    """Return whether a value survives JSON; objects, functions, sets and NaN do not."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
