"""The ledger of a study: every opening of the test set, a hash chain of lines.

An edited, removed or moved line breaks the chain from there on. The chain guards against accidents and small
"improvements", not against a user who rebuilds the whole ledger, which is in the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.config.final_result import FinalResult

OPENED, RESULT = "opened", "result"
Line = dict[str, Any]


def appended(lines: Sequence[Line], uid: str, entry: Line) -> list[Line]:
    """Return the ledger with one more line. The first line is chained to `uid`, the study's."""
    line = {"line": len(lines) + 1, **entry, "previous": lines[-1]["hash"] if lines else _sha256(uid)}
    return [*lines, line | {"hash": _hash(line)}]


def fault(lines: Any, uid: str, known: str | None = None) -> str | None:
    """Return what is wrong with a ledger, as a clause; None if no line was changed.

    `lines` is the stored value, of any type. `known` is the hash of a line that must exist: the line that was written
    with the final result.
    """
    if not isinstance(lines, list):
        return "the test ledger was changed: it is not a list of lines"
    previous = _sha256(uid)
    for number, line in enumerate(lines, 1):
        placed = isinstance(line, dict) and line.get("line") == number and line.get("previous") == previous
        if not placed or line.get("hash") != _hash(line):
            return f"line {number} of the test ledger was changed"
        previous = line["hash"]
    if known is not None and known not in {line["hash"] for line in lines}:
        return f"the test ledger ends after line {len(lines)}, and the final result's line is missing"
    return None


def difference(lines: Sequence[Line], final: FinalResult) -> str | None:
    """Return how a final result differs from its ledger line; None if they agree, or it has no line.

    The line holds the counts and weights of each seed, and the final result must follow from them.
    """
    line = next((line for line in lines if line["hash"] == final.ledger), None)
    if line is None:
        return None
    if line["event"] != RESULT:
        return f"the final result names line {line['line']} of the test ledger, which is not a result"
    correct, total = (sum(seed[key] for seed in line["seeds"]) for key in ("correct", "total"))
    shown = final.correct, final.total, final.accuracy, final.trial
    if seeds_of(final) == line["seeds"] and shown == (correct, total, correct / total, line["trial"]):
        return None
    return f"the final result differs from line {line['line']} of the test ledger"


def seeds_of(final: FinalResult) -> list[dict[str, Any]]:
    """Return the seeds as a result's ledger line stores them."""
    return [{key: getattr(seed, key) for key in ("seed", "correct", "total", "weights")} for seed in final.per_seed]


def readable(lines: Any) -> list[Line]:
    """Return the lines with the fields of an opening or a result. `fault` names the others."""
    return [line for line in lines if _is_line(line)] if isinstance(lines, list) else []


def _is_line(line: Any) -> bool:
    kinds = {"line": int, "event": str, "trial": int, "time": str, "commit": str, "hash": str}
    if not isinstance(line, dict) or not all(isinstance(line.get(name), kind) for name, kind in kinds.items()):
        return False
    if line["event"] != RESULT:
        return isinstance(line.get("reason"), str | None)
    seeds = line.get("seeds")
    return isinstance(seeds, list) and all(
        isinstance(seed, dict) and isinstance(seed.get("correct"), int) and isinstance(seed.get("total"), int)
        for seed in seeds
    )


def openings(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that opened the test set."""
    return [line for line in lines if line["event"] == OPENED]


def results(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that record a result."""
    return [line for line in lines if line["event"] == RESULT]


def _hash(line: Line) -> str:
    return _sha256(json.dumps({key: value for key, value in line.items() if key != "hash"}, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
