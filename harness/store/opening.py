"""Open a study's storage: to run it, locked and checked against its definition, or read-only."""

from __future__ import annotations

import functools
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from harness.base.errors import InputError
from harness.base.files import sqlite_file, sqlite_url
from harness.config.find import Found, defines, run_command
from harness.config.study import Study
from harness.store.database import BUSY_TIMEOUT_SECONDS, check_database, connect, dispose, outlast, setup_lock
from harness.store.leases import Leases, make_table
from harness.store.locks import OpenedFile, free_name, study_lock
from harness.store.store import Store

FORMAT = 1  # of the attributes that a study adds to Optuna's; raise it with an incompatible change


@contextmanager
def open_store(
    study: Study, url: str, content: Mapping[str, str] | None = None, *, joining: bool = False
) -> Iterator[Store]:
    """Open a study to run it, and lock it: a second process on the same SQLite study is refused.

    A process that is `joining` works for the lock's holder. `content` are fingerprints of the images and the pretrained
    weights, which the definition only names; None skips their comparison. Raises InputError if the database cannot be
    opened or is another program's, if another process holds the study, or if the stored definition differs from
    `study` (naming the fields).
    """
    file = sqlite_file(url)
    begin = functools.partial(_begun, study, url, content)
    with study_lock(None if joining else file, study.name), ExitStack() as kept:
        storage, optuna_study = outlast(url, begin) if joining else begin()  # a worker's server was up a moment ago
        kept.callback(dispose, storage)
        leases = Leases(storage.engine, Store(url, optuna_study).uid, file)
        kept.callback(leases.close)
        opened = None
        if file is not None and not joining:  # earlier owners are dead, or work for a dead coordinator
            outlast(url, leases.clear)
            opened = kept.enter_context(closing(OpenedFile(file)))
        yield Store(url, optuna_study, engine=storage.engine, leases=leases, file=opened)


def _begun(
    study: Study, url: str, content: Mapping[str, str] | None
) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
    """Return the storage and its study, created if missing, with its definition stored or compared."""
    check_database(url)
    with setup_lock(url):
        storage = connect(url)
        create = functools.partial(
            optuna.create_study,
            storage=storage,
            study_name=study.name,
            direction="maximize",
            pruner=study.pruner.of(study),
            load_if_exists=True,
        )
        try:
            optuna_study = outlast(url, create)
            check_definition(study, Store(url, optuna_study), content)
            outlast(url, lambda: make_table(storage.engine))
        except BaseException:
            dispose(storage)
            raise
        return storage, optuna_study


class NotBegun(InputError):
    """The database does not exist, or has no study of this name."""


@contextmanager
def read_earlier(name: str, url: str, folder: Path) -> Iterator[Store]:
    """Open the study that `after` names: at `url`, else the only one in NAME.db beside it or in `folder`.

    Raises InputError if there is none.
    """
    beside = (sqlite_file(url) or folder / "any").with_name(f"{name}.db")
    file = beside if beside.is_file() else folder / f"{name}.db"
    place = url if name in names_in(url) or not file.is_file() else sqlite_url(file)
    try:
        if (known := names_in(place)) and name not in known and len(known) == 1:  # --fresh has renamed the file
            (name,) = known
        with read_store(name, place) as store:
            yield store
    except NotBegun as error:
        raise InputError(f"after: there is no study {name!r} in {file} nor in {url}; run it first.") from error


def earlier_uid(name: str, url: str, folder: Path) -> str | None:
    """Return the uid of the study that `read_earlier` opens; None if there is none."""
    try:
        with read_earlier(name, url, folder) as store:
            return store.uid
    except InputError:
        return None


