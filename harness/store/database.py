"""Databases: check their URLs, open them, retry, and lock them during setup.

SQLite runs in WAL mode with synchronous=NORMAL: a killed process loses nothing, and readers (a dashboard, `show`) do
not block the writer. A power cut may lose the last few commits, but never breaks the file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import filelock
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from harness.base.errors import Halt, InputError, first_line, masked
from harness.base.files import sqlite_file

T = TypeVar("T")

# Ctrl-C during a read closes the connection, then its cursor: the pool logs a harmless traceback.
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)

BUSY_TIMEOUT_SECONDS = 60
# Of connections to a server; one that vanishes closes none, which by default is noticed after two hours.
CONNECTION = {"connect_timeout": 10, "application_name": "harness", "keepalives_idle": 30, "tcp_user_timeout": 60_000}
AWAY_SECONDS, RETRY_SECONDS = 300.0, 2.0  # how long a server may be unreachable; time between two attempts
IDLE_SECONDS = 30  # after which a server releases the locks of a stalled process
# The modules that SQLAlchemy imports, and the packages that provide them.
DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'", "MySQLdb": "mysqlclient"}
POSTGRESQL_DRIVERS = ("psycopg", "psycopg2")  # both take the libpq settings used here
# Error texts of PostgreSQL and its client, with remedies; a failed connection gives nothing but the text.
REMEDIES = {
    "password authentication failed": "check the user and the password",
    "no password supplied": "give the password in the URL, in PGPASSWORD or in ~/.pgpass",
    "resolve host": "check the host's name",
    "Connection refused": "check host and port, and that the server is running",
    "No such file or directory": "check the socket's folder, and that the server is running",
    "timeout expired": "check host and port, and that the server is reachable from here",
    "too many clients": "raise its max_connections, or start fewer workers",
    "permission denied": "let this user create tables in it",
}
_hurry: ContextVar[bool] = ContextVar("hurry", default=False)  # see `without_waiting`
SETTING_UP = 7_283_911  # the key of PostgreSQL's advisory lock
CONFLICTS = ("40001", "40P01")  # PostgreSQL's serialization failure and deadlock: a retry helps
OPTUNA_TABLES = {"studies", "study_directions", "trials", "version_info"}
LAST_TABLE = "alembic_version"  # Optuna creates it last


class Unreadable(str):
    """The text of an attribute that is not valid JSON, such as after an edit."""


class _Storage(optuna.storages.RDBStorage):
    """Optuna's storage, but an attribute that is not valid JSON does not block reading the others."""

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        texts = sqlalchemy.text("SELECT key, value_json FROM study_user_attributes WHERE study_id = :study")
        with self.engine.connect() as connection:
            return {name: _read(text) for name, text in connection.execute(texts, {"study": study_id})}


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return Unreadable(text)


def check_database(url: str) -> bool:
    """Return whether all of a study's tables exist; connecting through Optuna would create them.

    Raises InputError unless the URL can be opened and holds either nothing or Optuna's tables. Writes nothing.
    """
    file = sqlite_file(url)
    if file is not None:
        if file.exists() and not file.is_file():
            raise InputError(f"--storage {url!r}: {file} is not a file; give another.")
        if not file.exists() or file.stat().st_size == 0:
            if not file.parent.is_dir():
                raise InputError(f"--storage {url!r}: there is no folder {file.parent}; create it first.")
            return False
        found = tables(file, "--storage")
    else:
        _check_server(url)
        found = _tables_on_server(url)
    # One of Optuna's tables is enough: a process may die while it creates them, and opening creates the rest.
    if found and not OPTUNA_TABLES.intersection(found):
        raise InputError(f"{url} is a database but not a study; give another --storage.")
    return LAST_TABLE in found


def _check_server(url: str) -> None:
    """Raise InputError unless the URL names a PostgreSQL database and its driver is installed."""
    parsed = sqlalchemy.engine.make_url(url)
    if parsed.get_backend_name() != "postgresql":
        raise InputError(f"--storage {url!r}: a study needs SQLite or PostgreSQL: sqlite:///FILE or postgresql://...")
    if url.partition("://")[2].partition("?")[0].count("@") > 1:  # a part of the password would be printed as the host
        raise InputError(f"--storage {url!r} has more than one @; write %40 for an @ in the password.")
    check_driver(url, "--storage")
    if (driver := parsed.get_dialect().driver) not in POSTGRESQL_DRIVERS:
        raise InputError(f"--storage {url!r} names the driver {driver}; write postgresql+psycopg://...")
    if not parsed.database and not {"dbname", "service"} & parsed.query.keys():
        # PostgreSQL would use the database named after the user, which may be shared.
        raise InputError(f"--storage {url!r} names no database; write postgresql+psycopg://USER@HOST/DATABASE.")


