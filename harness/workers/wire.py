"""Messages between machines: JSON over a connection on which both sides have proved that they know the key.

The proof is that of `multiprocessing.connection` (HMAC of a random challenge). Unlike there, nothing is unpickled: a
message holds JSON's types, tuples, bytes, paths, and the records and errors named here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shlex
import socket
import stat
import struct
import tempfile
from dataclasses import fields, is_dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.base.errors import Halt, InputError
from harness.config import events, jobs

KEY_VARIABLE = "HARNESS_KEY_FILE"
KEY_BYTES = 16  # at least
HOST_AND_PORT = re.compile(r"\[?([^\s/]+?)\]?:(\d{1,5})")


def parts(address: str) -> tuple[str, int] | None:
    """Return host and port of HOST:PORT; None if it is something else."""
    found = HOST_AND_PORT.fullmatch(address)
    return (found[1], int(found[2])) if found is not None and int(found[2]) <= 65535 else None


# -- the key --------------------------------------------------------------------------------------------------------


def read_key(file: Path) -> bytes:
    """Return the key in a file. Raises InputError if it is missing, short, or readable by other users."""
    if file.is_dir():
        raise InputError(f"{file} is a folder; give the key file.")
    if not file.is_file():
        raise InputError(f"There is no key file {file}; copy the one of `run --serve` to this machine.")
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise InputError(f"Other users may read the key file {file}; run chmod 600 {shlex.quote(str(file))}.")
    key = file.read_bytes().strip()
    if len(key) < KEY_BYTES:
        raise InputError(
            f"The key in {file} has {len(key)} bytes, but needs {KEY_BYTES}; delete the file, and `run --serve` "
            "writes a new one."
        )
    return key


def make_key(file: Path) -> None:
    """Write a new key, which only this user may read, unless the file exists; whole, or not at all."""
    if file.exists():
        return
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f"{file.name}.", delete=False) as opened:
        made = Path(opened.name)
        try:
            opened.write(f"{secrets.token_hex(32)}\n")
            opened.flush()
            os.fsync(opened.fileno())
            try:
                os.link(made, file)
            except FileExistsError:  # another command was faster
                pass
            except OSError:  # a file system without hard links
                made.replace(file)
        finally:
            made.unlink(missing_ok=True)


# -- connections ----------------------------------------------------------------------------------------------------


def listen(address: str) -> socket.socket:
    """Return a socket that listens at HOST:PORT. Raises InputError if it cannot."""
    host, port = parts(address) or (address, 0)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"--serve cannot listen at {address} ({error.strerror}); give another HOST:PORT.") from error


def steady(connected: socket.socket, seconds: float) -> Connection:
    """Return a connection that raises OSError when the other side is silent, or takes nothing, for so many seconds."""
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # `Connection` reads the descriptor itself
        connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))
    return Connection(connected.detach())


def send(line: Connection, value: Any) -> None:
    line.send_bytes(json.dumps(_plain(value)).encode())


def receive(line: Connection) -> Any:
    """Return the next message. Raises EOFError at the end, and OSError for what is no message."""
    try:
        return _value(json.loads(line.recv_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"not a message: {error}") from error


# -- messages -------------------------------------------------------------------------------------------------------


@cache
def known() -> dict[str, type]:
    """Return the classes that a message may hold, by name."""
    from harness.search.loop import TooManyFailures
    from harness.store.leases import LeaseLost
    from harness.store.records import TrialRecord
    from harness.store.store import Asked, NoTrialFree
    from harness.workers import head, worker

    records = (events.Metrics, events.EpochResult, events.Completed, events.Pruned, events.Diverged, events.Failed)
    told = (events.TrialStarted, events.Reached, events.EpochEnded, events.TrialEnded, events.TrialLost)
    stored = (events.SearchStopped, jobs.Search, jobs.Train, Asked, TrialRecord)
    sent = (worker.WorkerConfig, worker.Done, worker.Stopped)
    errors = (InputError, Halt, TooManyFailures, LeaseLost, NoTrialFree, head.Replaced, head.Ended)
    return {each.__name__: each for each in (*records, *told, *stored, *sent, *errors)}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a list begins with the name of its class."""
    name = type(value).__name__
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [name, *map(_plain, value)]
    if isinstance(value, dict):
        return [name, *([_plain(key), _plain(each)] for key, each in value.items())]
    if isinstance(value, bytes):
        return [name, base64.b64encode(value).decode()]
    if isinstance(value, Path):
        return ["Path", str(value)]
    if known().get(name) is not type(value):
        raise TypeError(f"A message cannot hold a {name}.")
    if is_dataclass(value):
        return [name, *([field.name, _plain(getattr(value, field.name))] for field in fields(value))]
    assert isinstance(value, BaseException)
    return [name, *map(_plain, value.args)]


def _value(plain: Any) -> Any:
    if not isinstance(plain, list):
        return plain
    name, *content = plain
    if name == "list":
        return [_value(each) for each in content]
    if name == "tuple":
        return tuple(_value(each) for each in content)
    if name == "dict":
        return {_value(key): _value(each) for key, each in content}
    if name == "bytes":
        return base64.b64decode(content[0])
    if name == "Path":
        return Path(content[0])
    made = known()[name]
    if is_dataclass(made):
        return made(**{field: _value(each) for field, each in content})
    return made(*map(_value, content))
