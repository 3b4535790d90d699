"""A SQLite study's file while the study runs: lock it, and check that it was not moved or deleted.

A process can still write to a deleted or moved file, but its results are lost when it ends.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import filelock

from harness.base.errors import Halt, InputError
from harness.base.files import replace_file
from harness.store.database import check_writable, may_write

BUSY_SECONDS = 10.0
LOCK_SECONDS = 0.3  # `show` briefly takes the lock to see whether it is free


class OpenedFile:
    """The file as it was opened. `check` is cheap, to be called often."""

    def __init__(self, file: Path) -> None:
        self._file = file.absolute()
        # A pool would reconnect to whatever file has that path. This connection reads now, which opens the log.
        self._connection = sqlite3.connect(file, timeout=BUSY_SECONDS, check_same_thread=False)
        self._connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        # O_PATH, because closing a file opened otherwise would drop SQLite's locks on it.
        self._handle = os.open(file, os.O_PATH) if hasattr(os, "O_PATH") else None
        self._known = file.stat()

    def close(self) -> None:
        self._connection.close()
        if self._handle is not None:
            os.close(self._handle)

    def check(self) -> None:
        """Raise Halt if the file was deleted, replaced or moved; save its results first, if possible."""
        try:
            if os.path.samestat(self._file.stat(), self._known):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # the disk does not answer: the next write raises that
            return
        now = self._whereabouts()
        if now is not None:
            text = f"was moved to {now} while the study ran, with all results; move it back and"
        else:
            text = f"was deleted or replaced while the study ran{self._rescued()}"
        raise Halt(f"The study's database {self._file} {text} run the same command.")

    def _whereabouts(self) -> Path | None:
        """Return the file's current path, with the log written into it; None if it has none or it is unknown."""
        if self._handle is None or os.fstat(self._handle).st_nlink == 0:
            return None
        try:
            now = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
            if not os.path.samestat(now.stat(), os.fstat(self._handle)):
                return None
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # the log may be elsewhere
        except (OSError, sqlite3.Error):
            return None
        return now

    def _rescued(self) -> str:
        """Copy the results to a file beside the lost one; return what happened and what to do."""
        target = free_name(self._file, "rescued")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(target)) as copy:
                self._connection.backup(copy)
        except (OSError, sqlite3.Error) as error:
            with suppress(OSError):
                target.unlink(missing_ok=True)
            return f", and its results are lost ({error}); restore it from a backup and"
        return f"; its results were saved in {target}: rename that file to {self._file.name} and"


def free_name(file: Path, word: str) -> Path:
    """Return an unused path beside a study's file: STEM.WORD.db, or else STEM.WORD-1.db and so on."""
    names = (f"{file.stem}.{word}{f'-{number}' if number else ''}.db" for number in itertools.count())
    return next(path for name in names if not (path := file.with_name(name)).exists())


def holder(file: Path | None) -> str | None:
    """Return the PID of the process that holds a SQLite study, None if it is free."""
    if file is None or not lock_file(file).exists():
        return None
    if not may_write(file):  # the lock cannot be tried: rely on the holder's PID file
        return recorded_pid(file) if pid_file(file).exists() else None
    try:
        with filelock.FileLock(lock_file(file), blocking=False):
            return None
    except filelock.Timeout:
        return recorded_pid(file)


def lock_file(file: Path, word: str = "") -> Path:
    """Return the lock file of a database, the same for all links to it."""
    return Path(f"{file.resolve()}{word}.lock")


def pid_file(file: Path) -> Path:
    return Path(f"{file.resolve()}.pid")


def recorded_pid(file: Path) -> str:
    try:
        return pid_file(file).read_text().strip()
    except FileNotFoundError:
        return "unknown"


@contextmanager
def study_lock(file: Path | None, name: str) -> Iterator[None]:
    """Hold the study's lock file, which the system releases when the process ends; the PID file is informative."""
    if file is None:
        yield
        return
    if not file.parent.is_dir():
        raise InputError(f"--storage: there is no folder {file.parent}; create it first.")
    check_writable(file)
    lock, pid = filelock.FileLock(lock_file(file)), pid_file(file)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout as error:
        by = recorded_pid(file)
        text = f"Study {name!r} is being run by process {by}; wait for it, or stop it with `kill {by}`."
        raise InputError(text) from error
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error}); make its folder writable or give --storage.") from error
    try:
        replace_file(pid, f"{os.getpid()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # the folder may be gone or read-only; `check` reports the loss
            pid.unlink(missing_ok=True)
        lock.release()
