"""What the backbones have in common: their fields, weights from a file, and the head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.errors import InputError
from harness.config.contracts import Backbone
from harness.config.space import check_types
from harness.config.train import require
from harness.models import pretrained

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class PretrainedBackbone(Backbone):
    """A model with pretrained weights and a new head.

    `weights` is a file instead of the published ones: safetensors, or a state dictionary saved by torch. Without
    `pretrained` there are none, whatever `weights` says.
    `stochastic_depth` is the largest probability. None keeps the library's value.
    """

    pretrained: bool = True
    weights: str | None = None
    hidden: tuple[int, ...] = ()
    dropout: float = 0.2
    stochastic_depth: float | None = None
    bn_momentum: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "backbone.")
        fits = all(1 <= width <= 1_000_000 for width in self.hidden)
        require(fits, f"backbone.hidden must list widths of at least 1 and at most 1,000,000, not {self.hidden}.")
        require(0 <= self.dropout < 1, f"backbone.dropout must lie in 0..1, 1 excluded, not {self.dropout}.")
        drop, momentum = self.stochastic_depth, self.bn_momentum
        require(drop is None or 0 <= drop < 1, f"backbone.stochastic_depth must lie in 0..1, 1 excluded, not {drop}.")
        fits = momentum is None or 0 < momentum <= 1
        require(fits, f"backbone.bn_momentum must lie in 0..1, 0 excluded, not {momentum}.")

    def check(self, image_size: int) -> None:
        import torch

        self.check_size(image_size)
        if self.pretrained:
            with torch.random.fork_rng(devices=[]):
                self.load(image_size)

    def build(self, classes: int, image_size: int) -> nn.Module:
        """Build the model; parameters without pretrained weights use torch's global generator."""
        from torch import nn

        model = self.load(image_size)
        for module in model.modules():
            if self.bn_momentum is not None and isinstance(module, nn.BatchNorm2d):
                module.momentum = self.bn_momentum
        return with_head(model, self.hidden, self.dropout, classes)

    def fingerprint(self) -> str:
        if not self.pretrained:
            return "none"
        return pretrained.fingerprint(self.weights) if pretrained.is_file(self.weights) else self.published()

    def origin(self) -> str:
        if self.pretrained and pretrained.is_file(self.weights):
            return f"{Path(self.weights).name}, sha256 {self.fingerprint()}"
        return f"{self.fingerprint()} ({self.licence()})" if self.pretrained else "none"

    @abstractmethod
    def check_size(self, image_size: int) -> None:
        """Raise InputError if the model does not accept images of this side."""

    @abstractmethod
    def load(self, image_size: int) -> nn.Module:
        """Return the library's model with its weights. Raises InputError if they are missing or of another model."""

    @abstractmethod
    def published(self) -> str:
        """Return the name of the published weights, which changes when they do."""

    @abstractmethod
    def licence(self) -> str:
        """Return the licence of the published weights."""


def last_linear(model: nn.Module, name: str = "") -> str:
    """Return the path of the model's last linear layer. Raises InputError if there is none."""
    from torch import nn

    found = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise InputError(f"{name or type(model).__name__} has no linear layer to replace; choose another model.")
    return found[-1]


def with_head(model: nn.Module, hidden: tuple[int, ...], dropout: float, classes: int) -> nn.Module:
    """Replace the model's last linear layer: per hidden width Linear, ReLU, Dropout, then the class layer.

    The layers before it, such as MaxViT's pooling, LayerNorm, Linear and Tanh, stay and train with the head.
    """
    from torch import nn

    path = last_linear(model)
    width: int = model.get_submodule(path).in_features  # type: ignore[assignment]
    layers: list[nn.Module] = []
    for each in hidden:
        layers += [nn.Linear(width, each), nn.ReLU(), nn.Dropout(dropout)]
        width = each
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Sequential(*layers, nn.Linear(width, classes)))
    return model
