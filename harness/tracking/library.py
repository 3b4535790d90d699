"""What must be known about the library MLflow: its settings, what it raises, and how its SQLite commits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.base.errors import masked

# Before mlflow is imported anywhere: no telemetry, no background jobs.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
# A server that is away or hangs is named after seconds; entries for it wait in an outbox, not in its client. The client
# must not repeat a request by itself: when only the answer was lost, a second run would be made.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the display has its own lines
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

# MLflow's other variables were looked at one by one. Set aside are these, for what they say is said by the command:
LEADING_ELSEWHERE = {
    "MLFLOW_TRACKING_URI": "the runs go to {uri}; --tracking-uri gives another place",
    "MLFLOW_REGISTRY_URI": "the model is registered where the runs are, at {uri}",
}
SET_ASIDE = (
    *LEADING_ELSEWHERE,
    *("MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID"),  # every metric would be a stranger's model's
    *("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"),  # runs have ids, an experiment is a study
    "MLFLOW_ENABLE_ASYNC_LOGGING",  # what was told would count as written before it is
    "MLFLOW_ENABLE_WORKSPACES",  # a server's: it would look into one workspace of a database that has none
    # Options of `mlflow ui`, which shows one database and its files here.
    *("MLFLOW_BACKEND_STORE_URI", "MLFLOW_READ_REPLICA_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI"),
    *("MLFLOW_WORKSPACE_STORE_URI", "MLFLOW_DEFAULT_ARTIFACT_ROOT", "MLFLOW_ARTIFACTS_DESTINATION"),
    *("MLFLOW_SERVE_ARTIFACTS", "MLFLOW_ARTIFACTS_ONLY", "MLFLOW_STATIC_PREFIX", "MLFLOW_HOST", "MLFLOW_PORT"),
)
# Kept are those that say how a server or a store is spoken to (MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN, _AUTH,
# certificates, MLFLOW_WORKSPACE, MLFLOW_HTTP_*, _S3_*, _GCS_*, *_MULTIPART_*, MLFLOW_SQLALCHEMYSTORE_*);
# MLFLOW_TRUNCATE_LONG_VALUES has nothing left to cut; the others are of tracing, gateways and flavours not used here.

REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}


class StoreFault(Exception):
    """The artifact store does not take or give a file, whatever its own client raised."""


class Deleted(Exception):
    """Somebody deleted the study's experiment; the text says how to get it back."""


found_set: set[str] = set()  # those that this process found in its environment


def set_aside(uri: str) -> None:
    """Take from the environment what would lead the runs at `uri` elsewhere; what a user may have meant is named."""
    for name in SET_ASIDE:
        if value := os.environ.pop(name, None):
            found_set.add(name)
        if value and name in LEADING_ELSEWHERE and value != uri:
            print(f"{name} is set and not used: {LEADING_ELSEWHERE[name].format(uri=masked(uri))}.", file=sys.stderr)


# What the clients of artifact stores are called in Python, and by pip.
PACKAGES = {
    "boto3": "boto3",
    "botocore": "boto3",
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob azure-identity",
    "pysftp": "pysftp",
    "pyarrow": "pyarrow",
    "databricks": "databricks-sdk",
}


@contextlib.contextmanager
def artifact_store() -> Iterator[None]:
    """Turn whatever is raised inside into a StoreFault: each cloud's client has exceptions of its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, faults()[0]) and isinstance(error.__context__, OSError):
            raise  # the server, which is asked where its store is, is away; what `requests` raises is an OSError
        package = PACKAGES.get((error.name or "").partition(".")[0]) if isinstance(error, ImportError) else None
        text = f"a Python package is missing here; pip install {package}" if package else first_line(error)
        raise StoreFault(text) from error


LONGEST_PARAM, LONGEST_TAG = 6000, 8000  # characters, by MLflow's rules


def fitted(text: str, longest: int) -> str:
    """The text, cut with a mark if it is longer than MLflow takes."""
    mark = f" ... ({len(text)} characters, cut)"
    return text if len(text) <= longest else text[: longest - len(mark)] + mark


@contextlib.contextmanager
def no_stray_folder(uri: str) -> Iterator[None]:
    """Take back what MLflow makes inside: it makes the folder of a SQLite file without decoding its URL.

    `x%2520y` beside `x%20y`, if it was not there.
    """
    made = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") and "%" in uri else None
    stray = [] if made is None else [each for each in (made, *made.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in stray:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()


def drop_connections(uri: str) -> None:
    """Close this process's connections to a database, which MLflow keeps: its file is another one now."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking

    for store in (Tracking, Registry):
        if uri in store._engine_map:
            store._engine_map[uri].dispose()


def milliseconds() -> int:
    """The time, as MLflow counts it."""
    return int(time.time() * 1000)


def faults() -> tuple[type[Exception], ...]:
    """What MLflow's client raises when its server or database does not do as it is told."""
    from alembic.util import CommandError  # a database that somebody else was just making, too
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # An answer that is no JSON comes from a proxy, say, that wants a password first.
    known = (MlflowException, SQLAlchemyError, sqlite3.Error, CommandError, OSError, ImportError, json.JSONDecodeError)
    return *known, StoreFault, Deleted


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow answered, and the answer will be the same the next time."""
    return getattr(error, "error_code", None) in REFUSALS


def first_line(error: BaseException) -> str:
    """The reason in short: the system's own words where a request wraps them, else the first line."""
    if found := re.search(r"\[Errno -?\d+\] ([^\"')]+)", str(error)):
        return found[1]
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # But for SQLAlchemy's aside.
    return next((line for line in lines if not line.startswith("(raised as a result of")), lines[0])


def let_commits_return() -> None:
    """Have SQLite in WAL mode not wait for the disk at every commit (`harness.store.database` says what that may lose).

    MLflow makes its engine itself and has no setting for it.
    """
    import sqlalchemy

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", _synchronous_normal)  # a second time changes nothing


def _synchronous_normal(connection: Any, _record: Any) -> None:
    if not isinstance(connection, sqlite3.Connection):
        return
    # A file that is no database is MLflow's to name: raised here, it would be tried again for minutes.
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(connection.cursor()) as cursor:
        if cursor.execute("PRAGMA journal_mode").fetchone() == ("wal",):
            cursor.execute("PRAGMA synchronous=NORMAL")


def quiet() -> None:
    """MLflow announces each table that it creates; a study has better things to say."""
    import logging

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it raises is told in our words
