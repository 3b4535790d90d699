"""Studies killed at random, in processes of their own: what the chaos test and `benchmarks.chaos` share.

A server imports everything once and forks a child for each start of a study, before any of torch's threads exist;
each child runs `harness.cli.commands.main` like the command and is killed for real. To hit a phase that lasts
milliseconds, the child wraps the phase's functions and sends the signal to itself a random moment after it came by.
Every batch, epoch, and phase is written to a log, so that what a kill has cost can be counted afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.forked import IMPORTS
from tests.patience import PATIENCE_SECONDS

PROJECT = Path(__file__).resolve().parent.parent
NAME = "small"
SEEDS = 2
CHECKPOINT_SECONDS = 0.2
# Four batches an epoch in a trial, eight in the final run. On the CPU: a CUDA context does not outlive a fork.
SETTINGS = ("--set", "batch_size=8", "--set", f"checkpoint_seconds={CHECKPOINT_SECONDS}")
SLACK_SECONDS = 0.1  # between two lines of the log that should come at once
INTERRUPTED = 130

# Where a process can be killed, by phase: the longest time after that moment, in seconds.
POINTS: dict[str, dict[str, float]] = {
    "search": {"batch": 0.08, "validation": 0.06},
    "checkpoint": {"before writing": 0.007, "before the rename": 0.0, "after the rename": 0.003},
    "tell": {"before recording": 0.015, "recorded": 0.0, "checkpoint removed": 0.003, "ending the MLflow run": 0.01},
    "final": {
        "its batch": 0.08,
        "ledger": 0.0,
        "test": 0.07,
        "model": 0.012,
        "half a model": 0.0,
        "recording the result": 0.003,
        "result recorded": 0.03,
    },
}
# The highest number of an entry; else the first.
ENTRIES = {"batch": 12, "its batch": 20, "validation": 2, "test": 2}


@dataclass(frozen=True, kw_only=True)
class Aim:
    """When a process gets its signal: `seconds` after the `entry`-th time that it comes by a point of a phase.

    The phase "anywhere" has no points: the signal comes from outside, `seconds` after the start.
    """

    signal: str
    phase: str
    point: str = ""
    entry: int = 1
    seconds: float = 0.0


def aim(phase: str, point: str, number: str, chance: random.Random, latest: int | None = None) -> Aim:
    """A random moment at a point, at its `latest` entry at the latest."""
    if phase == "anywhere":
        return Aim(signal=number, phase=phase, seconds=chance.uniform(0.1, 4.0))
    entry, seconds = chance.randint(1, latest or ENTRIES.get(point, 1)), chance.uniform(0, POINTS[phase][point])
    return Aim(signal=number, phase=phase, point=point, entry=entry, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A process that was killed, and what it cost."""

    aim: Aim
    code: int  # as of subprocess: -9, or an exit code
    place: str  # the innermost phase that was under way
    training: str  # the last one assembled, and its epoch if it was trained; empty when there was none
    batches: int  # finished by this process, computed again by a later one
    epochs: int
    seconds: float  # from the first batch (or end of an epoch) that was computed again to the kill
    allowed: float  # that many at most: the interval, the longest unit, the longest writing of a checkpoint


# -- in the child ------------------------------------------------------------------------------------------------------


class _Child:
    """The log of one process, and the trap it may walk into."""

    def __init__(self, log: Path, trap: dict[str, Any] | None) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._trap, self._entries = trap, 0
        self._keys: dict[int, tuple[Any, str]] = {}  # the training's id; the training is kept so that its id stays its

    def write(self, what: str, name: str, **facts: Any) -> None:
        line = {"what": what, "name": name, "time": time.monotonic(), **facts}
        os.write(self._log, f"{json.dumps(line)}\n".encode())

    @contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        self.write("begin", name, **facts)
        yield
        self.write("end", name, **facts)  # not when it is cut off

    def by(self, point: str) -> None:
        """The process comes by a point."""
        if self._trap is None or self._trap["point"] != point:
            return
        self._entries += 1
        if self._entries != self._trap["entry"]:
            return
        if self._trap["seconds"]:
            threading.Timer(self._trap["seconds"], self._fire).start()
        else:
            self._fire()

    def _fire(self) -> None:
        self.write("kill", self._trap["signal"] if self._trap else "")
        os.kill(os.getpid(), signal.Signals[self._trap["signal"]] if self._trap else 0)

    def own(self, training: Any, key: str) -> None:
        self._keys[id(training)] = training, key

    def where(self, training: Any) -> dict[str, Any]:
        progress = training.progress
        return {"key": self._keys[id(training)][1], "epoch": progress.epoch, "step": progress.step}


