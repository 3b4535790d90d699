"""Whether a model takes images of a size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from harness.base.errors import InputError, first_line
from harness.models.head import last_linear


def check_size(name: str, build: Callable[[], nn.Module], image_size: int) -> None:
    """Pass an image through a model on torch's meta device, which computes shapes only.

    Raises InputError if the model refuses it, or has no head to replace.
    """
    try:
        model = build().eval()
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
