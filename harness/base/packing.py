"""Encode arrays as short strings, for storage as JSON."""

from __future__ import annotations

import base64
from typing import Any

import numpy
from numpy.typing import NDArray


def pack(array: NDArray[Any]) -> str:
    """Encode an array in base64, little-endian; dtype and length must be known when decoding."""
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def unpack(text: str, kind: str) -> NDArray[Any]:
    """Decode an array packed by `pack`, one-dimensional; `kind` is its numpy dtype, such as "uint16"."""
    return numpy.frombuffer(base64.b64decode(text), dtype=numpy.dtype(kind).newbyteorder("<")).astype(kind)


def pack_bits(flags: NDArray[Any]) -> str:
    """Encode a bool array [N], 8 per byte."""
    return base64.b64encode(numpy.packbits(flags).tobytes()).decode()


def unpack_bits(text: str, count: int) -> NDArray[Any]:
    """Decode a packed bool array [count]."""
    return numpy.unpackbits(numpy.frombuffer(base64.b64decode(text), dtype=numpy.uint8), count=count).astype(bool)
