"""The final run: retrain the chosen configuration on several seeds, then open the test set, once.

All seeds are trained before the first test image is read, and the saved model is fixed
beforehand (seed 0), so nothing is chosen by the test set. Every opening is written to the ledger before it happens.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from harness.base.environment import git_commit
from harness.base.errors import StudyFailed
from harness.base.packing import pack, unpack
from harness.config.contracts import Dataset, SplitName
from harness.config.events import Elsewhere, Event
from harness.config.final_result import FinalResult, SeedResult, value_of
from harness.config.train import fingerprint
from harness.data.duplicates import contents_of, find
from harness.data.splits import ImageSet, items_of, load_split, load_test
from harness.final import model_files
from harness.final.choice import per_image, record_choice, rerank
from harness.final.model_files import keep_check_images, record_files, save_model
from harness.final.predictions import marks, pictured, temperature_of, thumbnails
from harness.final.retrain import Context, Retraining, threads_of
from harness.final.statistics import balanced_accuracy, bootstrap_interval, compare, selection_excess, wilson
from harness.final.suspects import record_suspects
from harness.store import ledger
from harness.store.leases import LeaseLost
from harness.store.store import POLL_SECONDS, Store, TrialRecord, wanted
from harness.training.assemble import evaluation_of
from harness.training.checkpoint import differences, read_tensors
from harness.training.checkpoint import fingerprint as sha256_of
from harness.training.loop import Training, logits_of, measure, outputs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def after_search(context: Context, model_folder: Path, reason: str | None) -> Generator[Event, None, bool]:
    """Choose, retrain and test in one process; any other waits, in case that one dies.

    Returns False, with nothing done, if another command has asked for more trials.
    """
    store = context.store
    waited = False
    while True:
        while not store.lead():
            waited = True
            yield Elsewhere(by=store.leader() or "another process")
            time.sleep(POLL_SECONDS)
        if store.finished() < wanted(context.study, store):
            store.follow()
            return False
        if waited and store.is_settled():
            return True
        try:
            yield from rerank(context)
            record_choice(context.study, store)
            record_suspects(context.study, store)
            yield from final_run(context, model_folder, reason)
        except LeaseLost:
            continue
        return True


def final_run(context: Context, folder: Path, reason: str | None = None) -> Iterator[Event]:
    """Retrain the chosen configuration, open the test set, save the model in `folder`, record the result.

    A seed that was trained before an interruption is not trained again: its last checkpoint stays until the result
    is recorded. If the result exists and only the weights are lost, their seed is retrained, and the test
    set stays closed. It also stays closed if it was opened for another trial and no `reason` is given. Does nothing
    if no trial is complete. Raises LeaseLost, with nothing recorded, if another process has taken over,
    InputError if the model in `folder` is another study's, and StudyFailed, with the test set closed, if a seed
    diverges; a base that does is not compared.
    """
    study, store = context.study, context.store
    chosen = store.chosen()
    if chosen is None:
        return
    model_files.check_folder(folder, store.url, store.uid)
    if store.has_final():
        if not model_files.has_model(folder):
            yield from _mend(context, chosen, folder)
        return
    store.ledger()  # raises before hours of training if it was edited
    context.check_content()
    _repair(context, chosen)
    if reason is None and (why := store.why_closed()) is not None:
        print(why, file=sys.stderr)
        return
    seeds = [Retraining(context, "final", chosen, number) for number in range(study.final.seeds)]
    base = _base_seeds(context, chosen)
    yield from context.ahead([*seeds, *base])
    for retraining in [*seeds, *base]:
        yield from retraining.train()
    if lost := next((each for each in seeds if each.diverged), None):
        raise StudyFailed(
            f"The test set stays closed, because {lost.divergence()}. Run more trials, with a larger --trials, or "
            "start a new study with lower learning rates, a longer warm-up, or clipped gradients (optim.clip_norm)."
        )
    compared = base
    if lost := next((each for each in base if each.diverged), None):
        print(f"The base configuration is not compared, because {lost.divergence()}.", file=sys.stderr)
        compared = []
    tested = _open_test_set(context, seeds, compared, folder, reason)
    for retraining, metrics in zip([*seeds, *compared], tested, strict=True):
        yield from retraining.end(metrics)
    for retraining in base[len(compared) :]:
        yield from retraining.end()


def _mend(context: Context, chosen: TrialRecord, folder: Path) -> Iterator[Event]:
    """Retrain the lost model's seed as it was trained before, unless only model.json is lost.

    If the weights differ nevertheless, stderr and model.json say so: the test result is not theirs.
    """
    store, final = context.store, context.store.facts().final
    assert final is not None
    if model_files.is_recorded(store, folder, model_files.WEIGHTS):
        weights = sha256_of(read_tensors(folder / model_files.WEIGHTS)[0])
        config = context.study.config(chosen.params)
        model_files.write_description(store, folder, config, chosen, final, weights)
        return
    print(f"The model in {folder} is missing: retraining its seed; the test set stays closed.", file=sys.stderr)
    environments = final.per_seed[0].environments
    # Not logged: MLflow shows the tested training of this seed.
    seed = Retraining(context, "final", chosen, 0, logged=False)
    with threads_of(environments):
        yield from seed.train()
        if seed.diverged:
            text = f"The model cannot be retrained here, because {seed.divergence()}"
            raise StudyFailed(f"{text}; copy {folder.name} from the machine that trained it first.")
        training = seed.trained()
    save_model(store, folder, training, chosen, final)
    if final.per_seed[0].weights != sha256_of(training.model.state_dict()):
        differing = differences(environments[-1], seed.environments[-1]) if environments else ""
        print(
            f"The model in {folder} was retrained, and its weights differ from the tested ones"
            f"{f' ({differing})' if differing else ''}; the test result is not its own. For the same bits, copy "
            f"{folder.name} from the machine that trained it first.",
            file=sys.stderr,
        )
    yield from seed.end()


def _base_seeds(context: Context, chosen: TrialRecord) -> list[Retraining]:
    """Return the base's trainings from the same seeds, for comparison; none if it was chosen or did not train."""
    final, base = context.study.final, next(trial for trial in context.store.trials() if trial.number == 0)
    comparable = chosen.number != 0 and base.state in ("complete", "pruned")
    seeds = final.seeds if final.compare_base and comparable else 0
    return [Retraining(context, "base", base, number) for number in range(seeds)]


