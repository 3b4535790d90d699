"""Small pictures of a few test images, kept in the storage so that a report can show them without the data set."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIDE = 96  # pixels at most
QUALITY = 80  # of the JPEG: about 4 KB a photograph


def thumbnails(images: torch.Tensor, chosen: Sequence[int]) -> dict[str, str]:
    """The chosen images of uint8 [N, side, side, 3] by number, each a JPEG of at most 96 x 96 pixels in base64."""
    from PIL import Image

    small = {}
    for number in chosen:
        picture = Image.fromarray(images[number].numpy())
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        small[str(number)] = base64.b64encode(file.getvalue()).decode()
    return small
