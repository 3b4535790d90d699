"""Opening a study's storage: to run it, held and compared with its definition, or to look at it."""

from __future__ import annotations

import functools
import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna

from harness.config import Study
from harness.database import BUSY_TIMEOUT_SECONDS, alone, check_database, connect, dispose, has_tables, held, outlast
from harness.errors import InputError
from harness.files import Damaged, check_tensors, sqlite_file
from harness.leases import Leases, make_table
from harness.opened_file import OpenedFile
from harness.storage import Store

FORMAT = 1  # of what a study keeps beside Optuna's own; a change that old studies cannot follow makes it 2


@contextmanager
def open_store(
    study: Study, url: str, content: Mapping[str, str] | None = None, *, joining: bool = False
) -> Iterator[Store]:
    """Open a study for running, and hold it: a second process on the same SQLite study is refused.

    One that is `joining` works for the process that holds it. `content` are fingerprints of what the definition only
    names, the images and the pretrained weights; None skips their comparison. Raises InputError when the database
    cannot be opened or is none of ours, when another process holds the study, and when the stored definition differs
    from `study` (naming the fields).
    """
    file = sqlite_file(url)
    with held(None if joining else file, study.name):

        def begin() -> tuple[optuna.storages.RDBStorage, optuna.Study]:
            check_database(url)
            with alone(url):
                storage = connect(url)
                return storage, _begun(study, url, storage, content)

        storage, optuna_study = outlast(url, begin) if joining else begin()  # a server was there a moment ago
        store = Store(url, optuna_study)
        leases = Leases(storage.engine, store.uid, file)
        opened = None
        try:
            if file is not None and not joining:  # whoever held it before is gone, or works for one that is
                outlast(url, leases.clear)
                opened = OpenedFile(file)
            yield Store(url, optuna_study, engine=storage.engine, leases=leases, file=opened)
        finally:
            leases.close()
            dispose(storage)
            if opened is not None:
                opened.close()


def _begun(
    study: Study, url: str, storage: optuna.storages.RDBStorage, content: Mapping[str, str] | None
) -> optuna.Study:
    """The study in the storage, made if it is not there; its definition is kept or compared."""
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
    return optuna_study


@contextmanager
def read_store(name: str, url: str, any_format: bool = False) -> Iterator[Store]:
    """Open a study to look at it; it may be running. Raises InputError when there is none, or another format's.

    Of `any_format` the name, the uid and who is at work can be known.
    """
    file = sqlite_file(url)
    if file is not None and not file.is_file():
        raise InputError(f"Study {name!r} has no results yet ({file} does not exist); run it with --study {name}.")
    if file is not None and file.stat().st_size == 0:
        raise InputError(
            f"Study {name!r} has no results ({file} is empty); take the file from a copy if it held any, else run it "
            f"with --study {name}."
        )
    check_database(url)
    unknown = InputError(
        f"{url} holds no study named {name!r}; it has not begun there: run it, or check --storage and the name."
    )
    if not has_tables(url):
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


def exists(name: str, url: str) -> bool:
    """Whether the storage holds this study already, with a definition or trials: a start may have been cut off before.

    Raises InputError when it cannot be opened.
    """
    file = sqlite_file(url)
    if file is not None and (not file.is_file() or file.stat().st_size == 0):
        return False
    check_database(url)
    if not has_tables(url):
        return False
    storage = connect(url, writing=False)
    try:
        study = outlast(url, lambda: storage.get_study_id_from_name(name))
        begun = outlast(url, lambda: "definition" in storage.get_study_user_attrs(study) or storage.get_n_trials(study))
        return bool(begun)
    except KeyError:
        return False
    finally:
        dispose(storage)


def begun_by(name: str, url: str) -> str | None:
    """The name of the study file that a study was last run from, None when there is no such study.

    Of one that no command has run it is the file that is called as the study is.
    """
    try:
        with read_store(name, url, any_format=True) as store:
            return store.attributes().get("file") or f"{name}.py"
    except InputError:  # there is no such study, and whoever wants it says so
        return None


def as_begun(study: Study, store: Store, content: Mapping[str, str] | None = None) -> Study:
    """The study as the storage knows it: settings given on the command line at its start are put back.

    `content` are fingerprints as in `open_store`. Raises InputError when the study's file says something else today
    that no setting can.
    """
    stored = store.facts().definition
    if stored is None:
        raise InputError(f"Study {study.name!r} has not begun; run it with --study {study.name}.")
    study = study.with_definition(stored)
    check_definition(study, store, content)
    return study


