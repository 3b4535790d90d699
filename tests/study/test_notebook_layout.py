"""The original notebook's search on the original notebook's folders, with a tiny model in place of MaxViT-T."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli.commands import main
from harness.garden.drawing import draw
from harness.garden.species import DEMO_SPECIES
from harness.store.opening import read_store

STUDY_FILE = """
import dataclasses
from harness.config.find import find
from harness.config.train import FinalConfig
from harness.datasets.image_folder import ImageFolder
from harness.models.maxvit import TinyMaxViT

GRID = find("flowers102_grid").study
STUDY = dataclasses.replace(
    GRID,
    name="grid",
    train=dataclasses.replace(
        GRID.train,
        data=ImageFolder(image_size=64, stored_size=72, names="cat_to_name.json"),
        backbone=TinyMaxViT(pretrained=False, hidden=GRID.train.backbone.hidden, dropout=0.5),
        epochs=1,
    ),
    final=FinalConfig(seeds=1, fit_on="train", publish=False),
)
"""


@pytest.mark.slow
def test_the_grid_runs_on_train_valid_and_test_folders(workspace: Path) -> None:
    species = dict(zip(("1", "2", "10"), DEMO_SPECIES, strict=False))
    for split, count in (("train", 3), ("valid", 2), ("test", 2)):
        for name, each in species.items():
            folder = workspace / "flowers" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                draw(each, number, 80).save(folder / f"{split}_{number}.jpg")
    names = ", ".join(f'"{name}": "{each.name}"' for name, each in species.items())
    (workspace / "flowers" / "cat_to_name.json").write_text(f"{{{names}}}")
    (workspace / "studies" / "grid.py").write_text(STUDY_FILE)

    assert main(["run", "--study", "grid", "--data-root", "flowers"]) == 0

    with read_store("grid", f"sqlite:///{workspace}/studies/grid.db") as store:
        points = [(t.params["optim.base_lr"], t.params["optim.depth_lr_mult"]) for t in store.trials()]
        assert points == [(lr, mult) for lr in (1e-3, 6e-4, 3e-4) for mult in (0.3, 0.6, 0.9)]
        assert store.counts() == {"complete": 9, "pruned": 0, "failed": 0, "running": 0}
        assert store.attributes()["final"]["total"] == 6
