"""The script that people write: a PyTorch loop, a DataLoader, Optuna on SQLite, MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlflow
import optuna
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.peers.job import Job, arguments, finished


def train(job: Job, model: nn.Module, loader: DataLoader[Any], base_lr: float) -> Iterator[float]:
    """Train epoch by epoch, yielding each one's mean loss."""
    optimizer = job.optimizer(model, base_lr)
    schedule = job.schedule(optimizer, len(loader))
    for _ in range(job.epochs):
        model.train()
        total, images_seen = 0.0, 0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels, label_smoothing=job.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
            images_seen += len(labels)
        yield total / images_seen


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    loss, correct, total = 0.0, 0, 0
    for images, labels in loader:
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
        total += len(labels)
    return loss / total, correct / total


def main() -> None:
    job, out = arguments()
    mlflow.set_tracking_uri(f"sqlite:///{out}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment(job.model, f"file://{out}/artifacts"))
    train_loader, val_loader = job.loader("train", train=True), job.loader("valid", train=False)

    def objective(trial: optuna.Trial) -> float:
        base_lr = trial.suggest_float("base_lr", 1e-5, 1e-1, log=True)
        dropout = trial.suggest_float("dropout", 0.0, 0.6)
        torch.manual_seed(trial.number)
        model = job.build(dropout)
        with mlflow.start_run(run_name=f"trial {trial.number}"):
            mlflow.log_params(trial.params)
            for epoch, train_loss in enumerate(train(job, model, train_loader, base_lr), 1):
                val_loss, accuracy = evaluate(model, val_loader)
                metrics = {"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": accuracy}
                mlflow.log_metrics(metrics, step=epoch)
                trial.report(accuracy, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return accuracy

    study = optuna.create_study(
        storage=f"sqlite:///{out}/study.db",
        study_name=job.model,
        direction="maximize",
        pruner=optuna.pruners.NopPruner(),
    )
    for configuration in job.configurations:
        study.enqueue_trial(configuration)
    study.optimize(objective, n_trials=len(job.configurations))

    torch.manual_seed(0)
    model = job.build(study.best_params["dropout"])
    with mlflow.start_run(run_name="final"):
        mlflow.log_params(study.best_params)
        both = job.loader("train", "valid", train=True)
        for epoch, train_loss in enumerate(train(job, model, both, study.best_params["base_lr"]), 1):
            mlflow.log_metrics({"train_loss": train_loss}, step=epoch)
        _, test = evaluate(model, job.loader("test", train=False))
        mlflow.log_metrics({"test_accuracy": test})
        torch.save(model.state_dict(), out / "model.pt")
        mlflow.log_artifact(str(out / "model.pt"))
    finished(out, [trial.value or 0.0 for trial in study.trials], test)


if __name__ == "__main__":
    main()
