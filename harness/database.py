"""Databases: what their URLs mean, opening them, and holding one against a second process.

SQLite runs in WAL mode with synchronous=NORMAL: a killed process loses nothing, and readers (a dashboard, `show`) do
not block the writer. After a power cut the last few committed lines may be missing, never a broken file.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from harness.errors import Halt, InputError
from harness.files import replace_file

T = TypeVar("T")

BUSY_TIMEOUT_SECONDS = 60
OPTUNA_TABLES = {"studies", "study_directions", "trials", "version_info"}


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL, None for other databases. Raises InputError when `url` is no database URL."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except SQLAlchemyError as error:
        raise InputError(f"--storage {url!r} is no database URL; write sqlite:///FILE or postgresql://...") from error
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise InputError(f"--storage {url!r} lives in memory and could not be resumed; write sqlite:///FILE.")
    return Path(parsed.database)


def check_database(url: str) -> None:
    """Raise InputError unless the URL can be opened and holds either nothing or Optuna's tables. Writes nothing."""
    file = sqlite_file(url)
    if file is not None:
        if not file.exists() or file.stat().st_size == 0:
            if not file.parent.is_dir():
                raise InputError(f"--storage {url!r}: there is no folder {file.parent}; make it first.")
            return
        _check_tables(url, *_sqlite_tables(file))
        return
    try:
        engine = sqlalchemy.create_engine(url)
        _check_tables(url, *sqlalchemy.inspect(engine).get_table_names())
        engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        raise _unopened(url, error) from error


def outlast(url: str, operation: Callable[[], T]) -> T:
    """What `operation` returns; waits while another program locks the database. Raises Halt when the database fails.

    It may be cut off anywhere and called again.
    """
    said = False
    while True:
        try:
            return operation()
        except (StorageInternalError, SQLAlchemyError) as error:
            cause = _cause(error)
            if "locked" not in cause:
                raise _failed(url, cause) from error
            if not said:
                print(f"The database {url} is locked by another program; waiting for it.", file=sys.stderr)
                said = True


def _cause(error: BaseException) -> str:
    """What the database itself said; Optuna and SQLAlchemy wrap it."""
    error = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    return _first_line(getattr(error, "orig", None) or error)


def _failed(url: str, cause: str) -> Halt:
    mend = "make room" if _no_room(cause) else "mend that"
    return Halt(f"The database {url} failed ({cause}); {mend}, nothing finished is lost.")


def _no_room(cause: str) -> bool:
    """SQLite's words for it, the second when its shared memory or a file's size finds none; and PostgreSQL's."""
    return any(words in cause for words in ("disk is full", "disk I/O error", "No space left"))


def _unopened(url: str, error: BaseException) -> Exception:
    """What to raise when a database cannot be opened: no room is no fault of the URL."""
    cause = _cause(error)
    return _failed(url, cause) if _no_room(cause) else InputError(f"--storage {url!r} cannot be opened: {cause}")


def _sqlite_tables(file: Path) -> list[str]:
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_SECONDS)
        try:
            return [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        finally:
            connection.close()
    except sqlite3.Error as error:
        if file.is_file() and _no_room(str(error)):
            raise _failed(f"sqlite:///{file}", str(error)) from error
        raise InputError(
            f"{file} cannot be opened as a study ({error}); give another --storage, or move it."
        ) from error


def _check_tables(url: str, *tables: str) -> None:
    # Any of Optuna's will do: a process may have been killed while it made them, and they are completed on opening.
    if tables and not OPTUNA_TABLES.intersection(tables):
        raise InputError(f"{url} is a database but not a study; give another --storage.")


def connect(url: str) -> optuna.storages.RDBStorage:
    """Raises InputError when the URL cannot be opened, Halt when there is no room for what opening writes."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url))
    except (SQLAlchemyError, ImportError, RuntimeError) as error:
        raise _unopened(url, error) from error
    if sqlite_file(url) is not None:
        sqlalchemy.event.listen(storage.engine, "connect", _set_pragmas)
        storage.engine.dispose()  # connections made before the listener are given back
    return storage


def _engine_options(url: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": BUSY_TIMEOUT_SECONDS}} if sqlite_file(url) is not None else {}


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def dispose(storage: optuna.storages.RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def holder(file: Path | None) -> str | None:
    """The PID of the process that holds a SQLite study, None when nobody does."""
    lock = None if file is None else Path(f"{file}.lock")
    if lock is None or not lock.exists():
        return None
    try:
        with filelock.FileLock(lock, blocking=False):
            return None
    except filelock.Timeout:
        return _pid(file)


def pid_file(file: Path) -> Path:
    return Path(f"{file}.pid")


def _pid(file: Path | None) -> str:
    named = None if file is None else pid_file(file)
    return named.read_text().strip() if named is not None and named.exists() else "unknown"


@contextmanager
def held(file: Path | None, name: str) -> Iterator[None]:
    """Hold the study's lock file. The lock goes with the process, however it ends; the PID beside it is a courtesy."""
    if file is None:
        yield
        return
    if not file.parent.is_dir():
        raise InputError(f"--storage: there is no folder {file.parent}; make it first.")
    lock, pid = filelock.FileLock(f"{file}.lock", blocking=False), pid_file(file)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(
            f"Study {name!r} is being run by process {_pid(file)}; wait for it, or stop it with `kill {_pid(file)}`."
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error}); make its folder writable or give --storage.") from error
    try:
        replace_file(pid, f"{os.getpid()}\n".encode())
        yield
    finally:
        pid.unlink(missing_ok=True)
        lock.release()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
