"""Stochastic depth (Huang et al., 2016) whose probability is a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth as _StochasticDepth

from harness.base.errors import InputError


class StochasticDepth(nn.Module):
    """torchvision's per-image version; another probability does not trigger recompilation.

    torchvision stores the probability as a number, which compiled code treats as a constant.
    """

    survival_rate: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.acts = p > 0
        self.register_buffer("survival_rate", torch.tensor(1 - p), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Zero some images of [B, ...] entirely, and scale up the others."""
        if not (self.training and self.acts):
            return x
        noise = torch.bernoulli(self.survival_rate.expand(x.shape[0])) / self.survival_rate
        return x * noise.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def replace_stochastic_depth(model: nn.Module, largest: float | None = None) -> None:
    """Replace torchvision's modules with ours; scales the probabilities so that the largest is `largest`.

    Raises InputError if the model has none to scale.
    """
    highest = max((module.p for module in model.modules() if isinstance(module, _StochasticDepth)), default=0.0)
    if largest and not highest:
        raise InputError(f"{type(model).__name__} has no stochastic depth; set backbone.stochastic_depth to null.")
    factor = 1.0 if largest is None or not highest else largest / highest
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, _StochasticDepth):
                setattr(parent, name, StochasticDepth(module.p * factor))
