"""Named seeds for all random draws, so that a resumed study repeats an uninterrupted one.

Seeds are derived, not counted: the seed of epoch 7 of trial 12 does not depend on how many numbers epoch 6 drew. An
epoch can therefore start without the state of any generator.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**32) from named parts, on any machine: `derive_seed(0, "trial", 12, "epoch", 7)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:4], "big")
