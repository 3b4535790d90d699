"""The head of every backbone: linear layers with ReLU and dropout in place of the last linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.base.errors import InputError
from harness.config.train import require

if TYPE_CHECKING:
    from torch import nn


def check_head(hidden: tuple[int, ...], dropout: float) -> None:
    fits = all(1 <= width <= 1_000_000 for width in hidden)
    require(fits, f"backbone.hidden must list widths of at least 1 and at most 1,000,000, not {hidden}.")
    check_probability("dropout", dropout)


def check_probability(field: str, value: float | None) -> None:
    require(value is None or 0 <= value < 1, f"backbone.{field} must lie in 0..1, 1 excluded, not {value}.")


def check_momentum(value: float | None) -> None:
    require(value is None or 0 < value <= 1, f"backbone.bn_momentum must lie in 0..1, 0 excluded, not {value}.")


def last_linear(model: nn.Module) -> str:
    """Return the path of the model's last linear layer. Raises InputError if there is none."""
    from torch import nn

    found = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer to replace; choose another model.")
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
