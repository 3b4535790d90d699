"""Signals as a user and a scheduler send them, to processes of their own: a batch is finished first, or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config.study import Study
from harness.training import interrupt
from harness.training.loop import fit
from tests.conftest import PROJECT
from tests.patience import PATIENCE_SECONDS
from tests.small import SmallNet, small_study, study_in
from tests.training.test_checkpoint import fresh, parameters, run_until
from tests.training.test_loop import equal, state, timeless

HEAD = """
import os, signal, sys
from harness.training import interrupt

def send(*names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
interrupt.install()
"""


def unmeasured() -> dict[str, str]:
    """The environment without coverage's: what is raised while that holds its own lock leaves it locked."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def child(code: str) -> tuple[list[str], str]:
    """The words that a process of its own says, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code],
        cwd=PROJECT,
        env=unmeasured(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return done.stdout.split(), done.stderr


INSIDE = """
try:
    with interrupt.undivided():
        send({signals})
        print("finished")
    print("after")
except KeyboardInterrupt:
    print("stopped")
"""

OUTSIDE = """
try:
    send({signals})
    print("after")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("names", [("SIGINT",), ("SIGTERM",), ("SIGTERM",) * 3, ("SIGINT", "SIGTERM", "SIGTERM")])
def test_a_request_inside_waits_for_the_end(names: tuple[str, ...]) -> None:
    words, said = child(INSIDE.format(signals=", ".join(map(repr, names))))
    assert words == ["finished", "stopped"]
    assert said.count("Stopping after this batch") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("names", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGTERM", "SIGTERM", "SIGINT")])
def test_ctrl_c_after_a_request_stops_at_once(names: tuple[str, ...]) -> None:
    words, said = child(INSIDE.format(signals=", ".join(map(repr, names))))
    assert words == ["stopped"]
    assert "Traceback" not in said


def test_a_request_is_heard_though_nobody_reads_what_it_says() -> None:
    gone = "reader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 2)\n"
    words, _ = child(gone + INSIDE.format(signals="'SIGTERM'"))
    assert words == ["finished", "stopped"]


def test_what_a_live_display_shows_is_not_printed() -> None:
    code = "interrupt.displayed(True)\n" + INSIDE.format(signals="'SIGINT'")
    assert child(code) == (["finished", "stopped"], "")


def test_what_another_process_says_is_not_said_again() -> None:
    code = "interrupt.install(quiet=True)\ninterrupt.notice()\n" + INSIDE.format(signals="'SIGINT'")
    assert child(code) == (["finished", "stopped"], "")


def test_a_process_that_starts_hears_of_ctrl_c_when_it_is_ready() -> None:
    code = """
import subprocess, time
program = "import os, signal, time; from harness.training import interrupt; os.kill(os.getpid(), signal.SIGINT)" + (
    "\\nprint('ready', flush=True)\\ntry:\\n    interrupt.install(); time.sleep(9)"
    "\\nexcept KeyboardInterrupt:\\n    print('stopped')"
)
with interrupt.inherited_later():
    process = subprocess.Popen([sys.executable, "-c", program])
process.wait()
"""
    assert child(code) == (["ready", "stopped"], "")


SWALLOWED = """
import time
import weakref

class Thing:
    pass

thing = Thing()
kept = weakref.ref(thing, lambda _: send({name!r}))
try:
    del thing
    time.sleep(10)
    print("after")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_request_inside_a_callback_whose_exceptions_python_swallows_is_heard_after_it(name: str) -> None:
    words, said = child(SWALLOWED.format(name=name))
    assert words == ["stopped"]
    assert "Traceback" not in said


def test_a_request_that_waits_to_be_made_again_is_forgotten_with_the_run_that_it_was_for() -> None:
    words, said = child("""
import time, types
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt.UNHEARD_SECONDS = 0.3
with interrupt.handled():
    interrupt._unraisable(types.SimpleNamespace(exc_type=KeyboardInterrupt))
with interrupt.handled():
    time.sleep(1)
    print(interrupt.requested())
""")
    assert (words, said) == (["False"], "")


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_request_that_waits_to_be_made_again_outlasts_a_second_install(swallowed: bool) -> None:
    words, said = child(
        "import time, types\ninterrupt.UNHEARD_SECONDS = 0.3\n"
        + (
            "interrupt._unraisable(types.SimpleNamespace(exc_type=KeyboardInterrupt))"
            if swallowed
            else "interrupt._is_importing = lambda frame: True\nsignal.raise_signal(signal.SIGINT)\n"
            "interrupt._is_importing = lambda frame: False"
        )
        + "\ninterrupt.install()\ntry:\n    time.sleep(10)\nexcept KeyboardInterrupt:\n    print('stopped')\n"
    )
    assert (words, said) == (["stopped"], "")


def test_a_request_that_is_made_again_before_python_has_left_the_callback_is_not_lost() -> None:
    """On a busy machine, starting a thread takes long."""
    slow = """
import threading
start = threading.Thread.start

def slowly(thread):
    start(thread)
    time.sleep(0.2)

threading.Thread.start = slowly
"""
    words, said = child("import time" + slow + SWALLOWED.format(name="SIGINT"))
    assert words == ["stopped"]
    assert "Traceback" not in said


IMPORTED = """
import importlib.abc, importlib.util, time

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name in ("fragile", "inner") else None

    def exec_module(self, module):
        if module.__name__ == "inner":
            send({signals})
            print("whole")
            return
        try:
            import inner
        except BaseException:
            print("swallowed")

sys.meta_path.insert(0, Finder())
try:
    import fragile
    time.sleep({seconds})
    print("after")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("names", [("SIGINT",), ("SIGTERM",), ("SIGTERM", "SIGTERM")])
def test_a_request_inside_an_import_whose_library_swallows_exceptions_is_heard_after_it(names: tuple[str, ...]) -> None:
    assert child(IMPORTED.format(signals=", ".join(map(repr, names)), seconds=10)) == (["whole", "stopped"], "")


def test_ctrl_c_twice_does_not_wait_for_an_import() -> None:
    assert child(IMPORTED.format(signals="'SIGINT', 'SIGINT'", seconds=0))[0][0] == "swallowed"


HEAVY = """
import importlib.abc, os, signal, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Watch())
sys.argv = ["run_study.py", "--study", "tiny"]
import runpy
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["harness.cli.commands", "optuna", "torch.nn", "mlflow.entities"])
def test_ctrl_c_while_something_heavy_is_imported_ends_a_start_with_130(
    name: str, tmp_path: Path, image_cache: Path, empty_mlflow: Path
) -> None:
    study_in(tmp_path, image_cache)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_mlflow, tmp_path / "mlruns" / "mlflow.db")
    done = subprocess.run(
        [sys.executable, "-c", HEAVY.format(name=name, path=str(PROJECT / "run_study.py"))],
        cwd=tmp_path,
        env=unmeasured() | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 130, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "partially initialized" not in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_request_outside_of_everything_ends_with_130(name: str) -> None:
    """Between the imports and the command, or after it."""
    done = subprocess.run([sys.executable, "-c", f"{HEAD}send({name!r})"], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


SERVING = """
import os, signal, sys
import uvicorn
from harness.cli import commands

async def app(scope, receive, send):
    os.kill(os.getpid(), signal.SIGINT)

commands.COMMANDS["show"] = lambda args: uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical")).run() or 0
commands.process(["show", "tiny"])
"""


def test_ctrl_c_ends_a_server_with_130_also_where_a_shell_had_it_ignored() -> None:
    """As one does that is not interactive, for what it starts in the background."""
    done = subprocess.run(
        [sys.executable, "-c", SERVING],
        cwd=PROJECT,
        env=unmeasured(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_what_else_python_swallows_is_still_shown() -> None:
    code = """
class Thing:
    def __del__(self):
        raise ValueError("swallowed")

thing = Thing()
del thing
print("after")
"""
    words, said = child(code)
    assert words == ["after"]
    assert "ValueError: swallowed" in said


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_outside_it_stops_at_once(name: str) -> None:
    words, said = child(OUTSIDE.format(signals=repr(name)))
    assert words == ["stopped"]
    assert said == ""


def test_between_two_batches_it_stops_at_once() -> None:
    code = """
try:
    with interrupt.undivided():
        print("one")
    send("SIGTERM")
    print("between")
except KeyboardInterrupt:
    print("stopped")
"""
    assert child(code) == (["one", "stopped"], "")


def test_sigterm_again_does_not_disturb_the_way_out() -> None:
    """A scheduler repeats itself while the checkpoint is written."""
    code = """
try:
    with interrupt.undivided():
        send("SIGTERM")
except KeyboardInterrupt:
    send("SIGTERM", "SIGTERM")
    print("saved")
"""
    assert child(code)[0] == ["saved"]


def test_an_error_inside_is_not_hidden_and_the_request_is_kept() -> None:
    code = """
try:
    with interrupt.undivided():
        send("SIGINT")
        raise ValueError
except ValueError:
    print("error")
try:
    with interrupt.undivided():
        print("next")
except KeyboardInterrupt:
    print("stopped")
"""
    assert child(code)[0] == ["error", "next", "stopped"]


def test_without_a_request_nothing_stops() -> None:
    code = """
for _ in range(3):
    with interrupt.undivided():
        pass
print("done")
"""
    assert child(code) == (["done"], "")


def test_a_signal_at_a_random_moment_never_cuts_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment, inside, between or at the edges: what has begun has ended."""
    # A tracer of coverage may be cut off while it holds a lock that the child's end waits for.
    for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]:
        monkeypatch.delenv(name)
    code = """
import threading, time
begun = ended = 0
threading.Timer(0.05, send, ("SIGTERM",)).start()
try:
    while True:
        with interrupt.undivided():
            begun += 1
            ended += 1
except KeyboardInterrupt:
    print(begun - ended)
"""
    assert {child(code)[0][0] for _ in range(5)} == {"0"}


# --- a training that is asked to stop ---


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process asked to stop as a study is; afterwards the tests' own handlers are back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    interrupt.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupt._State.requested = interrupt._State.undivided = False


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("names", [("SIGINT",), ("SIGTERM",), ("SIGTERM", "SIGTERM")])
@pytest.mark.parametrize("step_of_signal", [1, 2, 3])
def test_the_checkpoint_after_a_request_inside_a_batch_has_that_batch_done(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], step_of_signal: int
) -> None:
    path = tmp_path / "a.safetensors"
    config = dataclasses.replace(study.train, backbone=SmallNet(), batch_size=32, epochs=4)
    checkpoint = fresh(path, config)
    optimizer, step, steps = checkpoint.training.optimizer, checkpoint.training.optimizer.step, []

    def signalled(*args: Any) -> None:
        steps.append(1)
        if len(steps) == step_of_signal:
            for name in names:
                os.kill(os.getpid(), getattr(signal, name))
        step()

    monkeypatch.setattr(optimizer, "step", signalled)
    with pytest.raises(KeyboardInterrupt), checkpoint.saved_when_stopped():
        list(fit(checkpoint.training, checkpoint.after_batch))
    assert len(steps) == step_of_signal
    again = fresh(path, config)
    assert again.restore()
    assert len(again.training.progress.epochs) + again.training.progress.step == step_of_signal
    counts = {int(again.training.optimizer.state[each]["step"]) for each in parameters(again.training)}
    assert counts == {step_of_signal}


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_twice_inside_a_batch_writes_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = fresh(tmp_path / "a.safetensors", dataclasses.replace(study.train, backbone=SmallNet()))

    def signalled(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint.training.optimizer, "step", signalled)
    with pytest.raises(KeyboardInterrupt), checkpoint.saved_when_stopped():
        list(fit(checkpoint.training, checkpoint.after_batch))
    assert not checkpoint.path.exists()


TRAINING = """
import pathlib
from tests.small import small_study
from tests.training.test_checkpoint import fresh
from harness.training.loop import fit

checkpoint = fresh(pathlib.Path({path!r}), small_study({cache!r}).train)
forward = checkpoint.training.model.forward

def signalled(images):
    if checkpoint.training.progress.step == 1:
        send("SIGTERM")
    return forward(images)

checkpoint.training.model.forward = signalled
try:
    with checkpoint.saved_when_stopped():
        for result in fit(checkpoint.training, checkpoint.after_batch):
            print("epoch")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
def test_a_process_told_to_end_inside_a_batch_is_gone_on_with_to_the_same_bits(
    image_cache: Path, tmp_path: Path
) -> None:
    path, study = tmp_path / "a.safetensors", small_study(image_cache)
    words, _ = child(TRAINING.format(path=str(path), cache=str(image_cache)))
    assert words == ["stopped"]
    again, whole = fresh(path, study.train), fresh(tmp_path / "b.safetensors", study.train)
    assert again.restore()
    assert again.training.progress.step == 2
    run_until(again)
    run_until(whole)
    assert timeless(again.training.progress.epochs) == timeless(whole.training.progress.epochs)
    assert equal(state(again.training), state(whole.training))
