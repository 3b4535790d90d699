"""The image cache's array of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.config.contracts import Dataset, Square
from harness.data.cache import keyed


def decoded(dataset: Dataset, items: Sequence[Any], size: Square) -> NDArray[np.uint8]:
    """The images as an array [len(items), side, side, 3]."""
    return keyed(dataset, items, [size])[size][1]
