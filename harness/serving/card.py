"""The model card (Mitchell et al., "Model Cards for Model Reporting", 2019), beside the weights.

Its content comes from the storage and model.json, so equal results give an equal card.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.files import replace_file
from harness.base.packing import unpack
from harness.base.words import OBJECTIVES, percent
from harness.final.predictions import calibration_sentence, described
from harness.final.sentences import conclusion, selection_sentence, test_sentence
from harness.store import ledger

if TYPE_CHECKING:
    from harness.config.contracts import Dataset
    from harness.store.store import Store

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.j2")
UNKNOWN_LICENCE = "The licence of these images is not recorded; ask their authors before you share them."
WORST_CLASSES = 5


def write_card(name: str, data: Dataset, store: Store, folder: Path, program: str | None) -> None:
    """Write the card of the final model in `folder`, unless it is up to date.

    `program` is the name of the exported program beside it, None if there is none. Raises Halt if the disk is full.
    """
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    text = card(name, getattr(data, "licence", UNKNOWN_LICENCE), store, description, program).encode()
    path = folder / CARD
    if not path.is_file() or path.read_bytes() != text:
        replace_file(path, text)


def card(name: str, licence: str, store: Store, description: Mapping[str, Any], program: str | None) -> str:
    """Return the card as Markdown; `description` is the content of model.json."""
    from jinja2 import Environment, StrictUndefined

    facts, final = store.facts(), store.facts().final
    assert final is not None
    trial = next(each for each in store.trials() if each.number == final.trial)
    kept = facts.predictions
    remarks = [conclusion(store), selection_sentence(final)]
    if kept is not None:
        remarks.append(f"{calibration_sentence(described(kept))} This is the mean gap between confidence and accuracy.")
    # Values without the `plain` filter come from this project, or are checked: names of studies, fields and files.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"thousands": "{:,}".format, "percent": percent, "plain": _plain, "counted": _count}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        licence=licence,
        described=description,
        program=program,
        steps=description["preprocessing"],
        final=final,
        sentence=test_sentence(store),
        remarks=[*filter(None, remarks)],
        trial=trial,
        facts=facts,
        noun=OBJECTIVES[facts.objective],
        store=store,
        among=_among(store),
        openings=ledger.openings(store.ledger_lines()),
        worst=[] if kept is None else _worst_classes(kept, description["classes"]),
    )


def _among(store: Store) -> str:
    """Return how the trial was chosen, as a clause."""
    if (second := store.facts().rerank) is not None:
        return f" among the best {len(second['candidates'])}, retrained from fresh seeds"
    return " by the lower bound of its estimate from all of them" if (store.choice() or {}).get("estimates") else ""


def _worst_classes(kept: Mapping[str, Any], classes: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the classes with the lowest test accuracy, with correct and total images; perfect classes are omitted."""
    import numpy

    labels = unpack(kept["labels"], "uint16")
    hits = unpack(kept["seeds"][0]["predicted"], "uint16") == labels
    found = {int(label): hits[labels == label] for label in numpy.unique(labels)}
    worst = sorted((label for label, each in found.items() if not each.all()), key=lambda label: found[label].mean())
    return [(classes[label], int(found[label].sum()), len(found[label])) for label in worst[:WORST_CLASSES]]


def _plain(text: str) -> str:
    """Escape a user's text for Markdown: one line, without tags, links or emphasis."""
    signs = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return html.escape(signs, quote=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
