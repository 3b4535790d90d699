"""Process names, by which another process on the same machine can tell whether one is dead."""

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
    """Return an identifier of this machine, its current boot, and the PID namespace.

    Machines may share a host name, and the first PID namespace has the same number everywhere: only the boot id
    tells them apart. Without one, the network card's address does, or else a random number, with which no
    process counts as dead.
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
    """Return a new name for this process: machine, PID, start time and a random part, as PIDs recur."""
    pid = os.getpid()
    return f"{here()}/{pid} {_began(pid)}.{uuid.uuid4().hex[:8]}"


def is_gone(name: str) -> bool:
    """Return whether `name` is a dead process of this machine; False for other machines."""
    place, _, process = name.rpartition("/")
    pid, _, rest = process.partition(" ")
    return place == here() and not _lives(int(pid), rest.rpartition(".")[0])


def in_words(name: str) -> str:
    """Format a process name: `1234 on gpu-7`."""
    place, _, process = name.rpartition("/")
    return f"{process.partition(' ')[0]} on {place.rsplit('/', 2)[0]}"


def mark() -> str:
    """Return a unique suffix for a temporary file of this process."""
    pid = os.getpid()
    return f".{_short(here())}-{pid}-{_began(pid)}-{uuid.uuid4().hex[:8]}.partial"


def is_partial(name: str, of: str) -> bool:
    """Return whether this is a temporary file of the file `of`."""
    return name.startswith(of) and (MARK.fullmatch(name, len(of)) is not None or name == f"{of}.partial")


def is_abandoned(partial: Path) -> bool:
    """Return whether the file's writer is dead; on another machine, whether it stopped writing long ago."""
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
    """Return whether the process that began then lives; empty: unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    return not began or _began(pid) in ("", began)


def _began(pid: int) -> str:
    """Return when a process started, in kernel ticks since the boot; empty if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    return stat.rpartition(b")")[2].split()[19].decode()  # the program's name, in brackets, may be anything