@contextmanager
def read_store(name: str, url: str, any_format: bool = False) -> Iterator[Store]:
    """Open a study read-only; it may be running. Raises NotBegun, and InputError if it has another format.

    With `any_format`, only the name, the uid and the active workers are reliable.
    """
    file = sqlite_file(url)
    if file is not None and not file.is_file():
        raise NotBegun(f"Study {name!r} has no results yet ({file} does not exist); {_begin(name)}.")
    if file is not None and file.stat().st_size == 0:
        raise NotBegun(
            f"Study {name!r} has no results ({file} is empty); restore the file from a backup if it had any, else "
            f"{_begin(name)}."
        )
    unknown = NotBegun(f"{url} holds no study named {name!r}; run it first, or check --storage and the name.")
    if not check_database(url):
        raise unknown
    storage = connect(url, writing=False)
    try:
        try:
            optuna_study = outlast(url, lambda: optuna.load_study(storage=storage, study_name=name))
        except KeyError as error:
            raise unknown from error
        store = Store(url, optuna_study, as_of_now=True, engine=storage.engine)
        if not any_format:
            check_format(name, store)
        yield store
    finally:
        dispose(storage)


def names_in(url: str) -> list[str]:
    """Return the names of all studies in a database, the oldest first. Raises InputError if it cannot be opened."""
    if not check_database(url):
        return []
    storage = connect(url, writing=False)

    def read() -> list[str]:
        with storage.engine.connect() as connection:
            return list(connection.scalars(sqlalchemy.text("SELECT study_name FROM studies ORDER BY study_id")))

    try:
        return outlast(url, read)
    finally:
        dispose(storage)


def exists(name: str, url: str) -> bool:
    """Return whether the storage has this study with a definition or trials; an interrupted start leaves neither.

    Raises InputError if the storage cannot be opened.
    """
    try:
        with read_store(name, url, any_format=True) as store:
            return "definition" in store.attributes() or bool(store.trials())
    except NotBegun:
        return False


def url_of(found: Found, storage: str | None) -> str:
    """Return the URL of a study's database: `storage` if given, else the file beside the study file.

    Raises InputError if the database's study was run from another existing study file that defines the same name: one
    of the two is a copy.
    """
    name, url = found.study.name, storage or found.storage_url
    twin = found.file
    with suppress(InputError), read_store(name, url, any_format=True) as store:  # a missing study is reported later
        # A study that no command has run has no such attribute.
        twin = found.file.with_name(store.attributes().get("file") or f"{name}.py")
    is_other = twin.is_file() and not (found.file.is_file() and twin.samefile(found.file))
    if is_other and found.file.is_file() and defines(twin, name):
        raise InputError(
            f"{found.file} defines the study {name!r}, and so does {twin}, whose results are in {url}: "
            f"change `name` in {found.file.name}."
        )
    return url


def as_begun(study: Study, store: Store, content: Mapping[str, str] | None = None) -> Study:
    """Return the study with the stored settings, including those from its first command line.

    `content` are fingerprints as in `open_store`. Raises InputError if the study file has changed in a way that no
    setting can.
    """
    stored = store.facts().definition
    if stored is None:
        raise InputError(f"Study {study.name!r} has not started; {_begin(study.name)}.")
    study = study.with_definition(stored)
    check_definition(study, store, content)
    return study


def located(found: Found, store: Store, data_root: str | None = None, device: str | None = None) -> Study:
    """Return the study with the stored settings and absolute folders; images are where its last start found them.

    Raises InputError as `as_begun` does.
    """
    last = store.facts().data_root
    if data_root is None and last is not None and Path(last).is_dir():
        data_root = last
    return as_begun(found.study.located(found.home, data_root, device), store)


def check_format(name: str, store: Store) -> None:
    """Raise InputError if a study has started and has another format."""
    known = store.attributes()
    if "definition" in known and known.get("format") != FORMAT:
        raise InputError(
            f"Study {name!r} in {store.url} was written by another version of the harness (format "
            f"{known.get('format') or 0}, this version reads {FORMAT}); open it with that version, or "
            f"{anew(store.url)}."
        )


def compare(study: Study, url: str, content: Mapping[str, str] | None) -> None:
    """Raise InputError unless `study` continues the stored study, which must exist. Takes no lock, writes nothing."""
    with read_store(study.name, url) as store:
        if store.facts().definition is not None or store.trials():
            check_definition(study, store, content)


