"""Where MLflow is: its URI, the local database, and whether it can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import filelock

from harness.config import Study
from harness.errors import InputError
from harness.mlflow_tracker import MLflowTracker, quiet
from harness.storage import Store


def uri_of(given: str | None, folder: Path) -> str:
    """The tracking URI: the given one, else the database in `folder`."""
    return given or local_uri(folder)


def tracker_for(given: str | None, folder: Path) -> MLflowTracker:
    """A tracker at the given URI, else on the database in `folder`, which is made."""
    return tracker_at(given) if given else local_tracker(folder)


def attached(given: str | None, folder: Path, study: Study, store: Store) -> MLflowTracker | None:
    """A tracker that only looks; None when the database in `folder` does not exist."""
    if given is None and not (folder / "mlflow.db").is_file():
        return None
    tracker = tracker_for(given, folder)
    tracker.attach(study, store)
    return tracker


def local_tracker(folder: Path) -> MLflowTracker:
    """A tracker on `folder`/mlflow.db. Raises InputError when the folder cannot be written."""
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "mlflow.db.lock"):  # two studies may be started at the same time
        if not (folder / "mlflow.db").exists():
            _create_database(folder)
    return MLflowTracker(local_uri(folder), folder / "artifacts")


def tracker_at(uri: str) -> MLflowTracker:
    """A tracker on a server, or on a SQLite database with its files beside it.

    Raises InputError when the database's folder does not exist.
    """
    if not uri.startswith("sqlite:///"):
        return MLflowTracker(uri, None)
    folder = Path(uri.removeprefix("sqlite:///")).parent
    if not folder.is_dir():
        raise InputError(f"--tracking-uri {uri}: there is no folder {folder}; make it first.")
    return MLflowTracker(uri, folder / "artifacts")


def _create_database(folder: Path) -> None:
    """Make mlflow.db whole or not at all: MLflow cannot open one whose migrations were killed half-way."""
    from mlflow import MlflowClient

    quiet()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as place:
        made = Path(place) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        made.replace(folder / "mlflow.db")


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