def _repair(context: Context, chosen: TrialRecord) -> None:
    """Restore the final result from the ledger's line, as far as that goes, if only the line was written.

    For the chosen trial the opening resumes instead, and gives the full result.
    """
    store, lines = context.store, ledger.results(context.store.ledger())
    known = store.facts().final
    if not lines or lines[-1]["trial"] == chosen.number or (known is not None and known.ledger == lines[-1]["hash"]):
        return
    seeds = [seed | {"accuracy": seed["correct"] / seed["total"]} for seed in lines[-1]["seeds"]]
    about = {"trial": lines[-1]["trial"], "fit_on": context.study.final.fit_on, "ledger": lines[-1]["hash"]}
    about |= {"base": None, "comparison": None, "selection": None}  # not in the line
    opened = len(ledger.openings(store.ledger()))
    store.set_as_leader({"final": summary(seeds) | about | {"test_openings": opened}})


@dataclass(frozen=True, kw_only=True)
class Tested:
    """Results of one trained model on the test images; arrays are [N]."""

    record: dict[str, Any]  # for the storage
    scores: NDArray[Any]  # hits, or the objective's contributions
    predictions: dict[str, Any]  # packed: the predicted class uint16, its probability and the calibrated one float32


def _open_test_set(
    context: Context, seeds: Sequence[Retraining], base: Sequence[Retraining], folder: Path, reason: str | None
) -> list[dict[str, float]]:
    # The only place where the test split is read. Everything is trained; nothing is decided after this line.
    store, chosen = context.store, seeds[0].trial
    store.check_lead()
    context.check_content()
    _write_opening(store, chosen, fingerprint(seeds[0].config), reason)
    test = load_test(seeds[0].config.data, seeds[0].config.backbone.preprocessing())
    saved, flip = seeds[0].trained(), context.study.final.flip
    results = [evaluated(seeds[0], saved, test, flip)]
    results += [evaluated(each, each.trained(), test, flip) for each in seeds[1:]]
    test_of_base = load_test(base[0].config.data, base[0].config.backbone.preprocessing()) if base else test
    against = [evaluated(each, each.trained(), test_of_base, flip) for each in base]
    final = _summed(results) | {
        "trial": chosen.number,
        "fit_on": context.study.final.fit_on,
        "base": _summed(against) | {"trial": base[0].trial.number} if base else None,
        "comparison": None,
        "selection": selection(store),
        "test_openings": len(ledger.openings(store.ledger())),
    }
    if base and len(test_of_base) == len(test):  # a space may change the data set itself
        best, other = (numpy.stack([each.scores for each in found]) for found in (results, against))
        final["comparison"] = asdict(compare(best, other))
    predictions = {
        "classes": list(saved.classes),
        "labels": pack(test.labels.numpy().astype("uint16")),
        "images": marks(contents_of(seeds[0].config.data, items_of(seeds[0].config.data, "test"))),
        "seeds": [result.predictions for result in results],
        "base": [result.predictions for result in against],
    }
    kept = {
        "predictions": predictions,
        "thumbnails": thumbnails(test.images, pictured(predictions)),
        "duplicates": _duplicates(seeds[0].config.data, test),
    }
    lines = _with_result(store, FinalResult.of(final))
    final["ledger"] = lines[-1]["hash"]
    # What can fail comes first; then the ledger's line and the result are written at once.
    store.check_lead()
    keep_check_images(folder, test)
    save_model(store, folder, saved, chosen, FinalResult.of(final))
    record_files(store, folder, model_files.CHECK_FILE)
    store.set_as_leader({"ledger": lines, "final": final, **kept})
    # No test result is shown before it is recorded.
    return [SeedResult(**result.record).metrics() for result in (*results, *against)]


