"""`python -m harness work`: train for a study that another machine serves, until it ends."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from harness.base import __version__
from harness.base.errors import Halt, InputError, first_line
from harness.base.processes import name_of_this
from harness.config.find import find_home
from harness.workers import wire
from harness.workers.head import Ended, HeadLost, do_through, opened_through
from harness.workers.worker import WorkerConfig

WAIT_SECONDS, RETRY_SECONDS = 600.0, 2.0  # for a server that is not up; between two attempts
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 300.0  # the server may wait for its database


class _Line:
    """An `Ask` over a connection; a thread that renews leases uses it, too."""

    def __init__(self, line: Connection) -> None:
        self._line, self._turn = line, threading.Lock()
        self.ended = False

    def __call__(self, method: str, *arguments: Any) -> Any:
        with self._turn:
            answered = False
            try:
                wire.send(self._line, [method, *arguments])
                good, value = wire.receive(self._line)
                answered = True
            except (OSError, EOFError) as error:
                raise HeadLost from error
            finally:
                if not answered:
                    self.close()  # half a message cannot be read
        if isinstance(value, Ended):
            self.ended = True
        if not good:
            raise value
        return value

    def close(self) -> None:
        self._line.close()


def work(address: str, key_file: str | None, data_root: str | None, device: str | None) -> None:
    """Do the jobs of the server at HOST:PORT until it ends.

    `data_root` and `device` replace those of the server's command. Raises InputError if there is no such server, if it
    has another key, or if study, versions or data set differ from its own; Halt if it was lost and does not come back.
    """
    if wire.parts(address) is None:
        raise InputError(f"{address!r} is not HOST:PORT, as `run --serve` prints it.")
    given = key_file or os.environ.get(wire.KEY_VARIABLE)
    if not given:
        raise InputError(f"Give the key file of `run --serve` with --key-file, or in {wire.KEY_VARIABLE}.")
    file, before = Path(given), False
    key = wire.read_key(file)
    while True:
        ask = _Line(_connected(address, file, key, before))
        try:
            _work(ask, address, data_root, device)
        except HeadLost:
            if ask.ended:
                print(f"The study at {address} has ended, or was interrupted.")
                return
            print(f"The connection to {address} is lost.", file=sys.stderr, flush=True)
            before = True
            time.sleep(RETRY_SECONDS)
        finally:
            ask.close()


def _work(ask: _Line, address: str, data_root: str | None, device: str | None) -> None:
    owner, where = name_of_this(), socket.gethostname()
    config = _here(ask("join", owner, where, __version__), data_root, device)
    with opened_through(ask, owner, config) as context:
        print(f"Working for {address} on the study {context.study.name}.", flush=True)
        while True:
            if (job := ask("job")) is not None:
                do_through(ask, owner, job, context)


def _here(config: WorkerConfig, data_root: str | None, device: str | None) -> WorkerConfig:
    """Return the settings for this machine: its own paths where it lacks those of the server."""
    file, checkpoints, root = config.file, config.checkpoints, config.data_root
    if not file.is_file():
        file = find_home() / "studies" / file.name
    if not file.is_file():
        raise InputError(f"There is no study file {file} here, nor {config.file}; copy the server's to this machine.")
    if not os.access(checkpoints.parent, os.W_OK):
        checkpoints = file.with_name(checkpoints.name)
    if root is not None and not Path(root).is_dir():
        root = None
    return dataclasses.replace(
        config,
        home=None,
        file=file.resolve(),
        checkpoints=checkpoints.resolve(),
        data_root=data_root or root,
        device=device or config.device,
    )


def _connected(address: str, file: Path, key: bytes, before: bool) -> Connection:
    """Return a connection to the server; wait for one that is not up. `before`: whether it was."""
    until, waits = time.monotonic() + WAIT_SECONDS, False
    while True:
        try:
            return _attempt(address, key)
        except (socket.gaierror, UnicodeError) as error:  # the second: of a name such as first..example
            reason = getattr(error, "strerror", None) or first_line(error)
            if not before:  # else the network may be down
                raise InputError(f"The host of {address} is unknown ({reason}); check its name.") from error
        except AuthenticationError as error:
            raise InputError(f"{address} has another key than {file}; copy its key file to this machine.") from error
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
        if time.monotonic() > until:
            text = f"No server at {address} in {WAIT_SECONDS / 60:.0f} minutes ({reason})"
            if before:
                raise Halt(f"{text}.")
            raise InputError(f"{text}; start it with `run --serve`, and check the address and the firewall.")
        if not waits:
            print(f"Waiting for {address} ({reason}).", file=sys.stderr, flush=True)
            waits = True
        time.sleep(RETRY_SECONDS)


def _attempt(address: str, key: bytes) -> Connection:
    connected = socket.create_connection(wire.parts(address), CONNECT_SECONDS)  # type: ignore[arg-type]
    line = wire.steady(connected, ANSWER_SECONDS)
    try:
        if not line.poll(CONNECT_SECONDS):
            raise TimeoutError("it does not answer")
        answer_challenge(line, key)
        deliver_challenge(line, key)
    except BaseException:
        line.close()
        raise
    return line