def _tables_on_server(url: str) -> list[str]:
    """Return the table names of a server's database. Raises InputError if it cannot be opened."""
    try:
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=_connect_args(url))
        return sqlalchemy.inspect(engine).get_table_names()
    except (SQLAlchemyError, ImportError) as error:
        raise _unopened(url, error) from error


def outlast(url: str, operation: Callable[[], T]) -> T:
    """Return what `operation` returns; retry while another program locks the database or its server does not answer.

    `operation` may be interrupted anywhere and called again. Raises Halt if the database fails.
    """
    try:
        return _waiting(url, operation, 0.0 if _hurry.get() else AWAY_SECONDS)
    except (StorageInternalError, SQLAlchemyError) as error:
        raise _failed(url, _cause(error)) from error


@contextmanager
def without_waiting() -> Iterator[None]:
    """Inside, ask a server that does not answer once."""
    token = _hurry.set(True)
    try:
        yield
    finally:
        _hurry.reset(token)


def _waiting(url: str, operation: Callable[[], T], away_seconds: float = 0.0) -> T:
    """Return what `operation` returns; retry while the error is transient."""
    end, said = time.monotonic() + away_seconds, False
    while True:
        try:
            return operation()
        except (StorageInternalError, SQLAlchemyError, sqlite3.Error, filelock.Timeout, InputError) as error:
            why = _passing(url, error)
            if why is None or (why == AWAY and time.monotonic() >= end):
                raise
            if not said:
                print(f"The database {masked(url)} {why}; waiting for it.", file=sys.stderr)
                said = True
            if why != LOCKED:  # SQLite itself waits for a lock
                time.sleep(RETRY_SECONDS)


LOCKED, AWAY = "is locked by another program", "does not answer"
# Error texts on connecting to a restarting server.
RESTARTS = ("Connection refused", "timeout expired", "No such file", "too many clients", "starting up", "shutting down")


def _passing(url: str, error: BaseException) -> str | None:
    """Return the reason if an error is transient: a lock, an unreachable server, a conflict; else None."""
    if isinstance(error, filelock.Timeout):  # of `Leases.exclusive`, whose holder waits for the database
        return LOCKED
    cause, inner = _cause(error), _inner(error)
    if isinstance(inner, InputError):
        return None
    if sqlite_file(url) is not None:
        return LOCKED if "locked" in cause else None
    if _no_room(cause):
        return None
    if isinstance(error, InputError):  # it could not be opened, perhaps permanently
        return AWAY if any(words in cause for words in RESTARTS) else None
    if getattr(getattr(inner, "orig", None), "sqlstate", None) in CONFLICTS:
        return "has conflicting writers"
    return AWAY if isinstance(inner, OperationalError | InterfaceError) else None


def _inner(error: BaseException) -> BaseException:
    """Return SQLAlchemy's error, which Optuna wraps, as `_unopened` does."""
    wraps = isinstance(error, StorageInternalError | InputError) and isinstance(error.__cause__, SQLAlchemyError)
    return error.__cause__ if wraps and error.__cause__ is not None else error


def _cause(error: BaseException) -> str:
    """Return the database's own message."""
    return first_line(getattr(_inner(error), "orig", None) or _inner(error))


def _failed(url: str, cause: str) -> Halt:
    remedy = "make room" if _no_room(cause) else "fix that"
    return Halt(f"The database {url} failed ({cause}); {remedy}. Finished trials are kept.")


def _no_room(cause: str) -> bool:
    """Return whether SQLite (the second text for shared memory or file sizes) or PostgreSQL reports a full disk."""
    return any(words in cause for words in ("disk is full", "disk I/O error", "No space left"))


def _unopened(url: str, error: BaseException) -> Exception:
    """Return the error for a database that cannot be opened: Halt for a full disk, else InputError."""
    cause = _cause(error)
    if _no_room(cause):
        return _failed(url, cause)
    missing = re.search('FATAL: +database "(.*)" does not exist', cause)
    remedy = f"create it with `{_createdb(url, missing[1])}`" if missing else "check the URL"
    remedy = next((each for words, each in REMEDIES.items() if words in cause), remedy)
    return InputError(f"--storage {url!r} cannot be opened: {cause.rstrip('.')}; {remedy}.")


def _createdb(url: str, name: str) -> str:
    """Return the command that creates a database on a URL's server; libpq's defaults fill what the URL omits."""
    parsed = sqlalchemy.engine.make_url(url)
    named = {"-h": parsed.host, "-p": parsed.port, "-U": parsed.username}
    asked = {"-h": "host", "-p": "port", "-U": "user"}  # their names in a URL's query
    found = {option: parsed.query.get(asked[option]) or value for option, value in named.items()}
    words = [word for option, value in found.items() if isinstance(value, str | int) for word in (option, str(value))]
    return shlex.join(["createdb", *words, name])