def _summed(results: Sequence[Tested]) -> dict[str, Any]:
    return summary([each.record for each in results], [each.scores for each in results])


def _write_opening(store: Store, chosen: TrialRecord, configuration: str, reason: str | None) -> None:
    """Add the opening to the ledger, unless a process that died has, and this one resumes it."""
    lines = store.ledger()
    if not lines or lines[-1]["trial"] != chosen.number:
        if lines and lines[-1]["event"] == ledger.OPENED and reason is None:
            reason = f"the opening for trial {lines[-1]['trial']} ended before its result was recorded"
        entry = {"event": ledger.OPENED, "trial": chosen.number, "configuration": configuration, "reason": reason}
        store.add_to_ledger(_now() | entry)


def _with_result(store: Store, final: FinalResult) -> list[ledger.Line]:
    """Return the ledger with the result's line, once; writes nothing."""
    entry = {"event": ledger.RESULT, "trial": final.trial, "seeds": ledger.seeds_of(final)}
    lines = store.ledger()
    if {key: lines[-1].get(key) for key in entry} == entry:
        return lines
    return store.extended_ledger(_now() | entry)


def _duplicates(data: Dataset, test: ImageSet) -> dict[str, Any]:
    """Find images that are in more than one split."""
    train = load_split(data, test.preprocessing, "train", margin=True).images
    val = load_split(data, test.preprocessing, "val")
    size = test.preprocessing.evaluation(data.image_size)
    margin = round(train.shape[1] * (1 - size.side / size.short_side) / 2)  # outside of the others' centre crop
    train = train[:, margin : train.shape[1] - margin, margin : train.shape[2] - margin]
    images: dict[SplitName, Any] = {"train": train, "val": val.images, "test": test.images}
    splits: dict[SplitName, Any] = {split: (items_of(data, split), each) for split, each in images.items()}
    return find(data, splits, Path(data.cache))


