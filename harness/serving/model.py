"""Load the final run's model from its folder, to predict, export or publish it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from harness.base.errors import InputError
from harness.base.files import Damaged
from harness.config.study import Study
from harness.config.train import TrainConfig
from harness.data.augment import normalise
from harness.data.cache import square
from harness.final import model_files
from harness.store.store import Store
from harness.training.checkpoint import read_tensors
from harness.training.optim import without_weights


class Calibrated(nn.Module):
    """A model whose logits are divided by a temperature, so that their softmax is as sure as it is right."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits / self.temperature


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A trained model in evaluation mode, in fp32 on the CPU, with its configuration and description."""

    model: nn.Module  # float32 [B, 3, S, S], standardised, to calibrated logits float32 [B, classes]
    config: TrainConfig
    description: dict[str, Any]  # model.json
    check_images: Tensor | None = None  # standardised test images, float32 [N, 3, S, S], if the final run saved some
    program: Path | None = None  # the place of its exported program, which may be missing

    @property
    def trained(self) -> nn.Module:
        """The model as it was trained, without calibration."""
        return self.model.model if isinstance(self.model, Calibrated) else self.model

    @property
    def classes(self) -> Sequence[str]:
        """The class names, by logit index."""
        return self.description["classes"]

    @property
    def image_size(self) -> int:
        """The side of the square that the model sees, in pixels."""
        return self.config.data.image_size


def load_saved(study: Study, store: Store, folder: Path) -> SavedModel:
    """Load the model of the study's final run from `folder`; `study` has its stored settings (`opening.as_begun`).

    Raises InputError if there is none yet, it is damaged, or it differs from the record.
    """
    if not model_files.has_model(folder):
        raise InputError(f"{folder} holds no model{_why_missing(study, store)}")
    model_files.check_folder(folder, store.url, store.uid)
    for name in (model_files.WEIGHTS, model_files.DESCRIPTION):
        if (fault := model_files.file_fault(store, folder, name)) is not None:
            raise InputError(f"The model cannot be used: {fault}; {model_files.AGAIN}.")
    try:
        description = model_files.read_description(folder / model_files.DESCRIPTION)
        tensors, _ = read_tensors(folder / model_files.WEIGHTS)
        trials = {trial.number: trial for trial in store.trials()}
        config = study.config(trials[description["trial"]].params)
    except (Damaged, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"The model in {folder} cannot be read ({error}); {model_files.AGAIN}.") from error
    model = without_weights(config.backbone).build(len(description["classes"]), config.data.image_size)
    model.load_state_dict(tensors)
    try:  # the final run's test images; a retrained model has none
        images = read_tensors(folder / model_files.CHECK_FILE)[0]["images"]
        images = normalise(images, config.backbone.preprocessing())
    except Damaged:
        images = None
    if (temperature := description.get("temperature")) is not None:
        model = Calibrated(model, temperature)
    program = folder / model_files.PROGRAM
    return SavedModel(model=model.eval(), config=config, description=description, check_images=images, program=program)


def _why_missing(study: Study, store: Store) -> str:
    """Return why the folder has no model, and the remedy, as the end of a sentence."""
    if store.has_final():
        return f", though the final run of study {study.name!r} has ended; {model_files.AGAIN}."
    if (why := store.why_closed()) is not None:
        return f". {why}"
    return f": the final run of study {study.name!r} has not ended; run the study to its end."


def preprocess(images: Sequence[Image.Image], config: TrainConfig) -> Tensor:
    """Return photographs of any size as model inputs, float32 [B, 3, S, S], like validation and test images."""
    preprocessing = config.backbone.preprocessing()
    size = preprocessing.evaluation(config.data.image_size)
    squares = np.stack([square(image.convert("RGB"), size) for image in images])
    return normalise(torch.from_numpy(squares), preprocessing)