def check_format(name: str, store: Store) -> None:
    """Raise InputError for a study that has begun and is kept in another format."""
    known = store.attributes()
    if "definition" in known and known.get("format") != FORMAT:
        raise InputError(
            f"Study {name!r} in {store.url} was written by another version of the harness (format "
            f"{known.get('format') or 0}, this one reads {FORMAT}); open it with that version, or "
            f"{_anew(store.url)}."
        )


def compare(study: Study, url: str, content: Mapping[str, str] | None) -> None:
    """Raise InputError unless `study` continues the one in the storage, which exists. Writes nothing, nor locks."""
    with read_store(study.name, url) as store:
        if store.facts().definition is not None or store.trials():
            check_definition(study, store, content)


def check_definition(study: Study, store: Store, content: Mapping[str, str] | None) -> None:
    """Keep the definition at the first start; at every later one, refuse a study that would not continue it."""
    now = study.definition() | {f"content of {name}": value for name, value in (content or {}).items()}
    stored = store.facts().definition
    if stored is None:
        if store.trials():
            raise InputError(
                f"Study {study.name!r} in {store.url} was begun by another program; "
                "give another --storage, or rename the study."
            )
        store.set_attribute("format", FORMAT)
        store.set_attribute("uid", uuid.uuid4().hex)
        if "data" in (content or {}):
            store.set_attribute("images", _count(study))
        store.set_attribute("definition", now)
        return
    check_format(study.name, store)
    unknown = {path for path in stored if path.startswith("content of ")} if content is None else set()
    differing = [path for path in {**stored, **now} if stored.get(path) != now.get(path) and path not in unknown]
    if differing:
        changes = "; ".join(_change(path, stored, now, study, store) for path in differing)
        command = store.facts().command  # the settings of the last start, which had the same definition
        raise InputError(
            f"Study {study.name!r} was begun with another definition ({changes}); its results could not be compared. "
            f"Change it back, or {_anew(store.url)}." + (f" It was run with: {command}" if command else "")
        )


def _change(path: str, stored: Mapping[str, Any], now: Mapping[str, Any], study: Study, store: Store) -> str:
    """What is other than at the study's start, in a clause."""
    if path == "content of data":
        root, then = getattr(study.train.data, "root", None), store.facts().images
        counted = "" if then is None else f" ({then} then, {_count(study)} now)"
        return f"the images{f' in {root}' if root else ''} are others than when the study began{counted}"
    if path == "content of weights":
        return "the pretrained weights are others than when the study began"
    return f"{path} was {stored.get(path)!r}, is {now.get(path)!r}"


def _count(study: Study) -> int:
    """Of all images of a study."""
    from harness.data.tensors import count

    return count(study.train.data)


def check_movable(url: str) -> None:
    """Raise InputError when a study at this URL could not be moved aside: on a server others may be at work on it."""
    if sqlite_file(url) is None:
        raise InputError(
            "--fresh moves a SQLite file; on a server, give the new study a database of its own by --storage."
        )


def _anew(url: str) -> str:
    if sqlite_file(url) is None:
        return "give the new study a database of its own with --storage"
    return "start anew with --fresh (the old study is kept under another name)"


def move_aside(name: str, url: str, *folders: Path) -> Path | None:
    """Give an existing study, and the folders beside it, another name (`--fresh`); nothing is deleted.

    Returns the new file, None if there was none.
    """
    file = sqlite_file(url)
    check_movable(url)
    if file is None or not file.exists():
        return None
    with held(file, name):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = next(
            path
            for number in range(1000)
            if not (path := file.with_name(f"{file.stem}.{stamp}{f'-{number}' if number else ''}.db")).exists()
        )
        _gather(file)
        for folder in folders:
            if folder.exists():
                folder.rename(target.with_suffix(folder.suffix))
        file.rename(target)
    return target


