"""Details of the MLflow library: its settings, its errors, and its SQLite commits."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.errors import InputError, masked

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

# Before mlflow is imported anywhere: no telemetry, no background jobs.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
# An unreachable server fails within seconds; its entries wait in an outbox, not in MLflow's client. The client must not
# retry a request by itself: if only the answer was lost, it would create a second run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the display has its own lines
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

# All of MLflow's other variables were checked. These are ignored, because the command line sets what they would:
LEADING_ELSEWHERE = {
    "MLFLOW_TRACKING_URI": "the runs go to {uri}; change it with --tracking-uri",
    "MLFLOW_REGISTRY_URI": "the model is registered with the runs, at {uri}",
}
SET_ASIDE = (
    *LEADING_ELSEWHERE,
    *("MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID"),  # would link every metric to another model
    *("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"),  # runs have ids, an experiment is a study
    "MLFLOW_ENABLE_ASYNC_LOGGING",  # entries would count as written too early
    "MLFLOW_ENABLE_WORKSPACES",  # for servers: a local database has no workspaces
    # Options of `mlflow ui`, which shows one database and its files here.
    *("MLFLOW_BACKEND_STORE_URI", "MLFLOW_READ_REPLICA_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI"),
    *("MLFLOW_WORKSPACE_STORE_URI", "MLFLOW_DEFAULT_ARTIFACT_ROOT", "MLFLOW_ARTIFACTS_DESTINATION"),
    *("MLFLOW_SERVE_ARTIFACTS", "MLFLOW_ARTIFACTS_ONLY", "MLFLOW_STATIC_PREFIX", "MLFLOW_HOST", "MLFLOW_PORT"),
)
# Variables for the connection to a server or store are kept (MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN, _AUTH,
# certificates, MLFLOW_WORKSPACE, MLFLOW_HTTP_*, _S3_*, _GCS_*, *_MULTIPART_*, MLFLOW_SQLALCHEMYSTORE_*);
# MLFLOW_TRUNCATE_LONG_VALUES has no effect; those of system metrics are read below. The others are for tracing,
# gateways and flavours not used here.

REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}


class StoreFault(Exception):
    """The artifact store fails, with any error of its client."""


class Deleted(Exception):
    """A user deleted the study's experiment; the text says how to restore it."""


found_set: set[str] = set()  # variables that were set in this process's environment


def set_aside(uri: str) -> None:
    """Remove environment variables that would redirect the runs at `uri`; report those that a user may have meant."""
    for name in SET_ASIDE:
        if value := os.environ.pop(name, None):
            found_set.add(name)
        if value and name in LEADING_ELSEWHERE and value != uri:
            print(f"{name} is set and ignored: {LEADING_ELSEWHERE[name].format(uri=masked(uri))}.", file=sys.stderr)


@contextlib.contextmanager
def variables_back() -> Iterator[None]:
    """Set the variables that `set_aside` removes inside again, for a program's own use of MLflow."""
    before = {name: os.environ[name] for name in SET_ASIDE if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


# Clients of artifact stores: Python module to pip package.
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
    """Turn any exception inside into a StoreFault: each cloud's client has its own exceptions."""
    try:
        yield
    except Exception as error:
        if isinstance(error, faults()[0]) and isinstance(error.__context__, OSError):
            raise  # the tracking server is unreachable; the errors of `requests` are OSErrors
        package = PACKAGES.get((error.name or "").partition(".")[0]) if isinstance(error, ImportError) else None
        text = f"a Python package is missing; pip install {package}" if package else first_line(error)
        raise StoreFault(text) from error


LONGEST_PARAM, LONGEST_TAG = 6000, 8000  # characters, MLflow's limits


def fitted(text: str, longest: int) -> str:
    """Return the text, cut with a mark if it exceeds MLflow's limit."""
    mark = f" ... ({len(text)} characters, cut)"
    return text if len(text) <= longest else text[: longest - len(mark)] + mark


@contextlib.contextmanager
def no_stray_folder(uri: str) -> Iterator[None]:
    """Remove an empty folder that MLflow creates: it creates a SQLite file's folder without decoding the URL.

    For example `x%2520y` beside `x%20y`.
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
    """Close this process's MLflow connections to a database, whose file was replaced."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking

    for store in (Tracking, Registry):
        if uri in store._engine_map:
            store._engine_map[uri].dispose()


def wants_system_metrics() -> bool:
    """Return whether MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING asks for them. Raises InputError for user errors."""
    from mlflow import environment_variables as known

    wanted = known.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    try:
        if not wanted.get():
            return False
    except ValueError as error:
        raise InputError(f"{wanted.name}={wanted.get_raw()} is neither true nor false; unset it.") from error
    if importlib.util.find_spec("psutil") is None:
        raise InputError(f"System metrics need psutil; pip install psutil, or unset {wanted.name}.")
    numbers = (known.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, known.MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING)
    for variable in numbers:
        try:
            fits = (value := variable.get()) is None or value > 0
        except ValueError:
            fits = False
        if not fits:
            raise InputError(f"{variable.name}={variable.get_raw()} is not a number above 0; change or unset it.")
    return True


def system_monitor(run_id: str, uri: str) -> SystemMetricsMonitor:
    """Start a thread that logs the machine's load to a run; it goes on at the step after the run's last one."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def milliseconds() -> int:
    """Return the time in MLflow's unit."""
    return int(time.time() * 1000)


def faults() -> tuple[type[Exception], ...]:
    """Return the exceptions that MLflow's client raises if its server or database fails."""
    from alembic.util import CommandError  # also if another process is creating the database
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # An answer that is not JSON comes, for example, from a proxy that asks for a password.
    known = (MlflowException, SQLAlchemyError, sqlite3.Error, CommandError, OSError, ImportError, json.JSONDecodeError)
    return *known, StoreFault, Deleted


def is_refusal(error: BaseException) -> bool:
    """Return whether MLflow refused permanently, so that a retry is useless."""
    return getattr(error, "error_code", None) in REFUSALS


def first_line(error: BaseException) -> str:
    """Return the short reason: the system's text if a request wraps it, else the first line."""
    if found := re.search(r"\[Errno -?\d+\] ([^\"')]+)", str(error)):
        return found[1]
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # Skip SQLAlchemy's remark.
    return next((line for line in lines if not line.startswith("(raised as a result of")), lines[0])


def let_commits_return() -> None:
    """Let SQLite in WAL mode commit without waiting for the disk (`harness.store.database` says what may be lost).

    MLflow creates its engine itself and has no setting for it.
    """
    import sqlalchemy

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", _synchronous_normal)  # a second time changes nothing


def _synchronous_normal(connection: Any, _record: Any) -> None:
    if not isinstance(connection, sqlite3.Connection):
        return
    # Leave an invalid database for MLflow to report: an error here would be retried for minutes.
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(connection.cursor()) as cursor:
        if cursor.execute("PRAGMA journal_mode").fetchone() == ("wal",):
            cursor.execute("PRAGMA synchronous=NORMAL")


def quiet() -> None:
    """Silence MLflow's log messages, such as one for each table that it creates."""
    import logging

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # it warns when a run has ended
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are reported by us
