"""MaxViT (Tu et al., 2022) from torchvision: the published MaxViT-T, and a tiny one for the demo and the tests.

Nothing here imports torch before a model is built, so that a study loads quickly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.base.errors import InputError
from harness.config.contracts import Backbone
from harness.config.space import check_types
from harness.config.train import require
from harness.models.head import check_head, check_momentum, check_probability, with_head

if TYPE_CHECKING:
    from torch import nn

# The published file, for error messages; torch checks the first digits of the hash after a download.
WEIGHTS_FILE = "maxvit_t-bc5ab103.pth"
WEIGHTS_BYTES = 124_538_661
WEIGHTS_TENSORS = 582
WEIGHTS_SHA256 = "bc5ab103d47a7c6c02dc35bf65796b3a6cccf3d51bce330326dbdc634a3ac0e1"

MAKE = "python -m harness.garden.pretrain"
TINY_WEIGHTS = Path(__file__).with_name("tiny_maxvit.safetensors")


@dataclass(frozen=True, kw_only=True)
class MaxViTT(Backbone):
    """torchvision's `maxvit_t`, 30.9 M parameters, with the weights IMAGENET1K_V1 unless `pretrained` is false."""

    pretrained: bool = True
    hidden: tuple[int, ...] = (1024,)
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    bn_momentum: float = 0.1  # see `_norm`

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, image_size: int) -> None:
        # Attention partitions are 7 x 7, and the stem and four stages halve the size: 7 * 2**5.
        require(image_size % 224 == 0, f"data.image_size must be a multiple of 224 for MaxViTT, not {image_size}.")
        if self.pretrained:
            _published_weights()

    def build(self, classes: int, image_size: int) -> nn.Module:
        """Build the model; parameters without pretrained weights use torch's global generator."""
        from torchvision.models import maxvit_t

        from harness.models.stochastic_depth import replace_stochastic_depth

        model = maxvit_t(weights=None, input_size=(image_size, image_size), norm_layer=_norm(self.bn_momentum))
        replace_stochastic_depth(model, self.stochastic_depth)  # `maxvit_t` accepts only its own 0.2
        if self.pretrained:
            model.load_state_dict(_published_weights())
        return with_head(model, self.hidden, self.dropout, classes)

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        return depth_prefixes(by, layers=(2, 2, 5, 2))

    def fingerprint(self) -> str:
        return WEIGHTS_SHA256[:16] if self.pretrained else "none"


@dataclass(frozen=True, kw_only=True)
class TinyMaxViT(Backbone):
    """The same class with three blocks of one layer: 0.4 M parameters for 64 x 64 pixels.

    Its pretrained weights ship with the project; `python -m harness.garden.pretrain` recreates them.
    """

    pretrained: bool = True
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.1
    stochastic_depth: float = 0.0
    bn_momentum: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, image_size: int) -> None:
        require(image_size % 64 == 0, f"data.image_size must be a multiple of 64 for TinyMaxViT, not {image_size}.")
        if self.pretrained:
            require(TINY_WEIGHTS.is_file(), f"{TINY_WEIGHTS} is missing; create it with `{MAKE}`.")

    def build(self, classes: int, image_size: int) -> nn.Module:
        """Build the model; parameters without pretrained weights use torch's global generator."""
        from torchvision.models.maxvit import MaxVit

        from harness.models.stochastic_depth import replace_stochastic_depth

        model = MaxVit(
            input_size=(image_size, image_size),
            stem_channels=24,
            block_channels=[24, 48, 96],
            block_layers=[1, 1, 1],
            head_dim=24,
            stochastic_depth_prob=self.stochastic_depth,
            partition_size=4,
            norm_layer=_norm(self.bn_momentum),
        )
        replace_stochastic_depth(model)
        if self.pretrained:
            load_tiny_weights(model)
        return with_head(model, self.hidden, self.dropout, classes)

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        return depth_prefixes(by, layers=(1, 1, 1))

    def fingerprint(self) -> str:
        return hashlib.sha256(TINY_WEIGHTS.read_bytes()).hexdigest()[:16] if self.pretrained else "none"


def check_fields(backbone: MaxViTT | TinyMaxViT) -> None:
    check_types(backbone, "backbone.")
    check_head(backbone.hidden, backbone.dropout)
    check_probability("stochastic_depth", backbone.stochastic_depth)
    check_momentum(backbone.bn_momentum)


def depth_prefixes(by: Literal["block", "layer"], layers: tuple[int, ...]) -> list[str]:
    """Stem, then every block (or every layer of every block), then the head."""
    blocks = [f"blocks.{block}." for block in range(len(layers))]
    if by == "layer":
        blocks = [f"blocks.{block}.layers.{layer}." for block, count in enumerate(layers) for layer in range(count)]
    return ["stem.", *blocks, "classifier."]


def _norm(momentum: float) -> Any:
    """BatchNorm as torchvision builds it, but with our momentum.

    torchvision's 0.01 is for long pretraining: an epoch of 30 steps would replace a quarter of ImageNet's statistics,
    and the first validations, which decide about pruning, would use stale ones.
    """
    from torch import nn

    return partial(nn.BatchNorm2d, eps=1e-3, momentum=momentum)


def _published_weights() -> dict[str, Any]:
    """Return the checkpoint from torch's hub cache, downloaded if missing. Raises InputError if that fails."""
    from urllib.error import URLError

    import torch
    from torchvision.models import MaxVit_T_Weights

    place = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    wanted = f"{place} ({WEIGHTS_BYTES:,} bytes, sha256 {WEIGHTS_SHA256})"
    # By default torchvision calls torch.load without weights_only, which can execute code.
    weights = MaxVit_T_Weights.IMAGENET1K_V1
    try:
        state: dict[str, Any] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise InputError(
            f"The pretrained weights are missing and cannot be downloaded ({error}); save the file as {wanted}, "
            "or train from scratch with --set backbone.pretrained=false."
        ) from error
    # A damaged pickle can raise any exception.
    except Exception as error:
        raise InputError(f"The weights file is damaged ({error}); replace it with {wanted}.") from error
    if not isinstance(state, dict) or "classifier.5.weight" not in state or len(state) != WEIGHTS_TENSORS:
        raise InputError(f"The weights file holds another model; replace it with {wanted}.")
    return state


def load_tiny_weights(model: nn.Module) -> None:
    """Load all but the class layer from the shipped file, stored as float16, trained in float32."""
    from safetensors.torch import load_file

    state = {name: tensor.float() for name, tensor in load_file(TINY_WEIGHTS).items()}
    absent = model.load_state_dict(state, strict=False)
    unexpected = [name for name in absent.missing_keys if not is_rebuilt(name)]
    if unexpected or absent.unexpected_keys:
        raise InputError(f"{TINY_WEIGHTS} does not fit the model; recreate it with `{MAKE}`.")


def is_rebuilt(name: str) -> bool:
    """Return whether a tensor is not loaded: the class layer, an index table or a counter."""
    return name.startswith("classifier.5.") or name.endswith(("relative_position_index", "num_batches_tracked"))
