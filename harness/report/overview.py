"""The storage's content as one JSON object, as a summary, and as a table, without other sources."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.base.errors import masked
from harness.base.files import sqlite_file
from harness.base.words import duration, money, rate
from harness.config.final_result import FinalResult
from harness.final import sentences
from harness.final.predictions import described
from harness.final.pruning_cost import audit_sentences
from harness.store.ledger import seeds_of
from harness.store.locks import holder
from harness.store.store import Store, TrialRecord

if TYPE_CHECKING:
    import pandas


def overview(name: str, store: Store, tracking: str) -> dict[str, Any]:
    """Return the study as one JSON object (`show --json`); the report shows the same numbers."""
    best, chosen, facts = store.best(), store.chosen(), store.facts()
    tested = None if facts.final is None else facts.predictions  # None if the result was restored from the ledger
    return {
        "study": name,
        "trials": counts(store),
        "best": None if best is None else {"number": best.number, "value": best.value, "params": best.params},
        "conclusion": sentences.conclusion(store),
        "final": None if facts.final is None else _final(facts.final),
        "chosen": None if chosen is None else chosen.number,
        "choice": store.choice(),
        "rerank": None if facts.rerank is None else _rerank(facts.rerank),
        "ledger": {"lines": store.ledger_lines(), "fault": store.ledger_fault()},
        "after": None if facts.after is None else {**facts.after, "trials": len(facts.after["trials"])},
        "suspects": None if facts.suspects is None else _suspects(facts.suspects),
        "duplicates": facts.duplicates,
        "audit": facts.audit,
        "ablation": None if facts.ablation is None else _ablation(facts.ablation),
        "test": None if tested is None else described(tested),
        "cost": cost(trial_records(store), facts.definition or {}),
        "price": price(store),
        "runtime": facts.runtime,
        "environment": store.environment(),
        "command": facts.command,
        "storage": masked(store.url),
        "tracking": masked(tracking),
    }


def _final(final: FinalResult) -> dict[str, Any]:
    """Return the final result without its epochs and ledger line, which are elsewhere."""
    shown: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(final)))
    del shown["ledger"]
    for result in filter(None, (shown, shown["base"])):
        result["per_seed"] = _without_epochs(result["per_seed"])
    return shown


def _rerank(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "results": {number: _without_epochs(found) for number, found in record["results"].items()}}


def _without_epochs(seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in seed.items() if key != "epochs"} for seed in seeds]


def _suspects(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("trials", "images", "found", "rows")}


def _ablation(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return an ablation without numbers per image; each step has the values of its seeds."""
    values = {step: [each["value"] for each in results] for step, results in record["results"].items()}
    return {**record, "results": values, "sentences": sentences.ablation_sentences(record)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A study in a list; values of its objective are 0 to 1."""

    study: str
    state: str  # not begun, running, interrupted, finished, failed, or cannot be read
    finished: int = 0  # trials
    trials: int = 0  # asked for
    best: float | None = None  # on the validation images
    test: float | None = None  # on the test images
    objective: str = "accuracy"
    note: str | None = None  # why it cannot be read


def row_of(name: str, store: Store, trials: int) -> Row:
    """Return the row of a study; `trials` are those of its file."""
    best, final, facts = store.best(), store.facts().final, store.facts()
    return Row(
        study=name,
        state=state_of(store),
        finished=store.finished(),
        trials=facts.limited(facts.wanted or trials),
        best=None if best is None else best.value,
        test=None if final is None else final.value,
        objective=facts.objective,
    )


def subject(store: Store) -> TrialRecord | None:
    """Return the trial of the report: the tested one; before the test, the chosen one or the best so far."""
    final = store.facts().final
    if final is None:
        return store.chosen() or store.best()
    return next(trial for trial in store.trials() if trial.number == final.trial)


def counts(store: Store) -> dict[str, int]:
    """Return the number of trials by state; an unfinished one is running, or interrupted if no process runs it."""
    states = ["failed" if trial.state == "diverged" else trial.state for trial in trial_records(store)]
    return {state: states.count(state) for state in ("complete", "pruned", "failed", "running", "interrupted")}


def state_of(store: Store) -> str:
    """Return running, interrupted, finished, or failed (all trials ended, and none is complete)."""
    if not _abandoned(store):
        return "running"
    facts = store.facts()
    if store.finished() < facts.limited(facts.wanted or 1) or not store.is_settled():
        return "interrupted"
    return "finished" if store.best() is not None else "failed"


def finished_of(finished: int, asked: int) -> str:
    """Return the search's progress; a study may have more trials than a command asks for."""
    if finished > asked:
        return f"{finished} trials finished (asked for: {asked})"
    return f"{finished} of {asked} trials finished"


def _abandoned(store: Store) -> bool:
    """Return whether no process works on this study."""
    file = sqlite_file(store.url)
    return not store.active_workers() if file is None else holder(file) is None


def trial_records(store: Store) -> list[TrialRecord]:
    """Return all trials, with abandoned ones as interrupted."""
    trials = store.trials()
    if not any(trial.state == "running" for trial in trials) or not _abandoned(store):
        return trials
    return [dataclasses.replace(each, state="interrupted") if each.state == "running" else each for each in trials]


def summary(name: str, store: Store, tracking: str) -> str:
    """Return the study in a few lines (`show`)."""
    counted = counts(store)
    del counted["running" if counted["interrupted"] else "interrupted"]
    chosen = store.chosen()
    best, facts = chosen if chosen is not None and chosen.number == 0 else store.best(), store.facts()
    began = [sentences.earlier_sentence(store), sentences.stop_sentence(store)]
    params = f"\n          {in_short(best.params)}" if best is not None and best.params else ""
    fault = store.ledger_fault()
    return "\n".join(
        [
            *([] if fault is None else [f"warning   Do not trust this: {fault}."]),
            f"study     {name}: {', '.join(f'{number} {state}' for state, number in counted.items())}",
            *(f"          {line}" for line in filter(None, began)),
            f"best      {sentences.verdict(store)}{params}",
            *_chosen_line(store),
            f"final     {sentences.test_sentence(store)}",
            *(f"          {line}" for line in _remarks(store)),
            *_titled("audit", [] if facts.audit is None else audit_sentences(facts.audit, facts.objective)),
            *_titled("ablation", [] if facts.ablation is None else sentences.ablation_sentences(facts.ablation)),
            *(f"cost      {line}" for line in filter(None, [price_sentence(price(store))])),
            f"runtime   {in_words(facts.runtime)}",
            f"storage   {masked(store.url)}",
            f"tracking  {masked(tracking)}",
        ]
    )


def _chosen_line(store: Store) -> list[str]:
    """Return the lines of the chosen configuration, if it is not the one with the highest value."""
    chosen, best = store.chosen(), store.best()
    if chosen is None or best is None or chosen.number in (0, best.number):  # the line above names the base
        return []
    how = "by its lower bound" if store.facts().rerank is None else "on fresh seeds"
    params = [f"          {in_short(chosen.params)}"] if chosen.params else []
    return [f"chosen    Trial {chosen.number}, {how}", *params]


def in_short(params: Mapping[str, Any], whole_paths: bool = True) -> str:
    """Return names and values on one line, with only the last part of each path if not `whole_paths`."""
    names = {path: path if whole_paths else path.rpartition(".")[2] for path in params}
    return ", ".join(f"{names[path]} = {sentences.short(value)}" for path, value in params.items())


def _remarks(store: Store) -> list[str]:
    """Return the remarks on the final result."""
    final, again = store.facts().final, sentences.rerank_sentence(store.facts().rerank)
    lines = [sentences.choice_sentence(store), sentences.prospect_sentence(store), again]
    if final is not None:
        lines = [store.why_closed(), sentences.conclusion(store), *lines, sentences.selection_sentence(final)]
    return [*filter(None, lines)]


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{'' if number else title:<10}{line}" for number, line in enumerate(lines)]


def in_words(runtime: dict[str, Any] | None) -> str:
    """Return the decided runtime as text."""
    if runtime is None:
        return "not decided yet"
    layout = "channels last" if runtime["channels_last"] else "channels first"
    compiled = ", compiled" if runtime.get("compile") else ""
    free = "" if runtime.get("deterministic", True) else ", not deterministic"
    return f"{runtime['device']}, {runtime['precision']}, {layout}{compiled}{free}"


def digest(store: Store) -> str:
    """Return a sha256 of what two runs of the same study must agree on.

    It covers trial numbers, parameters, states, values and intermediate values, and each final seed's result and
    weights, without times and paths.
    """
    final = store.facts().final
    content = {
        "trials": [
            [trial.number, trial.params, trial.state, trial.value, list(trial.curve.items())]
            for trial in store.trials()
        ],
        "final": None if final is None else final.trial,
        "seeds": [] if final is None else [list(seed.values()) for seed in seeds_of(final)],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def frame(store: Store) -> pandas.DataFrame:
    """Return a row per trial: number, state, value, epochs, seconds, reason, and each parameter."""
    import pandas

    columns = ("number", "state", "value", "epochs", "seconds")
    rows = [
        {name: getattr(trial, name) for name in columns}
        | {"epochs": len(trial.curve), "reason": trial.reason or ("queued by hand" if trial.queued else None)}
        | {f"{name} (searched)" if name in columns else name: value for name, value in trial.params.items()}
        for trial in trial_records(store)
    ]
    return pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=["number", "state", "value"])


def suspects_frame(record: Mapping[str, Any]) -> pandas.DataFrame:
    """Return a row per suspect: path, label, taken_for, missed_by, and how many trials count."""
    import pandas

    return pandas.DataFrame(record["rows"]).assign(trials=record["trials"])


def cost(trials: Sequence[TrialRecord], definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return seconds and epochs of the search; `saved_seconds` estimates the time of the epochs that pruning saved.

    Each pruned epoch counts the mean of its trial's epochs. `saved_share` is relative to the search's time without
    pruning. Unfinished trials have no recorded epochs yet.
    """
    spent = sum(trial.seconds or 0.0 for trial in trials)
    left_out, saved = 0, 0.0
    for trial in trials:
        planned = trial.params.get("epochs", definition.get("epochs"))
        if trial.is_pruned and trial.epochs and planned is not None:
            missing = max(planned - len(trial.epochs), 0)
            left_out += missing
            saved += missing * sum(epoch.seconds for epoch in trial.epochs) / len(trial.epochs)
    return {
        "seconds": spent,
        "epochs": sum(len(trial.epochs) for trial in trials),
        "pruned": sum(trial.is_pruned for trial in trials),
        "epochs_not_run": left_out,
        "saved_seconds": saved,
        "saved_share": saved / (spent + saved) if spent + saved else 0.0,
    }


def after_seconds(store: Store) -> float:
    """Return the recorded seconds of the trainings after the search: reranking, the seeds, those of the base."""
    final, reranked = store.facts().final, (store.facts().rerank or {}).get("results", {})
    seeds = [] if final is None else [*final.per_seed, *(final.base.per_seed if final.base else ())]
    epochs = [
        *(seed.epochs for seed in seeds),
        *(each.get("epochs", []) for seeds in reranked.values() for each in seeds),
    ]
    return sum(epoch["seconds"] for each in epochs for epoch in each)


def price(store: Store) -> dict[str, float] | None:
    """Return the price of a device-hour, the device-hours of the trials and of the trainings after, and what they cost.

    None if no price was given. Each worker counts as a device; trainings of `audit` and `ablate` do not count.
    """
    per_hour = store.facts().price
    if per_hour is None:
        return None
    hours = (sum(trial.seconds or 0.0 for trial in store.trials()) + after_seconds(store)) / 3600
    return {"per_hour": per_hour, "device_hours": hours, "spent": hours * per_hour}


def price_sentence(found: Mapping[str, float] | None) -> str | None:
    """State what was spent; None without a price."""
    if found is None:
        return None
    hours = found["device_hours"]
    time = f"{hours:,.1f} h" if hours >= 1 else duration(3600 * hours)
    return f"Spent {time} in all, {money(found['spent'])} at {rate(found['per_hour'])} per hour."


def cost_sentences(found: Mapping[str, Any]) -> list[str]:
    """Return the cost as sentences."""
    lines = [f"The trials took {duration(found['seconds'])} for {found['epochs']:,} epochs."]
    if found["pruned"]:
        lines.append(
            f"Pruning ended {found['pruned']:,} of them early and saved {found['epochs_not_run']:,} epochs, about "
            f"{duration(found['saved_seconds'])}: {100 * found['saved_share']:.0f} % of the search's time without it."
        )
    return lines
