"""Commands in processes of their own, forked from one that has imported everything.

The imports of torch, MLflow, Optuna and the harness take seconds of a processor; the tests start more than a hundred
commands, and pay for them once. What is started so is a real process, to be killed for real. A test of imports, or of
the interpreter's options, needs a `subprocess`.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.config.find import PROJECT
from tests.patience import PATIENCE_SECONDS

# What a study imports on its way; the tracker first, for it sets MLflow's environment.
IMPORTS = (
    "harness.tracking.mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "harness.study.start",
    "harness.study.coordinator",
    "harness.report.display",
    "harness.study.doctor",
    "harness.study.stages",
    "harness.models.maxvit",
    "harness.garden.drawing",
    "scipy.stats",
    "optuna.importance",
    "optuna.visualization",
    "plotly.graph_objects",
)
LARGEST = 1 << 20  # bytes of an order


class Process:
    """A started command, as `subprocess.Popen` has it; stdout is a pipe, and stderr goes there, too, or to its own."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stderr: int = subprocess.STDOUT,
        start_new_session: bool = False,
    ) -> None:
        """`arguments` are Python's: a script, or `-m` and a module, and what follows. `env` is ours by default."""
        ours, theirs = socket.socketpair()
        out, written = os.pipe()
        faults, complained = os.pipe() if stderr == subprocess.PIPE else (None, written)
        order = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        socket.send_fds(_server(), [json.dumps(order).encode()], [theirs.fileno(), written, complained])
        theirs.close()
        for each in {written, complained}:
            os.close(each)
        self._line = ours.makefile("r")
        self._ended = ours
        self.pid = int(self._line.readline())
        self.returncode: int | None = None
        self.stdout = os.fdopen(out)
        self.stderr = None if faults is None else os.fdopen(faults)

    def _has_ended(self, seconds: float) -> bool:
        poll = select.poll()  # `select.select` takes no descriptor above 1023, and a long run of tests holds more
        poll.register(self._ended, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.returncode is None and self._has_ended(0):
            self.returncode = int(self._line.readline())
            self._line.close()
            self._ended.close()
        return self.returncode

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        if self.returncode is None and not self._has_ended(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float = PATIENCE_SECONDS) -> tuple[str, str]:
        """What is still to be read, once the process and all that hold its pipes have ended."""
        said = ["", ""]

        def read(number: int, stream: Any) -> None:
            said[number] = stream.read()
            stream.close()

        streams = [(number, each) for number, each in enumerate((self.stdout, self.stderr)) if each and not each.closed]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        self.wait(timeout)
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """The line to the process that forks, which is started at the first use and ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for each in (ours, theirs):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C at the tests is theirs
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(orders: socket.socket) -> NoReturn:
    """Fork a child for every order, and say of each when it has ended; until nobody gives orders any more."""
    given = dict(os.environ)
    for name in IMPORTS:
        importlib.import_module(name)
    settings = {name: value for name, value in os.environ.items() if given.get(name) != value}  # of the imports
    assert threading.active_count() == 1, "a fork would lose the other threads"
    waiting = selectors.DefaultSelector()
    waiting.register(orders, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.data is not None:
                pid, line = key.data
                waiting.unregister(key.fd)
                os.close(key.fd)
                line.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
                line.close()
                continue
            message, descriptors, _, _ = socket.recv_fds(orders, LARGEST, 3)
            if not message:
                sys.exit(0)
            line = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                waiting.close()
                orders.close()
                line.close()
                _become(json.loads(message), settings, *descriptors[1:])
            for each in set(descriptors[1:]):
                os.close(each)
            line.sendall(f"{pid}\n".encode())
            waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, line))


def _become(order: Mapping[str, Any], settings: Mapping[str, str], out: int, complained: int) -> NoReturn:
    """Be the process that was ordered."""
    if order["session"]:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (out, 1), (complained, 2)):
        os.dup2(descriptor, number)
    for descriptor in {nothing, out, complained} - {0, 1, 2}:
        os.close(descriptor)
    # New ones, for the old ones remember what their files were able to do.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update({**settings, **order["env"]})
    os.chdir(order["cwd"])
    arguments = order["arguments"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