def _watch(child: _Child) -> None:
    """Wrap what the phases are made of. Nothing that they compute is changed."""
    from harness.final import model_files
    from harness.final import test_set as final
    from harness.search import loop as objective
    from harness.store.store import Store
    from harness.tracking.writer import MLflowRun
    from harness.training import checkpoint
    from harness.training import loop as trainer

    def made(original: Any, self: Any, path: Path, identity: Any, training: Any, *rest: Any, **options: Any) -> None:
        original(self, path, identity, training, *rest, **options)
        child.own(training, identity["key"])
        child.write("check", "made", key=identity["key"])

    def train_batch(original: Any, training: Any, *rest: Any) -> None:
        where = child.where(training)
        with child.span("batch", **where):
            child.by("batch" if where["key"].startswith("trial") else "its batch")
            original(training, *rest)

    def result(original: Any, training: Any) -> Any:
        with child.span("end of epoch", **child.where(training)):
            return original(training)

    def validate(original: Any, *arguments: Any) -> Any:
        with child.span("validation"):
            child.by("validation")
            return original(*arguments)

    def after_batch(original: Any, self: Any) -> None:
        child.write("check", "asked")
        original(self)
        child.write("check", "done")

    def replace_file(original: Any, path: Path, *arguments: Any, **options: Any) -> None:
        checkpointing = path.parent.suffix == ".checkpoints"
        with child.span("writing a checkpoint" if checkpointing else f"writing {path.name}"):
            if checkpointing:
                child.by("before writing")
            original(path, *arguments, **options)

    def rename(original: Any, self: Path, target: Path) -> Any:
        checkpointing = self.suffix == ".partial" and self.parent.suffix == ".checkpoints"
        if checkpointing:
            child.by("before the rename")
        renamed = original(self, target)
        if checkpointing:
            child.by("after the rename")
        elif self.name.startswith("model.safetensors.") and self.suffix == ".partial":
            child.by("half a model")
        return renamed

    def tell(original: Any, *arguments: Any) -> None:
        with child.span("telling"):
            child.by("before recording")
            original(*arguments)
        child.write("begin", "after telling")
        child.by("recorded")

    def remove(original: Any, path: Path) -> None:
        original(path)
        child.by("checkpoint removed")

    def end(original: Any, self: Any, state: str) -> None:
        child.by("ending the MLflow run")
        original(self, state)
        child.write("end", "after telling")

    def named(name: str) -> Callable[..., Any]:
        def around(original: Any, *arguments: Any, **options: Any) -> Any:
            with child.span(name):
                return original(*arguments, **options)

        return around

    def test(original: Any, *arguments: Any) -> Any:
        with child.span("test evaluation"):
            child.by("test")
            return original(*arguments)

    def save_model(original: Any, *arguments: Any) -> None:
        with child.span("writing the model"):
            child.by("model")
            original(*arguments)

    def set_as_leader(original: Any, self: Any, values: Any) -> None:
        if "final" not in values:
            original(self, values)
            if "ledger" in values:
                child.by("ledger")
            return
        with child.span("recording the final result"):
            child.by("recording the result")
            original(self, values)
        child.write("begin", "after the final result")
        child.by("result recorded")

    def put(owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            return around(original, *arguments, **named)

        setattr(owner, name, wrapped)

    put(checkpoint.Checkpoint, "__init__", made)
    put(checkpoint.Checkpoint, "after_batch", after_batch)
    put(trainer, "_train_batch", train_batch)
    put(trainer, "_result", result)
    put(trainer, "logits_of", validate)
    put(checkpoint, "replace_file", replace_file)
    put(model_files, "replace_file", replace_file)
    put(Path, "replace", rename)
    put(Store, "ask", named("asking"))
    put(Store, "report", named("reporting an epoch"))
    put(MLflowRun, "epoch", named("logging an epoch"))
    put(Store, "tell", tell)
    put(objective, "remove", remove)
    put(MLflowRun, "end", end)
    put(final, "evaluated", test)
    put(final, "save_model", save_model)
    put(Store, "set_as_leader", set_as_leader)


def _run_child(order: dict[str, Any]) -> int:
    os.chdir(order["place"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, stream)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]  # the server's pipe and its buffer
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["run_study.py", *order["arguments"][1:]]
    _watch(_Child(Path(order["log"]), order["trap"]))
    from harness.cli.commands import main

    return main(order["arguments"], program="run_study.py")


# -- the server --------------------------------------------------------------------------------------------------------


def _serve() -> int:
    """Fork a child for every line on stdin; answer with its status. Returns in the children too, with their code."""
    for name in IMPORTS:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    orders, answers = sys.stdin, os.fdopen(os.dup(1), "w", buffering=1)
    for line in orders:
        order = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            return _run_child(order)
        status, killed = _wait(pid, order, began)
        answers.write(f"{json.dumps({'code': os.waitstatus_to_exitcode(status), 'killed': killed})}\n")
    return 0


def _wait(pid: int, order: dict[str, Any], began: float) -> tuple[int, float | None]:
    """The child's status, and when the server has killed it, if it has."""
    killed = None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status, killed
        seconds = time.monotonic() - began
        if order["seconds"] is not None and killed is None and seconds >= order["seconds"]:
            killed = time.monotonic()
            os.kill(pid, signal.Signals[order["signal"]])
        if seconds > PATIENCE_SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


class Server:
    """A process that has imported everything, to start studies from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.storm"],
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=PATIENCE_SECONDS)


# -- the storm ---------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """One process of a study, from its log."""

    aim: Aim | None
    code: int
    killed: float | None  # None when it was not
    lines: list[dict[str, Any]]

    def finished(self, name: str) -> dict[tuple[str, int, int], float]:
        """When each span of this name that was finished before the kill began; by training, epoch and step."""
        began: dict[tuple[str, int, int], float] = {}
        done: dict[tuple[str, int, int], float] = {}
        for line in self.lines:
            if line["name"] == name:
                where = line["key"], line["epoch"], line["step"]
                if line["what"] == "begin":
                    began[where] = line["time"]
                else:
                    done[where] = began[where]
        return done

    def begun(self, name: str) -> set[tuple[str, int, int]]:
        return {
            (line["key"], line["epoch"], line["step"])
            for line in self.lines
            if line["name"] == name and line["what"] == "begin"
        }

    def place(self) -> tuple[str, str]:
        """The innermost span that was under way at the kill, and the training that was assembled last."""
        opened: list[str] = []
        training = ""
        begun = False
        for line in self.lines:
            if line["what"] == "kill" or (self.killed is not None and line["time"] > self.killed):
                break
            if line["what"] == "begin":
                opened.append(line["name"])
                begun = True
            elif line["what"] == "end" and line["name"] in opened:
                del opened[len(opened) - 1 - opened[::-1].index(line["name"]) :]
            if "epoch" in line:
                training = f"{line['key']}, epoch {line['epoch']}"
            elif line["name"] == "made":
                training = line["key"]
        return opened[-1] if opened else "elsewhere" if begun else "starting", training

    def allowed(self) -> float:
        """What may be lost: the interval, the longest unit between two chances to write, the longest writing."""
        assert self.killed is not None
        unit = writing = 0.0
        free = None  # when the process went on after the last chance
        asked = None
        for line in self.lines:
            if line["time"] > self.killed:
                break
            if line["what"] != "check":
                continue
            if line["name"] == "asked":
                asked = line["time"]
                unit = max(unit, asked - free) if free is not None else unit
                continue
            if line["name"] == "done" and asked is not None:
                writing = max(writing, line["time"] - asked)
            free, asked = line["time"], None
        if asked is not None:
            writing = max(writing, self.killed - asked)
        elif free is not None:
            unit = max(unit, self.killed - free)
        return CHECKPOINT_SECONDS + unit + writing + SLACK_SECONDS


@dataclass(frozen=True)
class Result:
    """What a study that was killed and one that was not must agree on."""

    digest: str
    epochs: list[list[Any]]  # the EpochResults of every trial, without their seconds
    test_openings: int


@dataclass
class Storm:
    """A study that is killed again and again, in a folder of its own."""

    place: Path
    server: Server
    trials: int
    sampler: str = "tpe(n_startup_trials=3)"
    lives: list[Life] = field(default_factory=list)

    def __post_init__(self) -> None:
        from tests.study.test_main_job import write_study

        self.place.mkdir(parents=True, exist_ok=True)
        write_study(self.place, "MaxViT", self.sampler)

    def start(self, aim: Aim | None = None) -> Life:
        """Run the study until the aim is met, or to its end."""
        log, output = (self.place / f"{len(self.lives)}.{suffix}" for suffix in ("log", "out"))
        anywhere = aim is not None and aim.phase == "anywhere"
        answer = self.server.run(
            place=str(self.place),
            arguments=arguments(self.trials),
            log=str(log),
            output=str(output),
            trap=None if aim is None or anywhere else dataclasses.asdict(aim),
            seconds=aim.seconds if aim is not None and anywhere else None,
            signal=aim.signal if aim is not None else None,
        )
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        killed = next((line["time"] for line in lines if line["what"] == "kill"), answer["killed"])
        life = Life(aim, answer["code"], killed, lines)
        said = output.read_text() if output.exists() else ""
        if killed is None:
            assert life.code == 0, said
        elif aim is not None and aim.signal == "SIGKILL":
            # A timer may have been set so late that the process was done before; then it was not killed.
            assert life.code == -signal.SIGKILL, f"{aim}: exit code {life.code}\n{said}"
        else:
            # Before the handlers are there, a request to stop is a plain end; after the last line, it is too late.
            assert life.code in (INTERRUPTED, -signal.SIGTERM, 0), f"{aim}: exit code {life.code}\n{said}"
            assert "Traceback" not in said, f"{aim}: {said}"
        self.lives.append(life)
        return life

    def kills(self) -> list[Kill]:
        """The kills in order. What a kill has cost is known when the study has ended."""
        return [self._kill(number) for number, life in enumerate(self.lives) if life.killed is not None]

    def _kill(self, number: int) -> Kill:
        life = self.lives[number]
        assert life.aim is not None
        assert life.killed is not None
        lost = {name: self._again(number, name) for name in ("batch", "end of epoch")}
        times = [time for each in lost.values() for time in each]
        place, training = life.place()
        return Kill(
            aim=life.aim,
            code=life.code,
            place=place,
            training=training,
            batches=len(lost["batch"]),
            epochs=len(lost["end of epoch"]),
            seconds=life.killed - min(times) if times else 0.0,
            allowed=life.allowed(),
        )

    def _again(self, number: int, name: str) -> list[float]:
        """When those began that this process had finished and a later one did again.

        The first later one that came to the same training is the one that pays.
        """
        again = []
        for (key, epoch, step), began in self.lives[number].finished(name).items():
            heirs = (life for life in self.lives[number + 1 :] if any(each[0] == key for each in life.begun("batch")))
            heir = next(heirs, None)
            if heir is not None and (key, epoch, step) in heir.begun(name):
                again.append(began)
        return again

    # -- the law ---------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"sqlite:///{self.place}/studies/{NAME}.db"

    def result(self) -> Result:
        from harness.report import overview
        from harness.store.opening import read_store

        with read_store(NAME, self.url) as store:
            epochs = [[dataclasses.replace(each, seconds=0.0) for each in trial.epochs] for trial in store.trials()]
            return Result(overview.digest(store), epochs, store.attributes()["final"]["test_openings"])

    def check(self, expected: Result) -> None:
        """Raise AssertionError unless the finished study is the one that was never killed, and nothing is left over."""
        from harness.config import find as catalogue
        from harness.study import doctor
        from tests.study.test_main_job import check_mlflow

        assert self._states() == {"COMPLETE", "PRUNED"}
        assert self.result() == expected
        check_mlflow(self.place, trials=self.trials, seeds=SEEDS)
        self._check_metrics()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            well = doctor.consult(catalogue.find(str(self.place / "studies" / f"{NAME}.py")), self.url, None, fix=False)
        assert well, said.getvalue()
        assert not (self.place / "studies" / f"{NAME}.checkpoints").exists()
        for kill in self.kills():
            if kill.aim.signal == "SIGTERM":
                assert kill.batches == 0, f"{kill}: asked to stop, a study loses no finished batch"
            else:
                assert kill.seconds <= kill.allowed, f"{kill}: more was lost than an interval"

    def _states(self) -> set[str]:
        from harness.store.opening import read_store

        with read_store(NAME, self.url) as store:
            trials = store.optuna_study.get_trials()
        assert len(trials) == self.trials
        return {trial.state.name for trial in trials}

    def _check_metrics(self) -> None:
        """No metric of any MLflow run has a step twice, and those of an epoch are all there."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.place}/mlruns/mlflow.db")
        for run in client.search_runs([client.get_experiment_by_name(NAME).experiment_id]):
            steps = {
                name: [each.step for each in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            }
            for name, found in steps.items():
                assert len(found) == len(set(found)), f"{run.info.run_name}: {name} has steps {found}"
            if run.data.tags.get("harness.kind") == "trial":
                assert len({tuple(sorted(found)) for found in steps.values()}) == 1, f"{run.info.run_name}: {steps}"


def plan(chance: random.Random, number: int, anywhere: int) -> list[Aim]:
    """Storm `number` of several: every point once, and moments anywhere, in a random order that a study can meet.

    In three storms each point meets SIGTERM once and SIGKILL twice. The final run's points come last, as it does, and
    in its own order; of the two at its very end a storm has one, for after the first there may be no second.
    """
    points = [(phase, point) for phase, names in POINTS.items() for point in names]
    del points[-1 - number % 2]
    signals = ("SIGTERM", "SIGKILL", "SIGKILL")
    aims = [aim(phase, point, signals[(place + number) % 3], chance) for place, (phase, point) in enumerate(points)]
    search = [each for each in aims if each.phase != "final"]
    search += [aim("anywhere", "", signals[(place + number) % 3], chance) for place in range(anywhere)]
    chance.shuffle(search)
    return search + [each for each in aims if each.phase == "final"]


def rage(storm: Storm, aims: Sequence[Aim], say: Callable[[str], None] = lambda _: None) -> None:
    """Kill the study as the aims say, one after the other, then leave it alone to its end."""
    for each in aims:
        life = storm.start(each)
        met = "the study has ended before" if life.killed is None else f"exit code {life.code}, {life.place()[0]}"
        say(f"{each.signal} at {each.point or each.phase} {each.entry}, after {1000 * each.seconds:.1f} ms: {met}")
    storm.start()


def arguments(trials: int) -> list[str]:
    return ["run", "--study", NAME, "--device", "cpu", "--trials", str(trials), *SETTINGS]


def command(trials: int) -> str:
    return shlex.join(["python", "run_study.py", *arguments(trials)[1:]])


if __name__ == "__main__":
    sys.exit(_serve())