def _gather(file: Path) -> None:
    """Bring all of a study into the one file that is renamed. Raises InputError while another program is at it."""
    try:
        with closing(sqlite3.connect(file, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError:
        busy = True
    if busy:
        raise InputError(f"--fresh: another program reads or writes {file}; end it, and try again.")


WEIGHTS, DESCRIPTION, PROGRAM = "model.safetensors", "model.json", "model.pt2"
CHECK_FILE = "check.safetensors"  # test images as the cache holds them: `images` uint8 [N, S, S, 3]
AGAIN = "run the study again: it makes what is lost again, and the test set stays closed"


def has_model(folder: Path) -> bool:
    """Whether the final run's model lies whole in its folder; it is written as these two files, in this order."""
    return (folder / WEIGHTS).is_file() and (folder / DESCRIPTION).is_file()


def record_files(store: Store, folder: Path, *names: str) -> None:
    """Keep the sha256 of files of the model's folder as they are now; of one that is not there, keep none.

    For a study on a server nothing is kept: each machine has a folder of its own, and weights of its own to the last
    bits.
    """
    if sqlite_file(store.url) is None:
        return
    others = {name: value for name, value in _recorded(store).items() if name not in names}
    here = {name: _sha256(folder / name) for name in names if (folder / name).is_file()}
    store.set_attribute("files", others | here)


def forget_files(store: Store, *names: str) -> None:
    """Keep no sha256 of these files: whatever lies there whole will do."""
    if _recorded(store):
        store.set_attribute("files", {name: value for name, value in _recorded(store).items() if name not in names})


def is_recorded(store: Store, folder: Path, name: str) -> bool:
    """Whether a file of the model is there and, to the last bit, the one that was recorded."""
    return name in _recorded(store) and (folder / name).is_file() and file_fault(store, folder, name) is None


def wrong_files(store: Store, folder: Path) -> list[tuple[str, str]]:
    """The final model's files that are missing or not as they were written: the name, and a clause that says so."""
    found = {name: file_fault(store, folder, name) for name in sorted({WEIGHTS, DESCRIPTION, *_recorded(store)})}
    return [(name, fault) for name, fault in found.items() if fault is not None]


def file_fault(store: Store, folder: Path, name: str) -> str | None:
    """What is wrong with a file of the final model, in a clause that names it; None when nothing is known to be."""
    path, recorded = folder / name, _recorded(store).get(name)
    if not path.is_file():
        return f"{path} is missing"
    if recorded is not None:
        return None if _sha256(path) == recorded else f"{path} is damaged (its checksum is wrong)"
    try:  # of studies on a server none is kept
        if name == WEIGHTS:
            check_tensors(path)
        elif name == DESCRIPTION:
            read_description(path)
    except Damaged as error:
        return str(error)
    return None


def _recorded(store: Store) -> dict[str, str]:
    return store.facts().files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


DESCRIBED = {
    "study_uid": str,
    "weights": dict,
    "classes": list,
    "preprocessing": dict,
    "configuration": dict,
    "fit_on": str,
    "trial": int,
    "trial_validation_accuracy": float | int,
    "test": dict,
}


def read_description(path: Path) -> dict[str, Any]:
    """The final model's model.json. Raises Damaged when it is no JSON, or without what every one of them says."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error
    if not isinstance(description, dict):
        raise Damaged(f"{path} is damaged (it is no JSON object)")
    lacking = [name for name, kind in DESCRIBED.items() if not isinstance(description.get(name), kind)]
    if not lacking and description["fit_on"] not in ("train", "train+val"):
        lacking = ["fit_on"]
    if lacking:
        raise Damaged(f"{path} is damaged (it does not say the model's {', '.join(lacking)})")
    return description


def is_tested(description: Mapping[str, Any]) -> bool:
    """Whether a model.json calls the weights beside it the tested ones."""
    return bool(description["weights"].get("tested"))


def is_untested(folder: Path) -> bool:
    """Whether the model there was trained again, to other bits than those that were tested.

    MLflow is not given it: it has the tested one, or may still get it from the machine where that lies.
    """
    try:
        return has_model(folder) and not is_tested(read_description(folder / DESCRIPTION))
    except Damaged:  # it is named elsewhere, and made again
        return False


def check_folder(folder: Path, url: str, uid: str | None) -> None:
    """Raise InputError when the model in `folder` is not that of the study at `url`; its `uid` is None until it begins.

    Studies of one name in several databases have their folders in one place.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    owner = description.get("study_uid") if isinstance(description, dict) else None
    if owner not in (None, uid):
        other = "give this study another name" if sqlite_file(url) is None else "give another --storage"
        raise InputError(f"{folder} holds the model of another study than {url}; move that folder away, or {other}.")


def uid_of(name: str, url: str) -> str | None:
    """The uid of a study, None when it has not begun. Raises InputError when the storage cannot be opened."""
    if not exists(name, url):
        return None
    with read_store(name, url, any_format=True) as store:
        return store.uid


def published(store: Store, model: Path) -> list[Path]:
    """The folders that lie with the study's own run in MLflow: of its report, and of its model if that was tested."""
    report = model.with_suffix(".report")
    wanted = [report, model] if _is_whole(store, model) else [report]
    return [folder for folder in wanted if folder.is_dir()]


def is_registered(study: Study, store: Store, model: Path) -> bool:
    """Whether the model was given to MLflow's registry; what cannot be exported is not."""
    wanted = study.final.publish and _is_whole(store, model) and (model / PROGRAM).is_file()
    return wanted and store.facts().is_registered()


def _is_whole(store: Store, model: Path) -> bool:
    """Whether there is the model that was tested; one that is damaged is named elsewhere."""
    try:
        return store.has_final() and has_model(model) and is_tested(read_description(model / DESCRIPTION))
    except Damaged:
        return False
