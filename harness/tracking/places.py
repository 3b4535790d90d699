"""MLflow's location: its URI, the local database, and write checks."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from harness.base.errors import InputError
from harness.base.files import sqlite_path, sqlite_url
from harness.config.study import Study
from harness.store.database import check_driver, tables
from harness.store.store import Store
from harness.tracking.files import ARTIFACTS, make_database
from harness.tracking.mlflow import MLflowTracker

SCHEMES = ("http", "https", "databricks", "postgresql", "mysql", "mssql")


def uri_of(given: str | None, folder: Path) -> str:
    """Return the tracking URI: `given`, else the database in `folder`."""
    return given or local_uri(folder)


def tracker_for(given: str | None, folder: Path) -> MLflowTracker:
    """Return a tracker at the given URI, else on the database in `folder`, created if missing."""
    if not given:
        return local_tracker(folder)
    tracker = tracker_at(given)
    if tracker.file is not None:
        make_database(tracker.file)
    return tracker


def attached(given: str | None, folder: Path, study: Study, store: Store) -> MLflowTracker | None:
    """Return a read-only tracker; None if the database does not exist, because connecting would create it."""
    uri = uri_of(given, folder)
    file = sqlite_path(uri)
    if file is not None and not file.is_file():
        return None
    tracker = tracker_at(uri)
    tracker.attach(study, store)
    return tracker


def local_tracker(folder: Path) -> MLflowTracker:
    """Return a tracker on `folder`/mlflow.db. Raises InputError if the folder cannot be written, or the file read."""
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "mlflow.db").is_file():
        tables(folder / "mlflow.db", "--tracking-uri, or move the file away")
    make_database(folder / "mlflow.db", ours=True)
    return MLflowTracker(local_uri(folder), folder / ARTIFACTS)


def tracker_at(uri: str) -> MLflowTracker:
    """Return a tracker on a server, or on a SQLite database with its artifacts beside it.

    Raises InputError if the database's folder does not exist, the database is another program's, or its Python driver
    is missing.
    """
    file, scheme = sqlite_path(uri), uri.partition(":")[0].partition("+")[0]
    if file is None:
        try:
            urlsplit(uri)
        except ValueError as error:
            raise InputError(f"--tracking-uri {uri} is not a URI ({error}); write http://HOST:PORT.") from error
        if scheme not in SCHEMES:
            raise InputError(
                f"--tracking-uri {uri} is not an MLflow server or database; write http://HOST:PORT or sqlite:///FILE."
            )
        if scheme in ("postgresql", "mysql", "mssql"):
            check_driver(uri, "--tracking-uri")
        return MLflowTracker(uri, None)
    if not file.parent.is_dir():
        raise InputError(f"--tracking-uri {uri}: there is no folder {file.parent}; create it first.")
    if file.exists() and (found := tables(file, "--tracking-uri")) and "experiments" not in found:
        raise InputError(f"--tracking-uri {uri} is a database but not MLflow's; give another.")
    return MLflowTracker(uri, file.parent / ARTIFACTS)


def local_uri(folder: Path) -> str:
    return sqlite_url((folder / "mlflow.db").resolve())


def check_writable(folder: Path) -> None:
    """Raise InputError unless the folder can be created and written; leave nothing behind."""
    place = folder
    while not place.exists() and not place.is_symlink():
        place = place.parent
    probe = place / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); make it writable or give --tracking-uri.") from error
