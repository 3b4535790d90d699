"""Seeds have names: the same name gives the same seed everywhere and for ever, another name gives another seed."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from harness.base.seeds import derive_seed
from tests.conftest import PROJECT

# The first four bytes of sha256(b"int:0"), and of the five parts of an epoch's seed. If they change, every study that
# was begun before can no longer be resumed as if it had not been interrupted.
KNOWN_0 = 1_721_453_604
KNOWN_TRIAL = 869_255_494

parts = st.lists(st.one_of(st.integers(), st.text(st.characters(exclude_characters="\x1f"))), min_size=1, max_size=5)


@given(parts)
def test_a_seed_fits_into_32_bits_and_is_the_same_at_every_call(names: list[int | str]) -> None:
    assert 0 <= derive_seed(*names) < 2**32
    assert derive_seed(*names) == derive_seed(*names)


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=20, unique=True))
def test_other_parts_give_other_seeds(numbers: list[int]) -> None:
    seeds = {derive_seed(0, "trial", number) for number in numbers}
    assert len(seeds) == len(numbers)


def test_ten_thousand_trials_share_hardly_a_seed() -> None:
    # 10,000 draws from 2**32 collide 0.01 times on average.
    assert len({derive_seed(0, "trial", number) for number in range(10_000)}) >= 9_999


def test_the_text_1_is_not_the_number_1() -> None:
    assert derive_seed("1") != derive_seed(1)


def test_the_border_between_parts_counts() -> None:
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert derive_seed("ab") != derive_seed("a", "b")
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_the_seeds_of_yesterday_are_the_seeds_of_today() -> None:
    assert derive_seed(0) == KNOWN_0
    assert derive_seed(0, "trial", 12, "epoch", 7) == KNOWN_TRIAL


def test_another_process_with_another_hash_seed_derives_the_same() -> None:
    code = "from harness.base.seeds import derive_seed; print(derive_seed(0, 'trial', 12, 'epoch', 7))"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) == KNOWN_TRIAL
