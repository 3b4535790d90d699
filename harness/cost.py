"""What a search took, and what pruning saved of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.words import duration

if TYPE_CHECKING:
    from harness.storage import TrialRecord


def cost(trials: Sequence[TrialRecord], definition: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and epochs of the search; `saved_seconds` is what the epochs that pruning left out would have taken.

    Each at the mean of its own trial's epochs. `saved_share` is their part of what the search would have taken without
    pruning. Trials that have not ended count with the epochs that are recorded, which are none before they end.
    """
    spent = sum(trial.seconds or 0.0 for trial in trials)
    left_out, saved = 0, 0.0
    for trial in trials:
        planned = trial.params.get("epochs", definition.get("epochs"))
        if trial.state == "pruned" and trial.epochs and planned is not None:
            missing = max(planned - len(trial.epochs), 0)
            left_out += missing
            saved += missing * sum(epoch.seconds for epoch in trial.epochs) / len(trial.epochs)
    return {
        "seconds": spent,
        "epochs": sum(len(trial.epochs) for trial in trials),
        "pruned": sum(trial.state == "pruned" for trial in trials),
        "epochs_not_run": left_out,
        "saved_seconds": saved,
        "saved_share": saved / (spent + saved) if spent + saved else 0.0,
    }


def cost_sentences(found: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    lines = [f"The trials took {duration(found['seconds'])} for {found['epochs']:,} epochs."]
    if found["pruned"]:
        lines.append(
            f"Pruning ended {found['pruned']:,} of them early and left out {found['epochs_not_run']:,} epochs, about "
            f"{duration(found['saved_seconds'])}: {100 * found['saved_share']:.0f} % of what the search would "
            "have taken."
        )
    return lines