def check_definition(study: Study, store: Store, content: Mapping[str, str] | None) -> None:
    """Store the definition at the first start; later, raise InputError for a study with another definition."""
    now = study.definition() | {f"content of {name}": value for name, value in (content or {}).items()}
    stored = store.facts().definition
    if stored is None:
        if store.trials():
            raise InputError(
                f"Study {study.name!r} in {store.url} was started by another program; "
                "give another --storage, or rename the study."
            )
        store.set_attribute("format", FORMAT)
        store.set_attribute("uid", uuid.uuid4().hex)
        if "data" in (content or {}):
            store.set_attribute("images", _count(study))
        store.set_attribute("definition", now)
        return
    check_format(study.name, store)
    unknown = {path for path in stored if path.startswith("content of ") and path not in now}
    unknown |= {path for path in now if path not in stored and study.has_default(path)}  # a new field
    differing = [path for path in {**stored, **now} if stored.get(path) != now.get(path) and path not in unknown]
    if not differing and study.sampler.name == "grid" and (order := _order(stored)) != _order(now):
        raise InputError(
            f"Study {study.name!r} was started with its space in another order ({', '.join(order)}), in which its grid "
            f"tries the points. Change it back, or {anew(store.url)}."
        )
    if differing:
        changes = "; ".join(_change(path, stored, now, study, store) for path in differing)
        command = store.facts().command  # of the last start, which had the same definition
        raise InputError(
            f"Study {study.name!r} was started with another definition ({changes}); the results would not be "
            f"comparable. Change it back, or {anew(store.url)}." + (f" It was run with: {command}" if command else "")
        )


def _order(definition: Mapping[str, Any]) -> list[str]:
    """Return the searched fields of a definition in their order."""
    return [path.removeprefix("space.") for path in definition if path.startswith("space.")]


def _change(path: str, stored: Mapping[str, Any], now: Mapping[str, Any], study: Study, store: Store) -> str:
    """Return how a field differs from the study's start, as a clause."""
    if path == "content of data":
        root, then = getattr(study.train.data, "root", None), store.facts().images
        counted = "" if then is None else f" ({then} then, {_count(study)} now)"
        return f"the images{f' in {root}' if root else ''} differ from those at the start{counted}"
    if path == "content of weights":
        return "the pretrained weights differ from those at the start"
    if path == "content of after":
        return f"the trials of study {study.after!r} differ from those at the start"
    if path not in stored:
        return f"{path} is {now[path]!r}, and was not a field"
    return f"{path} was {stored[path]!r}, " + (f"is {now[path]!r}" if path in now else "and is no longer a field")


def _count(study: Study) -> int:
    """Return the number of images of a study."""
    from harness.data.splits import count

    return count(study.train.data)


def check_movable(url: str) -> None:
    """Raise InputError if a study at this URL cannot be renamed: on a server other processes may use it."""
    if sqlite_file(url) is None:
        raise InputError(
            "--fresh renames a SQLite file; on a server, give the new study its own database with --storage."
        )


def _begin(name: str) -> str:
    return f"run it with '{run_command(name)}'"


def anew(url: str) -> str:
    if sqlite_file(url) is None:
        return "give the new study its own database with --storage"
    return "start a new study with --fresh (the old one is kept under another name)"


def move_aside(name: str, url: str, *folders: Path) -> Path | None:
    """Rename an existing study and the folders beside it (`--fresh`); nothing is deleted.

    Returns the new file, None if there is no study.
    """
    file = sqlite_file(url)
    check_movable(url)
    if file is None or not file.exists():
        return None
    with study_lock(file, name):
        target = free_name(file, time.strftime("%Y%m%d-%H%M%S"))
        _gather(file)
        for folder in folders:
            if folder.exists():
                folder.rename(target.with_suffix(folder.suffix))
        file.rename(target)
    return target


def _gather(file: Path) -> None:
    """Write a study's log into the file to rename. Raises InputError while another program uses it."""
    try:
        with closing(sqlite3.connect(file, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            # Fails beside any open connection: after the renaming an idle one would write into the new study's log.
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.OperationalError:
        busy = True
    if busy:
        raise InputError(f"--fresh: another program reads or writes {file}; stop it and try again.")


def uid_of(name: str, url: str) -> str | None:
    """Return a study's uid, None if it has not started. Raises InputError if the storage cannot be opened."""
    try:
        with read_store(name, url, any_format=True) as store:
            return store.uid or None
    except NotBegun:
        return None
