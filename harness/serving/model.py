"""The final run's model, read back from its folder: ready to predict, to be exported, to be published."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from harness.base.errors import InputError
from harness.base.files import Damaged
from harness.config.study import Study
from harness.config.train import TrainConfig
from harness.final.model_files import (
    AGAIN,
    CHECK_FILE,
    DESCRIPTION,
    WEIGHTS,
    check_folder,
    file_fault,
    has_model,
    read_description,
)
from harness.store.store import Store
from harness.training.checkpoint import read_tensors


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A trained model in evaluation mode, in fp32 on the CPU, and what must be known to use it."""

    model: nn.Module  # float32 [B, 3, S, S], standardised, to logits float32 [B, classes]
    config: TrainConfig
    description: dict[str, Any]  # model.json
    check_images: Tensor | None = None  # standardised test images, float32 [N, 3, S, S], if the opening left some

    @property
    def classes(self) -> Sequence[str]:
        """The names, by the number of their logit."""
        return self.description["classes"]

    @property
    def image_size(self) -> int:
        """The side of the square that the model sees, in pixels."""
        return self.config.data.image_size


def load_saved(study: Study, store: Store, folder: Path) -> SavedModel:
    """The model that the study's final run left in `folder`; `study` is as it was begun (`opening.as_begun`).

    Raises InputError when there is none yet, or it is damaged or not the one that was recorded.
    """
    from harness.data.augment import normalise

    if not has_model(folder):
        raise InputError(f"{folder} holds no model{_why_missing(study, store)}")
    check_folder(folder, store.url, store.uid)
    for name in (WEIGHTS, DESCRIPTION):
        if (fault := file_fault(store, folder, name)) is not None:
            raise InputError(f"The model cannot be used: {fault}; {AGAIN}.")
    try:
        description = read_description(folder / DESCRIPTION)
        tensors, _ = read_tensors(folder / WEIGHTS)
        trials = {trial.number: trial for trial in store.trials()}
        config = study.config(trials[description["trial"]].params)
    except (Damaged, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"The model in {folder} cannot be read ({error}); {AGAIN}.") from error
    backbone: Any = config.backbone
    if "pretrained" in {field.name for field in dataclasses.fields(backbone)}:  # weights that are replaced anyway
        backbone = dataclasses.replace(backbone, pretrained=False)
    model = backbone.build(len(description["classes"]), config.data.image_size)
    model.load_state_dict(tensors)
    try:  # the test images that the opening left; a model whose folder was lost is made without them
        images = normalise(read_tensors(folder / CHECK_FILE)[0]["images"])
    except Damaged:
        images = None
    return SavedModel(model=model.eval(), config=config, description=description, check_images=images)


def _why_missing(study: Study, store: Store) -> str:
    """What became of the model whose folder is empty, and what to do: the end of a sentence that names the folder."""
    if store.has_final():
        return f", though the final run of study {study.name!r} has ended; {AGAIN}."
    if (why := store.why_closed()) is not None:
        return f". {why}"
    return f": the final run of study {study.name!r} has not ended; run the study to its end."


def preprocess(images: Sequence[Image.Image], size: int) -> Tensor:
    """Photographs of any size as the model takes them: standardised, float32 [B, 3, size, size].

    The same steps as for validation and test images: the centre square of the image, resized to `size` on its short
    side with antialiased bicubics.
    """
    import numpy as np
    import torch

    from harness.data.augment import normalise
    from harness.data.cache import square

    return normalise(torch.from_numpy(np.stack([square(image.convert("RGB"), size) for image in images])))
