"""The same with Ray Tune: its Optuna search, its ASHA (with a grace of all epochs, so that nothing is pruned), MLflow.

`python -m benchmarks.peers.ray_study JOB OUT TRIALS_AT_A_TIME`: the cores are shared out evenly among them.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import ray
import torch
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from benchmarks.peers.job import Job, arguments, finished
from benchmarks.peers.plain import evaluate, train


def trainable(config: dict[str, Any], job: Job, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # With two trials at a time both cores are busy training: the loading is done in between, without further processes.
    workers = 2 if threads > 1 else 0
    train_loader = job.loader("train", train=True, workers=workers)
    val_loader = job.loader("valid", train=False, workers=workers)
    model = job.build(config["dropout"])
    for train_loss in train(job, model, train_loader, config["base_lr"]):
        val_loss, accuracy = evaluate(model, val_loader)
        tune.report({"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": accuracy})


def main() -> None:
    job, out = arguments()
    at_a_time = int(sys.argv[3])
    cores = os.cpu_count() or 1
    threads = max(cores // at_a_time, 1)
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    search = OptunaSearch(
        space={"base_lr": tune.loguniform(1e-5, 1e-1), "dropout": tune.uniform(0.0, 0.6)},
        metric="val_accuracy",
        mode="max",
        points_to_evaluate=job.configurations,
    )
    tracking = MLflowLoggerCallback(
        tracking_uri=f"sqlite:///{out}/mlflow.db", experiment_name=job.model, save_artifact=False
    )
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, job=job, threads=threads), {"cpu": threads}),
        tune_config=tune.TuneConfig(
            num_samples=len(job.configurations),
            search_alg=ConcurrencyLimiter(search, at_a_time),
            scheduler=ASHAScheduler(
                metric="val_accuracy", mode="max", max_t=job.epochs + 1, grace_period=job.epochs + 1
            ),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name=job.model, storage_path=str(out), callbacks=[tracking], verbose=0),
    )
    results = tuner.fit()
    best = results.get_best_result("val_accuracy", "max").config

    torch.manual_seed(0)
    model = job.build(best["dropout"])
    for _ in train(job, model, job.loader("train", "valid", train=True), best["base_lr"]):
        pass
    _, test = evaluate(model, job.loader("test", train=False))
    torch.save(model.state_dict(), out / "model.pt")
    order = [(each["base_lr"], each["dropout"]) for each in job.configurations]
    values = {(each.config["base_lr"], each.config["dropout"]): each.metrics["val_accuracy"] for each in results}
    finished(out, [values[each] for each in order], test)
    ray.shutdown()


if __name__ == "__main__":
    main()
