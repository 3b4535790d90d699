"""What is packed comes back."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.base.packing import pack, pack_bits, unpack, unpack_bits


@given(st.lists(st.integers(0, 65535)), st.lists(st.floats(width=32, allow_nan=False)), st.lists(st.booleans()))
def test_what_is_packed_comes_back(numbers: list[int], shares: list[float], flags: list[bool]) -> None:
    texts = json.loads(
        json.dumps(
            [pack(np.array(numbers, "uint16")), pack(np.array(shares, "float32")), pack_bits(np.array(flags, bool))]
        )
    )
    assert unpack(texts[0], "uint16").tolist() == numbers
    assert unpack(texts[1], "float32").tolist() == shares
    assert unpack_bits(texts[2], len(flags)).tolist() == flags