def _now() -> dict[str, str]:
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": git_commit()}


def evaluated(retraining: Retraining, training: Training, images: ImageSet, flip: bool) -> Tested:
    """Evaluate a trained model on images of the test set; with `flip` on their mirror images, too."""
    logits = logits_of(training.learner, evaluation_of(training, images), training.runtime).cpu()
    metrics = measure(logits, images.labels, training.objective)
    probability, predicted = (each.numpy() for each in torch.softmax(logits, dim=1).max(dim=1))
    labels = images.labels.numpy()
    record = retraining.record(training) | {
        "correct": metrics.correct,
        "total": metrics.total,
        "accuracy": metrics.accuracy,
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "loss": metrics.loss,
    }
    if flip:
        record["flipped"] = flipped(training, images, logits)
    scores = predicted == labels
    if metrics.contributions is not None:
        record |= {"objective": metrics.objective, "score": metrics.score}
        scores = unpack(metrics.contributions, "float32")
    packed: dict[str, Any] = {
        "predicted": pack(predicted.astype("uint16")),
        "confidence": pack(probability.astype("float32")),
    }
    if (degree := temperature_of(retraining.trial, retraining.epochs)) is not None:
        calibrated = torch.softmax(logits / degree, dim=1).max(dim=1).values.numpy()
        packed |= {"calibrated": pack(calibrated.astype("float32")), "temperature": degree}
    return Tested(record=record, scores=scores, predictions={"seed": retraining.number, **packed})


def flipped(training: Training, images: ImageSet, logits: torch.Tensor) -> float:
    """Return the objective's value of the mean probabilities of each image, by its `logits`, and its mirror image."""
    runtime = training.runtime
    mirror = outputs_of(training.learner, lambda size: (part.flip(3) for part in images.parts(size, runtime)), runtime)
    both = (torch.softmax(logits, dim=1) + torch.softmax(mirror.cpu(), dim=1)) / 2
    # Both may underflow to 0.
    logits = both.clamp(min=torch.finfo(both.dtype).tiny).log()
    return measure(logits, images.labels, training.objective).value


def selection(store: Store) -> dict[str, Any] | None:
    """Estimate the selection bias of the best complete trial's validation score; None if it is unknown."""
    lasts = [per_image(trial) for trial in store.trials() if trial.state == "complete" and trial.epochs]
    known = [each for each in lasts if each is not None]
    if len(known) < len(lasts) or len({len(each) for each in known}) != 1:
        return None  # on different images
    found = selection_excess(numpy.stack(known))
    return None if found is None else asdict(found)


def summary(per_seed: Sequence[Mapping[str, Any]], scores: Sequence[NDArray[Any]] = ()) -> dict[str, Any]:
    """Return mean, spread and interval of the test results; `scores` are each seed's `Tested.scores`.

    `correct` and `total` add up the seeds, so accuracy is correct / total. The interval (Wilson, 1927; for
    other objectives a bootstrap) counts each test image once: several seeds on the same images are not more images.
    """
    correct, total = sum(each["correct"] for each in per_seed), sum(each["total"] for each in per_seed)
    values = [value_of(each) for each in per_seed]
    balanced = [each["balanced_accuracy"] for each in per_seed if "balanced_accuracy" in each]
    found: dict[str, Any] = {
        "accuracy": correct / total,
        "balanced_accuracy": statistics.fmean(balanced) if balanced else None,
        "correct": correct,
        "total": total,
        "per_seed": list(per_seed),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "interval": list(wilson(correct / len(per_seed), per_seed[0]["total"])),
        "flipped": statistics.fmean(each["flipped"] for each in per_seed) if "flipped" in per_seed[0] else None,
    }
    if "score" in per_seed[0]:
        interval = bootstrap_interval(numpy.mean(scores, axis=0))
        found |= {"objective": per_seed[0]["objective"], "score": statistics.fmean(values), "interval": list(interval)}
    return found
