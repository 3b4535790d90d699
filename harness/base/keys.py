"""Keys of a study's trainings, used by leases, MLflow runs and checkpoint files."""

from __future__ import annotations


def trial_key(number: int) -> str:
    return f"trial-{number}"


def final_key(trial: int, seed_number: int) -> str:
    """Return the key of a final training; an extended study may retrain another trial."""
    return f"final-seed-{seed_number}-of-trial-{trial}"


def base_key(trial: int, seed_number: int) -> str:
    """Return the key of a training of the base configuration, for comparison."""
    return f"base-seed-{seed_number}-of-trial-{trial}"


def rerank_key(trial: int, seed_number: int) -> str:
    """Return the key of a training that reranks one of the best trials."""
    return f"rerank-seed-{seed_number}-of-trial-{trial}"


def ablation_key(step: int, seed_number: int) -> str:
    """Return the key of a training with the first fields of the chosen trial, of which there are `step`."""
    return f"ablation-seed-{seed_number}-of-step-{step}"


def audit_key(trial: int) -> str:
    """Return the key of the training that completes a pruned trial."""
    return f"audit-of-trial-{trial}"


RETRAINING = {"final": final_key, "base": base_key, "rerank": rerank_key, "ablation": ablation_key}  # by kind
