"""The accounts of a study's time: what of the harness is counted under which name, for `benchmarks.goodput`.

It imports nothing large, so that the imports that it counts are all of them.
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

PARTS = {  # of innermost names the time is counted; what is named nowhere is "the rest"
    "training steps": {"harness.trainer": ["train_step"]},
    "augmentation": {"harness.data.augment": ["augment"]},
    "validation": {"harness.trainer": ["evaluate"], "harness.final": ["logits_of", "measure"]},
    "loop around the steps": {"harness.objective": ["fit"], "harness.retraining": ["fit"]},
    "data: decoding and cache": {"harness.running": ["_prepare"]},
    "data: loading": {"harness.experiment": ["load_splits", "load_train_and_val"], "harness.final": ["load_test"]},
    "model and optimizer": {"harness.objective": ["assemble"], "harness.retraining": ["assemble"]},
    "deciding the engine": {"harness.experiment": ["decide_runtime"]},
    "checkpoints": {
        "harness.checkpoint.Checkpoint": ["__init__", "save", "after_batch", "restore"],
        "harness.objective": ["remove", "identity_of"],
        "harness.retraining": ["remove", "identity_of"],
        "harness.study": ["stale"],
    },
    "storage": {
        "harness.opening": ["open_store", "exists"],
        "harness.storage.Store": [
            "attributes",
            "finished",
            "trials",
            "best",
            "has_final",
            "set_attribute",
            "set_as_leader",
        ],
        "harness.database": ["check_database", "check_writable"],
    },
    "storage: ask": {"harness.storage.Store": ["ask"]},
    "storage: report, prune": {"harness.storage.Store": ["report", "should_prune"]},
    "storage: tell": {"harness.storage.Store": ["tell"]},
    "rehearsal of the sampler": {"harness.rehearsal": ["rehearse"]},
    "MLflow: opening": {"harness.mlflow_tracker.MLflowTracker": ["check", "start"]},
    "MLflow: runs": {
        "harness.mlflow_tracker.MLflowTracker": ["run"],
        "harness.mlflow_run.MLflowRun": ["epoch", "metrics", "text", "end"],
    },
    "MLflow: end of the study": {"harness.mlflow_tracker.MLflowTracker": ["finish", "interrupt"]},
    "environment, versions": {
        "harness.objective": ["environment"],
        "harness.retraining": ["environment"],
        "harness.tracking": ["facts"],
        "harness.coordinator": ["_name_changes"],
    },
    "report": {"harness.report": ["write_report"], "harness.overview": ["summary"]},
    "saving the model": {"harness.final": ["save_model"], "harness.retraining": ["fingerprint"]},
    "publishing the model": {"harness.coordinator": ["_describe_model", "_register"]},
    "display": {"harness.display.Display": ["show", "__enter__", "__exit__"]},
}


def study(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Run the demo in this process, everything new in `folder`; the seconds by name, until the command is done."""
    clock = Clock()
    clock.watch_imports()
    clock.watch_collector()
    gc.disable()  # as harness.cli.process does
    from harness.cli import main as command

    for name, places in PARTS.items():
        for place, attributes in places.items():
            clock.watch(name, place, *attributes)
    places = ["--storage", f"sqlite:///{folder}/study.db", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    code = command(["run", "--study", "demo", "--set", f"data.cache={folder}/cache", *places, *arguments])
    seconds = clock.stop()
    assert code == 0, code
    return seconds


def child() -> None:
    """A study as a process of its own: the folder and the command's further arguments are the process's arguments."""
    began, folder = time.time(), Path(sys.argv[1])
    seconds = study(folder, sys.argv[2:])
    (folder / "seconds.json").write_text(json.dumps({"seconds": seconds, "began": began, "ended": time.time()}))
    atexit._run_exitfuncs()  # the rest, too, as harness.cli.process does
    os._exit(0)