def check_driver(url: str, option: str) -> None:
    """Raise InputError if the Python driver of a database server is missing; `option` gave the URL."""
    try:
        sqlalchemy.create_engine(url).dispose()
    except ModuleNotFoundError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise InputError(
            f"{option} {url!r} needs the database driver {error.name}; install it with `pip install {package}`."
        ) from error
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise InputError(f"{option} {url!r} cannot be opened: {first_line(error)}; check the URL.") from error


def tables(file: Path, option: str) -> list[str]:
    """Return the table names of a SQLite file. Raises InputError if it is not one; `option` named it.

    LAST_TABLE is left out while it is empty: whoever opened the storage then would fill it, and its creator fail.
    """

    def names() -> list[str]:
        with closing(sqlite3.connect(_to_read(file), uri=True, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
            found = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            if LAST_TABLE in found and connection.execute(f"SELECT 1 FROM {LAST_TABLE}").fetchone() is None:
                found.remove(LAST_TABLE)
            return found

    try:
        return _waiting(f"sqlite:///{file}", names)
    except sqlite3.Error as error:
        if file.is_file() and _no_room(str(error)):
            raise _failed(f"sqlite:///{file}", str(error)) from error
        # SQLite cannot read the log of a killed study in a read-only folder.
        remedy = f"give another {option}" if may_write(file) else "copy its folder to a writable place"
        raise InputError(f"{file} cannot be opened as a database ({error}); {remedy}.") from error


def _to_read(file: Path) -> str:
    """Return SQLite's URI for reading a file.

    In WAL mode even a reader creates files beside the database, unless the URI says immutable. That is safe while
    there is no log beside the database: every writer has one.
    """
    place = f"{file.resolve().as_uri()}?mode=ro"
    return place if Path(f"{file.resolve()}-wal").exists() else f"{place}&immutable=1"


def may_write(file: Path) -> bool:
    """Return whether this process may write a file and its folder."""
    file = file.resolve()  # SQLite's own files are beside a link's target
    return os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)


def check_writable(file: Path | None) -> None:
    """Raise InputError unless a study can run in this file."""
    if file is not None and not (may_write(file) if file.exists() else os.access(file.parent, os.W_OK)):
        raise InputError(f"{file} or its folder is not writable; change their permissions, or give --storage.")


def connect(url: str, *, writing: bool = True) -> optuna.storages.RDBStorage:
    """Return Optuna's storage at a URL. Without `writing`, a SQLite file keeps its journal mode.

    Raises InputError if the URL cannot be opened, Halt if the disk is full.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file, place = sqlite_file(url), url
    if file is not None and file.exists() and not may_write(file):  # SQLAlchemy decodes the URI, then SQLite does
        place = f"sqlite:///{_to_read(file).replace('%', '%25')}&uri=true"
    try:
        storage = _waiting(url, lambda: _Storage(place, engine_kwargs=_engine_options(url)))
    except (SQLAlchemyError, ImportError, RuntimeError) as error:
        raise _unopened(url, error) from error
    if file is not None and writing:
        sqlalchemy.event.listen(storage.engine, "connect", _set_pragmas)
        storage.engine.dispose()  # close connections made before the listener
    return storage


def _engine_options(url: str) -> dict[str, Any]:
    if sqlite_file(url) is not None:
        return {"connect_args": {"timeout": BUSY_TIMEOUT_SECONDS}}
    # A worker keeps one connection; a lock and the thread that renews leases briefly use another.
    return {"connect_args": _connect_args(url), "pool_pre_ping": True, "pool_size": 1, "max_overflow": 3}


def _connect_args(url: str) -> dict[str, Any]:
    """Return connection settings for a server; those in the URL take precedence."""
    given = sqlalchemy.engine.make_url(url).query
    options = f"{given.get('options', '')} -c idle_in_transaction_session_timeout={IDLE_SECONDS}s"
    return {name: value for name, value in CONNECTION.items() if name not in given} | {"options": options.strip()}


@contextmanager
def setup_lock(url: str) -> Iterator[None]:
    """Lock a database server for all studies while tables and studies are created.

    On SQLite the study's own lock does that. Raises InputError if the server cannot be reached.
    """
    if sqlite_file(url) is not None:
        yield
        return
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=_connect_args(url))
    try:
        connection = engine.connect()
        connection.execute(sqlalchemy.text("SET LOCAL idle_in_transaction_session_timeout = '10min'"))
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({SETTING_UP})"))
    except SQLAlchemyError as error:
        raise _unopened(url, error) from error
    with connection:  # closing it ends the transaction, and with it the lock
        yield


def _set_pragmas(connection: Any, _record: Any) -> None:
    connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL")


def dispose(storage: optuna.storages.RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()
