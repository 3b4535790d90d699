"""Measure what cached features gain a head-only study: seconds per trial, against the whole model.

    python -m benchmarks.head_only --data-root DIR [--trials 50] [--limit N] [--views K] [--workers 1 2]

Uses studies/flowers102_head.py with MaxViT-T and random weights, for which the arithmetic is the same. The whole
model's trial is extrapolated from its real steps (the backbone is frozen, so without its gradient) and validation
batches, in turns with whole trials on cached features. Then the real command runs all trials, once with each number of
workers.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Figures, alternate, ratios, script
from harness.config import find as catalogue
from harness.config.study import Study
from harness.data.splits import load_split, prepare
from harness.search.loop import search
from harness.store.opening import open_store, read_store
from harness.training.assemble import assemble, decide_runtime
from harness.training.features import keep_features
from harness.training.loop import CPU_BATCH, EVALUATION_BATCH, Training, fit, logits_of
from harness.training.step import Runtime, predict, train_step

PROJECT = Path(__file__).parent.parent
ROUNDS = 3
QUICK_DATA = ["data.train_per_class=8", "data.val_per_class=8", "data.test_per_class=1"]


def full(data_root: str, trials: int, limit: int | None, views: int | None, workers: list[int]) -> None:
    settings = ["backbone.pretrained=false", *([] if limit is None else [f"data.limit={limit}"])]
    settings += [] if views is None else [f"feature_views={views}"]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        study = catalogue.find("flowers102_head").study.with_settings(settings).located(home, data_root, "cpu")
        prepare(study.train.data, study.train.backbone.preprocessing())
        runtime = decide_runtime(study.train, None)
        print(f"runtime: {runtime.to_dict()}")
        extraction(study, runtime)
        per_trial(study, runtime)
        precision = "bf16" if runtime.bf16 else "fp32"
        layout = "on" if runtime.channels_last else "off"
        decided = [f"runtime.precision={precision}", f"runtime.channels_last={layout}"]
        (home / "studies").mkdir()
        (home / "studies" / "flowers102_head.py").write_text((PROJECT / "studies" / "flowers102_head.py").read_text())
        for count in workers:
            command(home, Path(data_root).resolve(), trials, [*settings, *decided], count)


def extraction(study: Study, runtime: Runtime) -> None:
    """Computes all features of train and val, and says how fast."""
    assert study.train.feature_views is not None
    versions = 1 + study.train.feature_views
    count = versions * sum(
        len(load_split(study.train.data, study.train.backbone.preprocessing(), name)) for name in ("train", "val")
    )
    start = time.perf_counter()
    keep_features(study.train, runtime, with_validation=True)
    seconds = time.perf_counter() - start
    print(f"features, once: {count} images and views in {seconds:.0f} s, {count / seconds:.1f} per second", flush=True)


def per_trial(study: Study, runtime: Runtime) -> None:
    """Trials on features by turns with steps through the whole model, their ratio, and how far the logits differ."""
    config = study.train
    whole = assemble(dataclasses.replace(config, feature_views=None), runtime, 0)
    assert whole.val is not None
    batches = itertools.cycle(torch.arange(len(whole.train)).split(config.batch_size))
    size = CPU_BATCH if runtime.device.type == "cpu" else EVALUATION_BATCH  # as the harness evaluates
    parts = itertools.cycle(whole.val.parts(size, runtime))
    generator = torch.Generator().manual_seed(0)
    whole.model.eval()
    last: list[Training] = []

    def step() -> None:
        chosen = next(batches)
        images = whole.train.batch(chosen, config, runtime, generator)
        labels = whole.train.labels[chosen]
        train_step(whole.model, images, labels, whole.optimizer, runtime, label_smoothing=0.1, clip_norm=1.0)

    def validate() -> float:
        images = next(parts)
        start = time.perf_counter()
        predict(whole.model, images, runtime)
        return (time.perf_counter() - start) / len(images)

    def trial() -> None:
        last[:] = [assemble(config, runtime, 0)]
        list(fit(last[0]))

    def trial_on_one_thread() -> None:  # for matrices this small, waiting for a second one may cost more than it does
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        trial()
        torch.set_num_threads(before)

    step()
    contestants = {"step": step, "validation": validate, "trial": trial, "one thread": trial_on_one_thread}
    taken = alternate(contestants, ROUNDS)
    steps = -(-len(whole.train) // config.batch_size)
    epochs = config.epochs
    live = Figures(
        tuple(
            epochs * (steps * one + len(whole.val) * image)
            for one, image in zip(taken["step"].values, taken["validation"].values, strict=True)
        )
    )
    print(f"whole model: a step of {min(config.batch_size, len(whole.train))} images {taken['step'].text(digits=2)}")
    print(f"whole model: validation per image {taken['validation'].text(digits=4)}")
    print(f"whole model: a trial of {epochs} epochs {live.text(digits=0)}, extrapolated")
    print(f"features: a trial of {epochs} epochs {taken['trial'].text(digits=2)}")
    print(f"features: the same on one thread {taken['one thread'].text(digits=2)}")
    print(f"ratio {ratios(live, taken['trial']).text('times', 0)}")
    features: Any = last[0].val
    first = dataclasses.replace(features, features=features.features[:128], labels=features.labels[:128])
    images = load_split(config.data, config.backbone.preprocessing(), "val")
    images = dataclasses.replace(images, images=images.images[:128], labels=images.labels[:128])
    kept, seen = logits_of(last[0].learner, first, runtime), logits_of(last[0].model, images, runtime)
    print(f"largest |cached - live| of {kept.numel()} logits: {(kept - seen).abs().max():.1e}", flush=True)


def command(home: Path, data_root: Path, trials: int, settings: list[str], workers: int) -> None:
    """The real command, until the last trial's end and until its own end."""
    url = f"sqlite:///{home}/studies/{workers}.db"
    words = [sys.executable, "-u", str(PROJECT / "run_study.py"), "--study", "flowers102_head", "--trials", str(trials)]
    words += ["--data-root", str(data_root), "--device", "cpu", *(w for each in settings for w in ("--set", each))]
    words += ["--workers", str(workers), "--storage", url]
    start = time.perf_counter()
    process = subprocess.Popen(words, cwd=home, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    began = searched = 0.0
    for line in process.stdout:
        if line.startswith("trial ") and "epoch" not in line:
            searched = time.perf_counter() - start
        began = began or (time.perf_counter() - start if line.startswith("Study ") else 0.0)
    if process.wait():
        sys.exit(f"error: the command exited with {process.returncode}.")
    ended = time.perf_counter() - start
    with read_store("flowers102_head", url) as store:
        seconds = Figures(tuple(trial.seconds or 0.0 for trial in store.trials()))
    print(f"{workers} workers: {trials} trials in {searched:.1f} s, including the start ({began:.1f} s)")
    print(f"{workers} workers: a trial {seconds.text()}")
    print(f"{workers} workers: final run and reports {ended - searched:.1f} s, including the test images' features")


def quick() -> dict[str, float]:
    """The demo's model and images, two trials of three epochs through the real objective."""
    with tempfile.TemporaryDirectory() as folder:
        study = catalogue.find("demo").study.with_settings(["optim.depth_lr_mult=0", "epochs=3", *QUICK_DATA])
        study = study.located(Path(folder), None, "cpu")
        study = dataclasses.replace(study, trials=2, space={"backbone.dropout": study.space["backbone.dropout"]})
        prepare(study.train.data, study.train.backbone.preprocessing())
        runtime = decide_runtime(study.train, None)
        kept = dataclasses.replace(study, train=dataclasses.replace(study.train, feature_views=2))
        keep_features(kept.train, runtime, with_validation=False)
        number = itertools.count()

        def run(study: Study) -> None:
            place = Path(folder) / str(next(number))
            place.mkdir()
            with open_store(study, f"sqlite:///{place}/study.db") as store:
                list(search(study, store, runtime, place))

        taken = alternate({"live": lambda: run(study), "kept": lambda: run(kept)}, 2)
    return {"trial_live_over_kept": ratios(taken["live"], taken["kept"]).median}


if __name__ == "__main__":
    script(
        full,
        quick,
        {
            "--data-root": {"required": False, "default": "data", "help": "holds torchvision's flowers-102/"},
            "--trials": {"type": int, "default": 50},
            "--limit": {"type": int, "help": "maximum images per split (default: all)"},
            "--workers": {"type": int, "nargs": "+", "default": [1], "help": "number of workers; several run in turn"},
            "--views": {"type": int, "help": "augmented views per training image (default: the study's)"},
        },
    )
