"""The same with Lightning's Trainer and its MLFlowLogger, and Optuna on SQLite.

What of Lightning's defaults costs time and is not needed here is off: sanity check, progress bar, model summary and
checkpoints.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import optuna
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import MLFlowLogger

from benchmarks.peers.job import Job, arguments, finished


class Classifier(lightning.LightningModule):
    def __init__(self, job: Job, base_lr: float, dropout: float) -> None:
        super().__init__()
        self.save_hyperparameters({"base_lr": base_lr, "dropout": dropout})
        self.job, self.base_lr = job, base_lr
        self.model = job.build(dropout)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.job.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self._evaluate("val", *batch)

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self._evaluate("test", *batch)

    def _evaluate(self, name: str, images: torch.Tensor, labels: torch.Tensor) -> None:
        logits = self.model(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        values = {f"{name}_loss": F.cross_entropy(logits, labels), f"{name}_accuracy": accuracy}
        self.log_dict(values, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        optimizer = self.job.optimizer(self.model, self.base_lr)
        steps = int(self.trainer.estimated_stepping_batches) // self.job.epochs
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.job.schedule(optimizer, steps), "interval": "step"},
        }


class Pruning(lightning.Callback):
    """As in Optuna's integration for Lightning: report after each validation, and stop when the pruner says so."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def on_validation_end(self, trainer: lightning.Trainer, _module: lightning.LightningModule) -> None:
        self._trial.report(trainer.callback_metrics["val_accuracy"].item(), trainer.current_epoch)
        if self._trial.should_prune():
            raise optuna.TrialPruned


def trainer_of(job: Job, out: Path, name: str, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    logger = MLFlowLogger(job.model, name, f"sqlite:///{out}/mlflow.db", artifact_location=f"file://{out}/artifacts")
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=job.epochs,
        gradient_clip_val=job.clip_norm,
        logger=logger,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    job, out = arguments()
    train_loader, val_loader = job.loader("train", train=True), job.loader("valid", train=False)

    def objective(trial: optuna.Trial) -> float:
        base_lr = trial.suggest_float("base_lr", 1e-5, 1e-1, log=True)
        dropout = trial.suggest_float("dropout", 0.0, 0.6)
        lightning.seed_everything(trial.number, verbose=False)
        trainer = trainer_of(job, out, f"trial {trial.number}", [Pruning(trial)])
        trainer.fit(Classifier(job, base_lr, dropout), train_loader, val_loader)
        return trainer.callback_metrics["val_accuracy"].item()

    study = optuna.create_study(
        storage=f"sqlite:///{out}/study.db",
        study_name=job.model,
        direction="maximize",
        pruner=optuna.pruners.NopPruner(),
    )
    for configuration in job.configurations:
        study.enqueue_trial(configuration)
    study.optimize(objective, n_trials=len(job.configurations))

    lightning.seed_everything(0, verbose=False)
    model = Classifier(job, **study.best_params)
    trainer = trainer_of(job, out, "final", [])
    trainer.fit(model, job.loader("train", "valid", train=True))
    test = trainer.test(model, job.loader("test", train=False), verbose=False)[0]["test_accuracy"]
    torch.save(model.model.state_dict(), out / "model.pt")
    trainer.logger.experiment.log_artifact(trainer.logger.run_id, str(out / "model.pt"))
    finished(out, [trial.value or 0.0 for trial in study.trials], test)


if __name__ == "__main__":
    main()
