"""MaxViT (Tu et al., 2022): torchvision's MaxViT-T with our defaults, and a tiny one for the demo and the tests.

Nothing here imports torch before a model is built, so that a study loads quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.config.train import require
from harness.models import pretrained
from harness.models.backbone import PretrainedBackbone
from harness.models.torchvision import Torchvision

if TYPE_CHECKING:
    from torch import nn

TINY_WEIGHTS = Path(__file__).with_name("tiny_maxvit.safetensors")

# torchvision's momentum of 0.01 is for long pretraining: an epoch of 30 steps would replace a quarter of ImageNet's
# statistics, and the first validations, which decide about pruning, would use stale ones.
MOMENTUM = 0.1


@dataclass(frozen=True, kw_only=True)
class MaxViTT(Torchvision):
    """Torchvision("maxvit_t"), 30.9 M parameters, with a hidden layer and a quicker BatchNorm."""

    name: str = "maxvit_t"
    hidden: tuple[int, ...] = (1024,)
    bn_momentum: float | None = MOMENTUM

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.name == MaxViTT.name
        require(fits, f"backbone.name of MaxViTT is fixed; write Torchvision({self.name!r}) in the study file.")

    def check_size(self, image_size: int) -> None:
        # Attention partitions are 7 x 7, and the stem and four stages halve the size: 7 * 2**5.
        require(image_size % 224 == 0, f"data.image_size must be a multiple of 224 for MaxViTT, not {image_size}.")
        super().check_size(image_size)

    def published(self) -> str:
        return "bc5ab103d47a7c6c"  # the beginning of its sha256, which studies recorded before there were other models


@dataclass(frozen=True, kw_only=True)
class TinyMaxViT(PretrainedBackbone):
    """The same class with three blocks of one layer: 0.4 M parameters for 64 x 64 pixels.

    Its pretrained weights ship with the project; `python -m harness.garden.pretrain` trains such weights.
    """

    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.1
    stochastic_depth: float | None = 0.0
    bn_momentum: float | None = MOMENTUM

    def __post_init__(self) -> None:
        super().__post_init__()
        pretrained.check_file(self.weights)

    def check_size(self, image_size: int) -> None:
        require(image_size % 64 == 0, f"data.image_size must be a multiple of 64 for TinyMaxViT, not {image_size}.")

    def load(self, image_size: int) -> nn.Module:
        from torchvision.models.maxvit import MaxVit

        from harness.models.stochastic_depth import replace_stochastic_depth

        model = MaxVit(
            input_size=(image_size, image_size),
            stem_channels=24,
            block_channels=[24, 48, 96],
            block_layers=[1, 1, 1],
            head_dim=24,
            stochastic_depth_prob=self.stochastic_depth or 0.0,
            partition_size=4,
        )
        replace_stochastic_depth(model)
        if self.pretrained:
            file = self.weights or str(TINY_WEIGHTS)
            pretrained.load(model, pretrained.read(file), "classifier.5", file)
        return model

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        return ["stem.", "blocks.0.", "blocks.1.", "blocks.2.", "classifier."]

    def published(self) -> str:
        return pretrained.fingerprint(str(TINY_WEIGHTS))

    def licence(self) -> str:
        return "trained on flowers that this program drew"
