"""The `reproduce` command: retrain a trial, and compare every epoch with the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from harness.base.environment import environment
from harness.base.errors import InputError
from harness.base.seeds import derive_seed
from harness.config.events import EpochResult
from harness.config.find import Found
from harness.config.study import Study
from harness.config.train import TrainConfig
from harness.data.splits import content_of
from harness.store import opening
from harness.store.store import TrialRecord
from harness.training.assemble import assemble, decide_runtime
from harness.training.checkpoint import differences
from harness.training.loop import Training, fit
from harness.training.step import Runtime


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An epoch as recorded, and as retrained."""

    recorded: EpochResult
    now: EpochResult

    @property
    def same(self) -> bool:
        return (self.recorded.train, self.recorded.val, self.recorded.lr) == (self.now.train, self.now.val, self.now.lr)

    def line(self) -> str:
        """Return recorded and new numbers side by side."""
        then, now = self.recorded, self.now
        digits = ".6f" if self.same else ""  # all digits where six might look the same
        words = [f"epoch {then.epoch}", f"loss {then.train.loss:{digits}} {now.train.loss:{digits}}"]
        if then.val is not None and now.val is not None:
            words.append(f"val {then.val.accuracy:.2%} {now.val.accuracy:.2%}")
        return "  ".join([*words, "same" if self.same else "DIFFERENT"])


def reproduce(study: Study, trial: TrialRecord, runtime: Runtime) -> Iterator[Compared]:
    """Retrain the trial's recorded epochs from its seed. Raises InputError if there are none."""
    if trial.state == "running":
        raise InputError(f"Trial {trial.number} is not finished; run the study to its end first.")
    if not trial.epochs:
        raise InputError(f"Trial {trial.number} has no recorded epochs to compare ({trial.state}); take another trial.")
    with closing(fit(again(study, trial, runtime))) as results:
        for recorded, now in zip(trial.epochs, results, strict=False):
            yield Compared(recorded=recorded, now=now)


def again(study: Study, trial: TrialRecord, runtime: Runtime) -> Training:
    """Return a trial's training at its start, with the recorded micro-batch size."""
    seed = derive_seed(study.seed, "trial", trial.number)
    training = assemble(study.config(trial.params), runtime, seed, study.objective)
    training.progress.micro_batch = trial.epochs[0].micro_batch
    return training


class Reproduction:
    """A recorded trial, retrained by iteration."""

    def __init__(self, study: Study, trial: TrialRecord, runtime: Runtime) -> None:
        self.trial, self.same = trial, True  # whether all epochs so far are the same
        self._study, self._runtime = study, runtime

    def __iter__(self) -> Iterator[Compared]:
        for each in reproduce(self._study, self.trial, self._runtime):
            self.same = self.same and each.same
            yield each

    def verdict(self) -> str:
        """Return the outcome in a sentence, and why it may differ."""
        if not self.same:
            config = self._study.config(self.trial.params)
            return f"Trial {self.trial.number} is not reproduced. {explanation(config, self.trial, self._runtime)}"
        count = f"{len(self.trial.epochs)} epochs" if len(self.trial.epochs) > 1 else "1 epoch"
        return f"Trial {self.trial.number} is reproduced to the last bit: {count}."


def reproduction(found: Found, url: str, number: int, data_root: str | None, device: str | None) -> Reproduction:
    """Return a trial of the study at `url`. Raises InputError if it does not exist, or images or weights differ."""
    with opening.read_store(found.study.name, url) as store:
        study = opening.located(found, store, data_root, device)
        trials = {trial.number: trial for trial in store.trials()}
        if number not in trials:
            has = f"it has 0 to {max(trials)}" if trials else "it has none yet"
            raise InputError(f"Study {study.name!r} has no trial {number}; {has}.")
        runtime = decide_runtime(study.train, store.facts().runtime)
        opening.as_begun(study, store, content_of(study))
    return Reproduction(study, trials[number], runtime)


def explanation(config: TrainConfig, trial: TrialRecord, runtime: Runtime) -> str:
    """Return why the numbers may differ: another version, device or number of threads."""
    here = environment(runtime.device)
    found = [text for each in trial.environments if (text := differences(each, here))]
    first = trial.epochs[0]
    if any(each.micro_batch != first.micro_batch for each in trial.epochs):
        found.append("the trial ran out of memory, and used a smaller micro-batch from there on")
    elif 2 * (first.micro_batch or config.batch_size) <= 1 + min(config.batch_size, first.train.total):
        found.append("the trial ran out of memory in its first step, whose images BatchNorm then saw twice")
    if len(trial.environments) > 1:
        found.append("the trial was interrupted and resumed elsewhere")
    if not found:
        return "Versions, device, threads and commit are the same; uncommitted code or the machine differs."
    return "Different from then: " + "; ".join(found) + "." + _remedy(trial, here)


def _remedy(trial: TrialRecord, here: Mapping[str, str]) -> str:
    """Return how to train with the same number of threads; workers have fewer than a single process."""
    threads = {each.get("threads", here["threads"]) for each in trial.environments}
    if len(threads) != 1 or threads == {here["threads"]}:
        return ""
    return f" Set OMP_NUM_THREADS={threads.pop()} to train with the same number of threads."
