"""Pretrain the tiny MaxViT: `python -m harness.garden.pretrain`, about fifteen minutes on two cores.

It learns 64 drawn species that are not in the demo, with the same `assemble` and `fit` as every trial. Weights are
stored in float16, except vectors (norms, biases, running statistics), and without the class layer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from harness.config.train import AugmentConfig, OptimConfig, RuntimeConfig, TrainConfig
from harness.data.splits import prepare
from harness.garden.dataset import Garden
from harness.garden.drawing import DRAWING_VERSION
from harness.models.maxvit import TINY_WEIGHTS, TinyMaxViT
from harness.models.pretrained import COMPUTED
from harness.training.assemble import assemble, decide_runtime
from harness.training.loop import fit

GARDEN = Garden(species="pretraining", train_per_class=100, val_per_class=10, test_per_class=1, seed=1)
CONFIG = TrainConfig(
    data=GARDEN,
    backbone=TinyMaxViT(pretrained=False, hidden=(), dropout=0.0),
    augment=AugmentConfig(crop_scale=(0.5, 1.0), rotation_degrees=180, brightness=0.1, saturation=0.1),
    optim=OptimConfig(base_lr=3e-3, depth_lr_mult=1.0, weight_decay=0.05, warmup_epochs=2),
    runtime=RuntimeConfig(precision="fp32", channels_last="on", compile="off"),
    batch_size=64,
    epochs=25,
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the tiny MaxViT on drawn species.")
    parser.add_argument("--output", type=Path, default=TINY_WEIGHTS, help="the file to write (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs, help="default: %(default)s")
    parser.add_argument("--images-per-species", type=int, default=100, help="default: %(default)s")
    args = parser.parse_args(arguments)
    data = dataclasses.replace(GARDEN, train_per_class=args.images_per_species)
    optim = dataclasses.replace(CONFIG.optim, warmup_epochs=min(CONFIG.optim.warmup_epochs, args.epochs))
    config = dataclasses.replace(CONFIG, data=data, optim=optim, epochs=args.epochs)
    prepare(data, config.backbone.preprocessing())
    training = assemble(config, decide_runtime(config, None), seed=0)
    for result in fit(training):
        assert result.val is not None
        print(
            f"epoch {result.epoch:2d}/{config.epochs}  loss {result.train.loss:.3f}  "
            f"val {result.val.correct}/{result.val.total}  {result.seconds:.0f} s",
            flush=True,
        )
    state = {
        name: tensor.half().contiguous() if tensor.ndim > 1 else tensor.contiguous()
        for name, tensor in training.model.state_dict().items()
        if not name.startswith("classifier.5.") and not name.endswith(COMPUTED)
    }
    save_file(state, args.output, metadata={"drawing_version": str(DRAWING_VERSION)})
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
