"""Files of weights: read once, and again when they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.base.errors import InputError
from harness.models.pretrained import read, unwrapped


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_read_once_until_the_file_changes(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / f"weights{suffix}")

    def write(value: float) -> None:
        state = {"layer.weight": torch.full((3,), value)}
        save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)

    write(1.0)
    first = read(file)
    assert read(file)["layer.weight"] is first["layer.weight"]
    first.clear()
    assert read(file)["layer.weight"].tolist() == [1.0] * 3
    Path(file).unlink()
    write(2.0)
    assert read(file)["layer.weight"].tolist() == [2.0] * 3
    Path(file).unlink()
    with pytest.raises(InputError, match="cannot be read \\(No such file or directory\\)"):
        read(file)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {f"module.{name}": each for name, each in state.items()},
        lambda state: {f"_orig_mod.{name}": each for name, each in state.items()},
        lambda state: {f"module._orig_mod.{name}": each for name, each in state.items()},
        lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{name}": each for name, each in state.items()},
        lambda state: {
            "pytorch-lightning_version": "2.5",
            "state_dict": {f"net.{name}": each for name, each in state.items()},
        },
    ],
)
def test_what_wraps_a_model_is_removed_from_its_names(tmp_path: Path, wrapped: Any) -> None:
    state = {"stem.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    torch.save(wrapped(state), tmp_path / "weights.pth")
    assert unwrapped(read(str(tmp_path / "weights.pth")), state).keys() == state.keys()


@pytest.mark.parametrize("names", [["model.weight", "model.bias"], ["module.module.weight"], ["n_averaged"]])
def test_names_that_the_model_has_stay(names: list[str]) -> None:
    state = {name: torch.ones(2) for name in names}
    assert unwrapped(state, names) == state
    assert unwrapped({f"module.{name}": each for name, each in state.items()}, names).keys() == state.keys()


@pytest.mark.parametrize("names", [["a.b.weight"], ["weight"], ["a.weight", "a"], []])
def test_names_of_another_model_come_to_an_end(names: list[str]) -> None:
    assert unwrapped({name: torch.ones(2) for name in names}, ["conv.bias"]).keys() <= {*names, "weight"}


def test_a_folder_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").mkdir()
    with pytest.raises(InputError, match=r"weights\.pth (cannot be read|is not a file of weights)"):
        read(str(tmp_path / "weights.pth"))
