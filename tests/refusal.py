"""What the tests of wrong input share: a command is refused in one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from harness.cli.commands import main

# An untrained tiny MaxViT on a folder of photographs, `pictures` beside `studies`.
FOLDER_STUDY = """
from harness.config.train import RuntimeConfig, OptimConfig, TrainConfig
from harness.config.study import Study
from harness.datasets.image_folder import ImageFolder
from harness.models.maxvit import TinyMaxViT
from harness.search.pruners import no_pruning
from harness.search.samplers import tpe
from harness.config.space import Float

STUDY = Study(
    name="folder",
    train=TrainConfig(
        data=ImageFolder(root="pictures", image_size=64, stored_size=72),
        backbone=TinyMaxViT(pretrained=False, hidden=()),
        optim=OptimConfig(base_lr=1e-3, depth_lr_mult=0.5),
        runtime=RuntimeConfig(device="cpu", precision="fp32", channels_last="off", compile="off"),
        epochs=1,
    ),
    space={"optim.base_lr": Float(1e-4, 1e-2, log=True)},
    sampler=tpe(),
    pruner=no_pruning(),
    trials=1,
)
"""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes and every folder, but for what Python and the decoding of images keep."""
    found: dict[str, bytes | None] = {}
    for each in sorted(folder.rglob("*")):
        name = each.relative_to(folder)
        if "__pycache__" in name.parts or name.parts[0] == "data":
            continue
        found[str(name)] = each.read_bytes() if each.is_file() else None
    return found


def assert_refused(workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    """The command ends with 2, says all these words in one line (or as argparse does), and has written nothing."""
    before = tree(workspace)
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as ended:  # argparse's own way; it prints the usage first
        code = ended.code if isinstance(ended.code, int) else 1
        error = capsys.readouterr().err
        assert error.startswith("usage: ")
        assert ": error: " in error.splitlines()[-1]
    else:
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert len(error.splitlines()) == 1, error
    assert code == 2, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    after = tree(workspace)
    assert sorted(set(after) - set(before)) == []
    assert after == before


def write(workspace: Path, name: str, text: str) -> None:
    (workspace / "studies" / f"{name}.py").write_text(text, encoding="utf-8")


def demo_with(workspace: Path, name: str, old: str, new: str) -> None:
    """A copy of the demo with one thing changed."""
    text = (workspace / "studies" / "demo.py").read_text(encoding="utf-8")
    assert old in text
    write(workspace, name, text.replace(old, new))


def pictures(workspace: Path, classes: int = 2, images: int = 20) -> Path:
    root = workspace / "pictures"
    for label in range(classes):
        (root / f"class_{label}").mkdir(parents=True)
        for number in range(images):
            colour = (label * 100, number * 10, 50)
            Image.new("RGB", (80, 80), colour).save(root / f"class_{label}" / f"{number}.png")
    root.mkdir(exist_ok=True)
    write(workspace, "folder", FOLDER_STUDY)
    return root
