"""Where MLflow is: its URI, the local database, and whether it can be written."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from harness.config import Study
from harness.database import check_driver, tables
from harness.errors import Halt, InputError
from harness.mlflow_library import faults, first_line, quiet
from harness.mlflow_tracker import MLflowTracker
from harness.storage import Store

SCHEMES = ("http", "https", "databricks", "postgresql", "mysql", "mssql")


def uri_of(given: str | None, folder: Path) -> str:
    """The tracking URI: the given one, else the database in `folder`."""
    return given or local_uri(folder)


def tracker_for(given: str | None, folder: Path) -> MLflowTracker:
    """A tracker at the given URI, else on the database in `folder`, which is made."""
    if not given:
        return local_tracker(folder)
    tracker = tracker_at(given)
    if given.startswith("sqlite:///"):
        with _made(Path(given.removeprefix("sqlite:///"))):
            pass
    return tracker


def attached(given: str | None, folder: Path, study: Study, store: Store) -> MLflowTracker | None:
    """A tracker that only looks; None when the database does not exist, for looking would make it."""
    uri = uri_of(given, folder)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return None
    tracker = tracker_at(given) if given else MLflowTracker(local_uri(folder), folder / "artifacts")
    tracker.attach(study, store)
    return tracker


def local_tracker(folder: Path) -> MLflowTracker:
    """A tracker on `folder`/mlflow.db. Raises InputError when the folder cannot be written."""
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _made(folder / "mlflow.db"):
        _write_ahead(folder / "mlflow.db")
    return MLflowTracker(local_uri(folder), folder / "artifacts")


def tracker_at(uri: str) -> MLflowTracker:
    """A tracker on a server, or on a SQLite database with its files beside it.

    Raises InputError when the database's folder does not exist, the database is another program's, or the Python
    package is missing that speaks to it.
    """
    if not uri.startswith("sqlite:///"):
        if uri.partition(":")[0].partition("+")[0] not in SCHEMES:
            raise InputError(
                f"--tracking-uri {uri} is no MLflow server or database; write http://HOST:PORT or sqlite:///FILE."
            )
        if uri.partition(":")[0].partition("+")[0] in ("postgresql", "mysql", "mssql"):
            check_driver(uri, "--tracking-uri")
        return MLflowTracker(uri, None)
    file = Path(uri.removeprefix("sqlite:///"))
    if not file.parent.is_dir():
        raise InputError(f"--tracking-uri {uri}: there is no folder {file.parent}; make it first.")
    if file.exists() and (found := tables(file, "--tracking-uri")) and "experiments" not in found:
        raise InputError(f"--tracking-uri {uri} is a database but not MLflow's; give another.")
    return MLflowTracker(uri, file.parent / "artifacts")


@contextmanager
def _made(file: Path) -> Iterator[None]:
    """A database that is there, held; two studies may be started at the same time."""
    with filelock.FileLock(f"{file}.lock"):
        if not file.exists():
            _create_database(file)
        yield


def _create_database(file: Path) -> None:
    """Make it whole or not at all: MLflow cannot open one whose migrations were killed half-way.

    Raises Halt when it cannot be made.
    """
    import sqlalchemy
    from mlflow import MlflowClient

    quiet()
    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _unsynchronised)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".new-") as place:
            made = Path(place) / "mlflow.db"
            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
            with made.open("rb+") as written:
                os.fsync(written.fileno())
            made.replace(file)
    except faults() as error:
        raise Halt(
            f"{file} cannot be made ({first_line(error)}); make room, or give another --tracking-uri."
        ) from error
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", _unsynchronised)


def _unsynchronised(connection: Any, _record: Any) -> None:
    """Of each of some fifty migrations the disk need not know; the file is synchronised once, when it is whole."""
    connection.execute("PRAGMA synchronous=OFF")


def _write_ahead(file: Path) -> None:
    """Put our own database into WAL mode, in which it stays: writing it is several times as fast, and readers
    (the UI) do not hold it up.
    """
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # fails while somebody else writes: then it is done next time


def local_uri(folder: Path) -> str:
    return f"sqlite:///{(folder / 'mlflow.db').resolve()}"


def check_writable(folder: Path) -> None:
    """Raise InputError unless the folder can be made and written; leaves nothing behind."""
    place = folder
    while not place.exists() and not place.is_symlink():
        place = place.parent
    probe = place / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); make it writable or give --tracking-uri.") from error
