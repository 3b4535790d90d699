"""The parts of a study's time, and the functions that belong to each, for `benchmarks.goodput`.

Imports nothing large, so that all of the study's imports are counted.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.clock import Clock

PARTS: dict[
    str, dict[str, list[str]]
] = {  # of innermost names the time is counted; what is named nowhere is "the rest"
    "training steps": {"harness.training.loop": ["train_step"]},
    "augmentation": {"harness.data.augment": ["augment"]},
    "validation": {place: ["logits_of", "measure"] for place in ("harness.training.loop", "harness.final.test_set")},
    "loop around the steps": {"harness.search.loop": ["fit"], "harness.final.retrain": ["fit"]},
    "data: decoding and cache": {"harness.study.start": ["content_of"]},
    "data: loading": {
        "harness.training.assemble": ["load_splits", "load_train_and_val"],
        "harness.final.test_set": ["load_test"],
    },
    "model and optimizer": {"harness.search.loop": ["assemble"], "harness.final.retrain": ["assemble"]},
    "deciding the runtime": {"harness.training.assemble": ["decide_runtime"]},
    "checkpoints": {
        "harness.training.checkpoint.Checkpoint": ["__init__", "save", "after_batch", "restore"],
        "harness.search.loop": ["remove", "identity_of"],
        "harness.final.retrain": ["remove", "identity_of"],
        "harness.study.stages": ["stale"],
    },
    "storage": {
        "harness.store.opening": ["open_store", "exists"],
        "harness.store.store.Store": [
            "attributes",
            "finished",
            "trials",
            "best",
            "has_final",
            "set_attribute",
            "set_as_leader",
        ],
        "harness.store.database": ["check_database", "check_writable"],
    },
    "storage: ask": {"harness.store.store.Store": ["ask"]},
    "storage: report, prune": {"harness.store.store.Store": ["report", "should_prune"]},
    "storage: tell": {"harness.store.store.Store": ["tell"]},
    "rehearsal of the sampler": {"harness.study.start": ["rehearse"]},
    "MLflow: opening": {"harness.tracking.mlflow.MLflowTracker": ["check", "start"]},
    "MLflow: runs": {
        "harness.tracking.mlflow.MLflowTracker": ["run"],
        "harness.tracking.writer.MLflowRun": ["epoch", "metrics", "text", "end"],
    },
    "MLflow: end of the study": {"harness.tracking.mlflow.MLflowTracker": ["finish", "interrupt"]},
    "environment, versions": {
        "harness.search.loop": ["environment"],
        "harness.final.retrain": ["environment"],
        "harness.tracking.expected": ["facts"],
        "harness.study.coordinator": ["_name_changes"],
    },
    "report": {"harness.study.coordinator": ["write_report"], "harness.report.overview": ["summary"]},
    "saving the model": {"harness.final.test_set": ["save_model"], "harness.final.retrain": ["fingerprint"]},
    "publishing the model": {"harness.study.coordinator": ["describe_model", "register"]},
    "display": {"harness.report.display.Display": ["show", "__enter__", "__exit__"]},
}


def study(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Run the demo in this process, everything new in `folder`; the seconds by name, until the command is done."""
    clock = Clock()
    clock.watch_imports()
    clock.watch_collector()
    gc.disable()  # as harness.cli.commands.process does
    from harness.cli.commands import main as command

    for name, places in PARTS.items():
        for place, attributes in places.items():
            clock.watch(name, place, *attributes)
    kept = ["--storage", f"sqlite:///{folder}/study.db", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    code = command(["run", "--study", "demo", "--set", f"data.cache={folder}/cache", *kept, *arguments])
    seconds = clock.stop()
    assert code == 0, code
    return seconds


def child() -> None:
    """A study as a process of its own: the folder and the command's further arguments are the process's arguments."""
    began, folder = time.time(), Path(sys.argv[1])
    seconds = study(folder, sys.argv[2:])
    (folder / "seconds.json").write_text(json.dumps({"seconds": seconds, "began": began, "ended": time.time()}))
    atexit._run_exitfuncs()  # the rest, too, as harness.cli.commands.process does
    os._exit(0)
