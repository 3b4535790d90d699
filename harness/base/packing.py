"""Arrays as short texts, for a storage that keeps JSON."""

from __future__ import annotations

import base64
from typing import Any

import numpy
from numpy.typing import NDArray


def pack(array: NDArray[Any]) -> str:
    """The array's numbers, little-endian, in base64; kind and length must be known where they are read."""
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def unpack(text: str, kind: str) -> NDArray[Any]:
    """The one-dimensional array that was packed; `kind` is numpy's name of its type, such as "uint16"."""
    return numpy.frombuffer(base64.b64decode(text), dtype=numpy.dtype(kind).newbyteorder("<")).astype(kind)


def pack_bits(flags: NDArray[Any]) -> str:
    """A bool array [N], eight to a byte."""
    return base64.b64encode(numpy.packbits(flags).tobytes()).decode()


def unpack_bits(text: str, count: int) -> NDArray[Any]:
    """The bool array [count] that was packed."""
    return numpy.unpackbits(numpy.frombuffer(base64.b64decode(text), dtype=numpy.uint8), count=count).astype(bool)
