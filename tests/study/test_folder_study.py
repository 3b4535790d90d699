"""A study on a folder as people have them: what is said at its start, and names that are odd to its end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.cli.commands import main
from harness.garden.drawing import draw
from harness.garden.species import DEMO_SPECIES
from tests.refusal import FOLDER_STUDY, write

CLASSES = ("train", "ro\u0308se & <b>", "__background__")
LATIN1 = os.fsdecode(b"\xf6\n.png")  # a file's name that is no UTF-8, and two lines


def small_folder_study(workspace: Path) -> None:
    """A study file "folder": one trial, one final seed, images in `pictures`."""
    text = FOLDER_STUDY.replace("harness.models.maxvit import TinyMaxViT", "tests.small import SmallNet")
    text = text.replace("TinyMaxViT(pretrained=False, hidden=())", "SmallNet()")
    text = text.replace("import RuntimeConfig,", "import RuntimeConfig, FinalConfig,")
    write(workspace, "folder", text.replace("trials=1,", "trials=1,\n    final=FinalConfig(seeds=1, publish=False),"))


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_odd_folders_and_files_are_trained_on_and_what_is_left_out_is_said_once(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_folder_study(workspace)
    root, number = workspace / "pictures", 0
    for first, split in enumerate(("Train", "VALIDATION", "testing")):
        for species, name in zip(DEMO_SPECIES, CLASSES, strict=False):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                draw(species, 10 * first + number, 80).save(root / split / name / f"{number}.png")
        (root / split / "train" / LATIN1).write_bytes((root / "Train" / "train" / "0.png").read_bytes())
        (root / split / "train" / "Thumbs.db").write_bytes(b"x")
    draw(DEMO_SPECIES[5], number, 80).save(root / "preview.png")
    (root / "spare" / "train").mkdir(parents=True)

    assert main(["run", "--study", "folder"]) == 0

    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "ignored" in line] == [
        f"{root}/spare is ignored: it belongs to no split.",
        f"1 picture is ignored, such as {root}/preview.png: it is in no class folder.",
    ]
    description = json.loads((workspace / "studies" / "folder.model" / "model.json").read_text(encoding="utf-8"))
    assert description["classes"] == ["__background__", "r\xf6se & <b>", "train"]
    assert main(["show", "folder", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["duplicates"]["exact"]
    assert ["Train/train/\\udcf6\\n.png", "testing/train/\\udcf6\\n.png"] in pairs
    assert ["Train/train/0.png", "VALIDATION/train/\\udcf6\\n.png"] in pairs
    assert main(["run", "--study", "folder"]) == 0
    assert "ignored" not in capsys.readouterr().err, "nothing was started"


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_commands_find_the_images_where_the_study_did(workspace: Path) -> None:
    small_folder_study(workspace)
    for number in range(48):
        folder = workspace / "elsewhere" / CLASSES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        draw(DEMO_SPECIES[number % 2], number, 80).save(folder / f"{number}.png")
    assert main(["run", "--study", "folder", "--data-root", "elsewhere"]) == 0
    assert not (workspace / "pictures").exists()
    assert main(["reproduce", "folder", "0"]) == 0
