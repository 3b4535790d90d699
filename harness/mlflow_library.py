"""What must be known about the library MLflow: its settings, what it raises, and how its SQLite commits."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from typing import Any

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

REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}


def milliseconds() -> int:
    """The time, as MLflow counts it."""
    return int(time.time() * 1000)


def faults() -> tuple[type[Exception], ...]:
    """What MLflow's client raises when its server or database does not do as it is told."""
    from alembic.util import CommandError  # a database that somebody else was just making, too
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, OSError


def is_refusal(error: Exception) -> bool:
    """Whether MLflow answered, and the answer will be the same the next time."""
    return getattr(error, "error_code", None) in REFUSALS


def first_line(error: BaseException) -> str:
    """The reason in short: the system's own words where a request wraps them, else the first line."""
    if found := re.search(r"\[Errno -?\d+\] ([^\"')]+)", str(error)):
        return found[1]
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return next(
        (line for line in lines if not line.startswith("(raised as a result of")), lines[0]
    )  # SQLAlchemy's aside


def let_commits_return() -> None:
    """Have SQLite in WAL mode not wait for the disk at every commit (`harness.database` says what that may lose).

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
