"""The classification models of torchvision, by name.

Nothing here imports torch before a model is built, so that a study loads quickly.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.base.errors import InputError, first_line
from harness.config.contracts import Preprocessing
from harness.models import pretrained
from harness.models.backbone import PretrainedBackbone, last_linear

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchvision.models import WeightsEnum

    from harness.models.depths import Depths

# Their auxiliary classifiers are for training from scratch.
AUXILIARY = ("googlenet", "inception_v3")
AUXILIARY_TENSORS = ("aux1.", "aux2.", "AuxLogits.")
# Published files have names of older versions, which torchvision's own loaders change.
OLD_NAMES = (
    (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
)


@dataclass(frozen=True)
class Torchvision(PretrainedBackbone):
    """A model of `torchvision.models` with a new head: Torchvision("convnext_tiny").

    `weights` may also be a published version such as "IMAGENET1K_V2".
    """

    name: str

    def check_size(self, image_size: int) -> None:
        _check_name(self.name)
        _check_size(self.name, image_size)

    def load(self, image_size: int) -> nn.Module:
        from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

        from harness.models.stochastic_depth import replace_stochastic_depth

        model = _built(self.name, image_size)
        replace_stochastic_depth(model, self.stochastic_depth)
        if self.pretrained:
            state = self._state()
            if isinstance(model, VisionTransformer) and "encoder.pos_embedding" in state:
                try:
                    state = interpolate_embeddings(image_size, model.patch_size, OrderedDict(state))
                except ValueError as error:  # published weights fit
                    text = f"The weights {self.weights} do not fit: encoder.pos_embedding ({first_line(error)})"
                    raise InputError(f"{text}; check that they are of {self.name}.") from error
            source = self.weights if pretrained.is_file(self.weights) else str(pretrained.path(self._version()))
            pretrained.load(model, state, last_linear(model), source)
        return model

    def depths(self, by: Literal["block", "layer"]) -> Depths:
        return _depths(self.name, by)

    def preprocessing(self) -> Preprocessing:
        """Return the evaluation preset of the published weights, which files of weights share."""
        return _preset(self._version())

    def published(self) -> str:
        return Path(self._version().url).stem

    def licence(self) -> str:
        return "torchvision; terms of the training data may apply"

    def _version(self) -> WeightsEnum:
        from torchvision.models import get_model_weights

        _check_name(self.name)
        versions = get_model_weights(self.name)
        if self.weights is None or pretrained.is_file(self.weights):
            return versions["DEFAULT"]
        if self.weights not in versions.__members__:
            known = ", ".join(versions.__members__)
            files = ", ".join(pretrained.SUFFIXES)
            raise InputError(
                f"{self.name} has no weights {self.weights!r}; choose from {known}, or give a file ({files})."
            )
        return versions[self.weights]

    def _state(self) -> dict[str, Tensor]:
        file = self.weights if pretrained.is_file(self.weights) else None
        state = pretrained.read(file) if file is not None else pretrained.published(self._version())
        if self.name in AUXILIARY:
            state = {name: each for name, each in state.items() if not name.startswith(AUXILIARY_TENSORS)}
        return {_name(name): each for name, each in state.items()}


def _name(name: str) -> str:
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def names() -> list[str]:
    """Return the names of all classification models."""
    from torchvision import models

    return list(models.list_models(module=models))


def _check_name(name: str) -> None:
    if name not in (known := names()):
        raise InputError(f"torchvision has no model {name!r}; {pretrained.nearest(name, known)}.")


@lru_cache
def _preset(version: WeightsEnum) -> Preprocessing:
    preset = version.transforms()
    return Preprocessing(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _built(name: str, image_size: int | None = None) -> nn.Module:
    from torchvision import models

    arguments: dict[str, Any] = {"weights": None}
    if name in AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    if image_size is not None and name.startswith("maxvit_"):
        arguments["input_size"] = image_size, image_size
    if image_size is not None and name.startswith("vit_"):
        arguments["image_size"] = image_size
    return models.get_model(name, **arguments)


@lru_cache
def _check_size(name: str, image_size: int) -> None:
    from harness.models.depths import check_size

    check_size(name, lambda: _built(name, image_size), image_size)


@lru_cache
def _depths(name: str, by: Literal["block", "layer"]) -> Depths:
    from harness.models.depths import depths_of, skeleton

    _check_name(name)
    model = skeleton(lambda: _built(name))
    return depths_of(model, last_linear(model), by)
