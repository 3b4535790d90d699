"""Number formatting."""

from __future__ import annotations

A_DAY_SECONDS = 86_400
OBJECTIVES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "loss": "likelihood",  # exp(-loss), the geometric mean of the probabilities of the right classes
}


def metric_name(objective: str) -> str:
    """Return the objective's name as a metric's in MLflow."""
    return OBJECTIVES[objective].lower().replace(" ", "_")


def percent(share: float | None) -> str:
    """Format a share as a percentage; a dash if it is unknown."""
    return "–" if share is None else f"{100 * share:.2f} %"


def money(amount: float) -> str:
    """Format an amount of money, in any currency: 1,234.50, 0.50, 0.0042."""
    return f"{amount:,.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.2g}"


def rate(price: float) -> str:
    """Format a price with all its decimals, and at least two."""
    return f"{price:,.2f}" if round(price, 2) == price else f"{price:,}"


def duration(seconds: float) -> str:
    """Format seconds: 8.3 s, 4 min 10 s, 3 h 20 min, 2.5 days."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds / A_DAY_SECONDS:.1f} days"
