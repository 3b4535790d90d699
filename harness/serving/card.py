"""The model card (Mitchell et al., "Model Cards for Model Reporting", 2019) that lies beside the weights.

Everything in it comes from the storage and from model.json, so equal results give an equal card.
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
from harness.base.words import percent
from harness.final.model_files import is_tested
from harness.final.predictions import calibration_sentence, described
from harness.final.sentences import conclusion, final_sentence, selection_sentence
from harness.store import ledger

if TYPE_CHECKING:
    from harness.config.contracts import Dataset
    from harness.config.final_result import FinalResult, SeedResult
    from harness.store.store import Store, TrialRecord

CARD = "README.md"
UNKNOWN_LICENCE = "Nothing is recorded about the licence of these images; ask who took them before passing on."
RETRAINED = (
    " These weights were trained again from that seed after the tested ones were lost, and differ from them by what "
    "another machine computes otherwise; the results below are those of the tested ones."
)
WORST_CLASSES = 5


def write_card(name: str, data: Dataset, store: Store, folder: Path, program: str | None) -> None:
    """Write the card of the final model in `folder`, unless it says the same already.

    `program` is the name of the exported program beside it, None when there is none. Raises Halt when there is no room.
    """
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    text = card(name, getattr(data, "licence", UNKNOWN_LICENCE), store, description, program).encode()
    path = folder / CARD
    if not path.is_file() or path.read_bytes() != text:
        replace_file(path, text)


def card(name: str, licence: str, store: Store, description: Mapping[str, Any], program: str | None) -> str:
    """The card in Markdown; `description` is what model.json says."""
    final = store.facts().final
    assert final is not None
    trial = next(each for each in store.trials() if each.number == final.trial)
    sections = {
        f"Model of study {name}": _what(description, final),
        "Use": _use(description, program),
        "Results": _results(store, final),
        "Data": _data(store, trial, final, description, licence),
        "How it was made": _protocol(store, trial, final),
        "Limits": _limits(store, description, final),
    }
    first, *rest = (f"{title}\n\n{body}\n" for title, body in sections.items())
    return "\n".join([f"# {first}", *(f"## {each}" for each in rest)])


def _what(description: Mapping[str, Any], final: FinalResult) -> str:
    backbone, size = description["configuration"]["backbone.type"], description["preprocessing"]["centre_crop"]
    return (
        f"It tells {len(description['classes'])} classes apart in images of {size} x {size} pixels. Backbone: "
        f"{backbone}; weights: those of seed {description['test']['seed']} of {len(final.per_seed)}, fixed before "
        "the test set was opened. The weights are in `model.safetensors`; classes, preprocessing and the whole "
        f"configuration are in `model.json`.{'' if is_tested(description) else RETRAINED}"
    )


def _use(description: Mapping[str, Any], program: str | None) -> str:
    steps = description["preprocessing"]
    size, mean, std = steps["centre_crop"], list(steps["mean"]), list(steps["std"])
    preprocessing = (
        f"Preprocessing: RGB, upright, the short side resized to {steps['resize_short_side']} pixels "
        f"({steps['interpolation']}), the centre square of {size} pixels, values from 0 to 1 minus {mean}, divided by "
        f"{std}. The output is logits; softmax makes probabilities of them."
    )
    if program is None:
        return preprocessing
    code = [
        "import json, torch",
        "from PIL import Image, ImageOps",
        "from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor",
        "",
        # Not every format: for PostScript, whatever the file's name is, Pillow starts a program.
        'image = ImageOps.exif_transpose(Image.open("photo.jpg", formats=["JPEG", "PNG"])).convert("RGB")',
        f"steps = [Resize({size}, InterpolationMode.BICUBIC), CenterCrop({size}), ToTensor()]",
        f"pixels = Compose([*steps, Normalize({mean}, {std})])(image)",
        f'logits = torch.export.load("{program}").module()(pixels[None])',
        'print(json.load(open("model.json"))["classes"][logits.argmax()])',
    ]
    block = "\n".join(["```python", *code, "```"])
    kept = (
        f"`{program}` is a program of torch.export. It holds no code and no pickles, needs torch alone, and takes any "
        "number of images at a time, float32 [B, 3, height, width] on the CPU."
    )
    return f"{block}\n\n{preprocessing}\n\n{kept}"


def _results(store: Store, final: FinalResult) -> str:
    rows = [_row(str(each.seed), each) for each in final.per_seed]
    if (base := final.base) is not None:
        rows += [_row(f"base configuration, {each.seed}", each) for each in base.per_seed]
    head = ["seed", "correct", "test images", "accuracy", "balanced over the classes"]
    remarks = [final_sentence(final), _table(head, rows), conclusion(store), selection_sentence(final)]
    return "\n\n".join(filter(None, [*remarks, _calibration(store)]))


def _row(name: str, result: SeedResult) -> list[str]:
    counts = f"{result.correct:,}", f"{result.total:,}"
    return [name, *counts, percent(result.accuracy), percent(result.balanced_accuracy)]


def _calibration(store: Store) -> str | None:
    """How far confidence is to be believed, in the words of the report; None where none is kept."""
    kept = store.facts().predictions
    if kept is None:
        return None
    return (
        f"{calibration_sentence(described(kept))} That is how far the highest probability is from how often such "
        "answers are right."
    )


def _data(store: Store, trial: TrialRecord, final: FinalResult, description: Mapping[str, Any], licence: str) -> str:
    last = trial.epochs[-1]
    counts = [f"{last.train.total:,} to train on"]
    counts += [] if last.val is None else [f"{last.val.total:,} to validate on"]
    counts += [f"{final.images:,} to test on"]
    text = f"{description['configuration']['data.type']}: {', '.join(counts)}. {licence}"
    found = store.facts().duplicates
    if found is not None:
        text += f"\n\n{_duplicates(found)}"
    return text


def _duplicates(found: Mapping[str, Any]) -> str:
    exact, near = len(found["exact"]), len(found["near"])
    if not exact and not near:
        return f"None of the {found['images']:,} images was found in two splits, by its bytes or by its look."
    return (
        f"Of the {found['images']:,} images, {_count(exact, 'pair')} with the same bytes and {_count(near, 'pair')} "
        "that look nearly the same lie across two splits; nothing was removed."
    )


def _protocol(store: Store, trial: TrialRecord, final: FinalResult) -> str:
    second, estimates = store.facts().rerank, (store.choice() or {}).get("estimates")
    among = " by the lower bound of its estimate from all of them" if estimates else ""
    if second is not None:
        among = f" among the best {len(second['candidates'])}, trained again from fresh seeds"
    lines = [
        f"{_count(store.finished(), 'trial')} were compared by their accuracy on the validation images "
        f"({store.counts()['pruned']} pruned on the way, the others after the last epoch); trial {trial.number} was "
        f"chosen{among}, with {percent(trial.value)}. No test image had a part in it.",
        f"{_trained(final)} All of them were trained before the test set was opened for them.",
        *(_opening(each) for each in ledger.openings(store.ledger_lines())),
    ]
    params = sorted(trial.params.items())
    rows = [[f"`{path}`", f"{value:.4g}" if isinstance(value, float) else _plain(str(value))] for path, value in params]
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + _table(["searched field", "chosen value"], rows)


def _trained(final: FinalResult) -> str:
    text = f"It was trained again on {final.fit_on} from {_count(len(final.per_seed), 'seed')}"
    epochs = final.per_seed[0].epochs  # not known of a result that was mended from the ledger
    if not epochs:
        return f"{text}."
    return f"{text}, on {epochs[-1]['train']['total']:,} images for {_count(len(epochs), 'epoch')} each."


def _opening(line: Mapping[str, Any]) -> str:
    reason = f" Reason: {_plain(line['reason'])}." if line.get("reason") else ""
    return f"The test set was opened for trial {line['trial']} on {line['time'][:10]}.{reason}"


def _limits(store: Store, description: Mapping[str, Any], final: FinalResult) -> str:
    lines = [
        "It knows its own classes only, and names one of them for any image, whatever that shows.",
        "It was tested on images of the same data set; with other cameras, places, seasons or ways of taking pictures "
        "it was not tested, nor on damaged, drawn or manipulated images.",
        "The interval is about the choice of test images, the standard deviation about the seed; neither says how it "
        "does elsewhere.",
        *_worst_classes(store, description),
    ]
    if final.test_openings > 1:
        lines.append(f"The test set was opened {final.test_openings} times: the number may flatter a little.")
    return "\n".join(f"- {line}" for line in lines)


def _worst_classes(store: Store, description: Mapping[str, Any]) -> list[str]:
    """The classes that the saved model finds least often; none when it finds all, or no predictions are kept."""
    import numpy

    kept = store.facts().predictions
    if kept is None:
        return []
    labels = unpack(kept["labels"], "uint16")
    hits = unpack(kept["seeds"][0]["predicted"], "uint16") == labels
    found = {int(label): hits[labels == label] for label in numpy.unique(labels)}
    worst = sorted((label for label, each in found.items() if not each.all()), key=lambda label: found[label].mean())
    if not worst:
        return []
    names = ", ".join(
        f"{_plain(description['classes'][label])} ({found[label].sum()} of {len(found[label])})"
        for label in worst[:WORST_CLASSES]
    )
    seed = kept["seeds"][0]["seed"]
    return [f"The classes that it, trained from seed {seed}, finds least often among the test images: {names}."]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown; what others wrote has gone through `_plain`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """What somebody wrote, as Markdown that shows it as it stands: on one line, without tags, links or emphasis."""
    signs = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return html.escape(signs, quote=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
