"""Models on torch's meta device, which computes shapes only: names of parameters, and sizes of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from harness.base.errors import InputError, first_line
from harness.models.head import last_linear


def skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without memory for its parameters, and without a draw from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except RuntimeError:  # regnets and others compute their widths with tensors
            return build().to("meta")


def check_size(name: str, build: Callable[[], nn.Module], image_size: int) -> None:
    """Pass an image through a model's skeleton.

    Raises InputError if the model refuses it, or has no head to replace.
    """
    try:
        model = skeleton(build).eval()
        last_linear(model)
        with torch.no_grad():
            model(torch.empty(1, 3, image_size, image_size, device="meta"))
    except InputError:
        raise
    # Models refuse a size in many ways.
    except Exception as error:
        raise InputError(
            f"{name} does not take images of {image_size} x {image_size} pixels ({first_line(error)}); change "
            "data.image_size."
        ) from error
