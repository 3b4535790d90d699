"""What each training of a study is called: in the storage's leases, in MLflow, and its checkpoint file."""

from __future__ import annotations


def trial_key(number: int) -> str:
    return f"trial-{number}"


def final_key(trial: int, seed_number: int) -> str:
    """The best trial is part of it: an extended study may find a better one and retrain that."""
    return f"final-seed-{seed_number}-of-trial-{trial}"


def base_key(trial: int, seed_number: int) -> str:
    """The base configuration, trained as the best one is, to compare with."""
    return f"base-seed-{seed_number}-of-trial-{trial}"


def rerank_key(trial: int, seed_number: int) -> str:
    """One of the best few, trained from a fresh seed to choose among them."""
    return f"rerank-seed-{seed_number}-of-trial-{trial}"


def audit_key(trial: int) -> str:
    """The name of the training that ends a pruned trial, as `harness.tracking.expected` names others."""
    return f"audit-of-trial-{trial}"
