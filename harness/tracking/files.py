"""The local MLflow database as a SQLite file: update its artifact paths, and check whether it has a study.

Every start needs both, even of a finished study, for which MLflow itself is not imported.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import filelock

from harness.base.errors import Halt
from harness.base.files import sqlite_url
from harness.tracking.library import faults, first_line, no_stray_folder, quiet, set_aside

ARTIFACTS = "artifacts"  # the artifact folder, beside the database
# Every column with an artifact path, absolute from when it was written.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
BUSY_SECONDS = 20.0  # as long as MLflow waits


def make_database(file: Path, *, ours: bool = False) -> None:
    """Create a database unless it exists, completely and once; two studies may start at the same time."""
    with filelock.FileLock(f"{file}.lock"):
        if not file.exists() or file.stat().st_size == 0:
            for left in file.parent.glob(f"{glob.escape(_new(file))}*"):  # of a killed start
                shutil.rmtree(left, ignore_errors=True)
            _create_database(file)
        if ours:
            # WAL mode makes writes several times as fast, and readers (the UI) do not block them.
            # Setting it fails while another process writes: then the next start does it.
            with contextlib.suppress(sqlite3.OperationalError), closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")


def _new(file: Path) -> str:
    """Return the prefix of folders in which the database is made."""
    return f".{file.name}.new-"


def _create_database(file: Path) -> None:
    """Create the database atomically: MLflow cannot open one whose migrations were killed half-way.

    Raises Halt if it cannot be created.
    """
    import sqlalchemy
    from mlflow import MlflowClient

    quiet()
    set_aside(sqlite_url(file))
    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _unsynchronised)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=_new(file)) as place:
            made = Path(place) / "mlflow.db"
            with no_stray_folder(sqlite_url(made)):
                MlflowClient(tracking_uri=sqlite_url(made)).search_experiments(max_results=1)
            with made.open("rb+") as written:
                os.fsync(written.fileno())
            for suffix in ("-wal", "-shm", "-journal"):  # of a deleted database: SQLite would use them for this one
                Path(f"{file}{suffix}").unlink(missing_ok=True)
            made.replace(file)
    except faults() as error:
        why = first_line(error)
        raise Halt(f"{file} cannot be created ({why}); make room, or give another --tracking-uri.") from error
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", _unsynchronised)


def _unsynchronised(connection: Any, _record: Any) -> None:
    """Do not sync each of some fifty migrations; the complete file is synced once."""
    connection.execute("PRAGMA synchronous=OFF")


def local_folder(uri: str | None) -> Path | None:
    """Return the folder of a file URI or a path; None if it is not local."""
    parts = urlsplit(uri or "")
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(uri) if uri and uri.startswith("/") else None


def elsewhere(file: Path, artifacts: Path) -> dict[str, str]:
    """Return the outdated artifact locations of experiments, with the current ones beside the database.

    A location is outdated if the database was moved or copied since. One that a user chose is kept: it exists without
    an MLflow database, and the experiment has no folder here.
    """
    with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as connection:
        rows = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
    moved = {}
    for name, location in rows:
        old, here = local_folder(location), (artifacts / name).resolve()
        if old is None or old.parts[-2:] != (ARTIFACTS, name) or old.resolve() == here:
            continue
        home = old.parent.parent
        if here.is_dir() or not home.exists() or (home / file.name).exists():
            moved[location] = here.as_uri()
    return moved


def move_in(file: Path, artifacts: Path) -> None:
    """Update the artifact paths of a moved or copied database, and print a line."""
    moved = elsewhere(file, artifacts)
    if not moved:
        return
    with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as connection, connection:
        for old, new in moved.items():
            for table, column in PLACES:
                connection.execute(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                    {"old": old, "new": new},
                )
    was = ", ".join(sorted({str(path.parent) for each in moved if (path := local_folder(each)) is not None}))
    print(f"MLflow's database was moved: its files are now in {artifacts}, no longer in {was}.", file=sys.stderr)


def lacking(file: Path, uid: str, keys: Collection[str], folders: Collection[str], model: str | None) -> str | None:
    """Return what the database lacks of a study, in a sentence; None if all seems complete.

    `keys` are those of its runs, `folders` the artifacts of its own run, `model` is its name if it was registered.
    """
    if not file.is_file() or file.stat().st_size == 0:
        return f"MLflow's database {file} does not exist, or is empty."
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            runs = dict(connection.execute(RUNS, {"uid": uid}))
            sources = connection.execute(VERSIONS, {"uid": uid, "name": model}).fetchall()
    except sqlite3.Error:
        return None  # the start reports an invalid or locked database
    if missing := [key for key in keys if key not in runs]:
        return f"MLflow's database {file} lacks {len(missing)} of the study's {len(keys)} runs."
    if model is not None and not sources:
        return f"MLflow's registry in {file} lacks the study's model."
    own = local_folder(runs["study"])
    places = [own / name for name in folders] if own is not None else []
    places += [place for (source,) in sources[:1] if (place := local_folder(source)) is not None]
    gone = next((place for place in places if not place.is_dir()), None)
    return None if gone is None else f"MLflow's files {gone} do not exist."


RUNS = """
SELECT keys.value, runs.artifact_uri FROM runs
JOIN tags AS keys ON keys.run_uuid = runs.run_uuid AND keys.key = 'harness.key'
JOIN tags AS uids ON uids.run_uuid = runs.run_uuid AND uids.key = 'harness.study_uid' AND uids.value = :uid
WHERE runs.lifecycle_stage = 'active'
"""
VERSIONS = """
SELECT versions.source FROM model_versions AS versions
JOIN model_version_tags AS uids ON uids.name = versions.name AND uids.version = versions.version
AND uids.key = 'harness.study_uid' AND uids.value = :uid
WHERE versions.name = :name AND versions.current_stage != 'Deleted_Internal' ORDER BY versions.version DESC
"""
