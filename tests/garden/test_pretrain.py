"""The command that makes the tiny MaxViT's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from harness.garden import pretrain
from harness.models.maxvit import TINY_WEIGHTS


@pytest.mark.slow
def test_it_writes_the_same_tensors_as_the_shipped_file(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = workspace / "weights.safetensors"
    pretrain.main(["--output", str(output), "--epochs", "1", "--images-per-species", "1"])
    assert "epoch  1/1" in capsys.readouterr().out
    made, shipped = load_file(output), load_file(TINY_WEIGHTS)
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
        name: (t.shape, t.dtype) for name, t in shipped.items()
    }
