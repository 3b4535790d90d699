"""Which process: named so that another one can tell, where it can be told, whether it is gone."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from hashlib import sha256
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")
SILENT_SECONDS = 3600.0  # a file that is being written changes more often than that
MARK = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d*)-[0-9a-f]{8}\.partial")


def here() -> str:
    """This machine since its start, and on it the processes among which a PID means something.

    Machines may share their host's name, and the first PID namespace has the same number everywhere: only the boot's id
    tells them apart. Where there is none, the address of the network card does, or else a random number, by which no
    process is taken for dead.
    """
    try:
        boot = BOOT.read_text().strip()
    except OSError:
        boot = ""
    try:
        space = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        space = "-"
    return f"{socket.gethostname()}/{boot or f'{uuid.getnode():012x}'}/{space}"


def name_of_this() -> str:
    """A new name for this process: its place, and when it began and a part of its own, for PIDs come again."""
    pid = os.getpid()
    return f"{here()}/{pid} {_began(pid)}.{uuid.uuid4().hex[:8]}"


def is_gone(name: str) -> bool:
    """Whether it was a process of this machine that no longer lives; of others nothing is known."""
    place, _, process = name.rpartition("/")
    pid, _, rest = process.partition(" ")
    return place == here() and not _lives(int(pid), rest.rpartition(".")[0])


def in_words(name: str) -> str:
    """A process as people name it: `1234 on gpu-7`."""
    place, _, process = name.rpartition("/")
    return f"{process.partition(' ')[0]} on {place.rsplit('/', 2)[0]}"


def mark() -> str:
    """An ending for the name of a file that this process is about to write, which nobody else gives."""
    pid = os.getpid()
    return f".{_short(here())}-{pid}-{_began(pid)}-{uuid.uuid4().hex[:8]}.partial"


def is_partial(name: str, of: str) -> bool:
    """Whether a file of this name was to become the file `of`."""
    return name.startswith(of) and (MARK.fullmatch(name, len(of)) is not None or name == f"{of}.partial")


def is_abandoned(partial: Path) -> bool:
    """Whether whoever wrote this file is dead; one of another machine is, when it has long written nothing."""
    found = MARK.search(partial.name)
    if found is None:  # of an older version
        return True
    if found[1] == _short(here()):
        return not _lives(int(found[2]), found[3])
    try:
        return time.time() - partial.stat().st_mtime > SILENT_SECONDS
    except FileNotFoundError:
        return True


def _short(place: str) -> str:
    return sha256(place.encode(errors="surrogatepass")).hexdigest()[:8]


def _lives(pid: int, began: str) -> bool:
    """Whether a process lives that began then; an empty time is not known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process
    return not began or _began(pid) in ("", began)


def _began(pid: int) -> str:
    """When a process began, in the kernel's ticks since the boot; empty where that cannot be known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    return stat.rpartition(b")")[2].split()[19].decode()  # the program's name, in brackets, may hold anything
