"""Find a study by its name or file, and the paths of its files."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.errors import InputError, is_utf8
from harness.base.files import sqlite_file, sqlite_url

if TYPE_CHECKING:
    from harness.config.study import Study

PROJECT = Path(__file__).resolve().parents[2]
NO_STUDY = "defines no STUDY = Study(...)"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A study and its paths. `home` holds `studies/`, `mlruns/` and `data/`."""

    study: Study
    file: Path
    home: Path

    @property
    def storage_url(self) -> str:
        return sqlite_url(self.file.parent / f"{self.study.name}.db")

    def beside(self, url: str, suffix: str) -> Path:
        """Return a folder for the results at `url`: beside a SQLite file, else beside the study file."""
        file = sqlite_file(url) or self.file.with_name(f"{self.study.name}.db")
        return file.absolute().with_name(f"{file.name.removesuffix('.db')}{suffix}")

    def kept(self, url: str) -> list[Path]:
        """Return the files and folders of the study and its results at `url`, which nothing else may replace."""
        file = sqlite_file(url)
        beside = ("", "-wal", "-shm", "-journal", ".lock", ".pid")
        database = [] if file is None else [Path(f"{file}{suffix}") for suffix in beside]
        return [self.file, *database, *(self.beside(url, suffix) for suffix in (".model", ".checkpoints"))]

    @property
    def mlruns(self) -> Path:
        return self.home / "mlruns"


def find_home() -> Path:
    """Return the working folder: the current one if it has studies/ or runs, else the project's."""
    here = Path.cwd()
    return here if (here / "studies").is_dir() or (here / "mlruns" / "mlflow.db").is_file() else PROJECT


def find(name: str, home: Path | None = None) -> Found:
    """Return the study `name` in `home`/studies, or the one in the file `name`.

    Raises InputError if there is none, or its file defines no study.
    """
    is_path = name.endswith(".py") or "/" in name
    file = Path(os.path.abspath(name)) if is_path else (home or find_home()).resolve() / "studies" / f"{name}.py"
    if file.is_file() and file.suffix != ".py":
        raise InputError(f"{file} is not a study file; give the study's .py file or its name.")
    if not file.is_file():
        there = ", ".join(names(home))
        if is_path:
            named = f"the name of a study ({there}) or " if there else ""
            raise InputError(f"There is no study file {file}; give {named}another file.")
        if there:
            raise InputError(f"There is no study {name!r}; choose from {there}, or give a path.")
        raise InputError(
            f"There is no study {name!r}, nor any other in {file.parent}; go to the folder that holds studies/, or "
            "give the path to a study file."
        )
    if not is_utf8(str(file)):
        raise InputError(f"The path {file} is not UTF-8 and cannot be stored; rename it.")
    place = file.parent.parent if file.parent.name == "studies" else file.parent
    return Found(study=_load(file), file=file, home=home or place)


def run_command(study: str) -> str:
    """Return a command that runs a study, given by name or path, from the current folder."""
    program = "run_study.py" if Path("run_study.py").is_file() else "-m harness run"
    return f"python {program} --study {shlex.quote(study)}"


def names(home: Path | None = None) -> list[str]:
    """Return the names of the studies, sorted."""
    files = ((home or find_home()) / "studies").glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def defines(file: Path, name: str) -> bool:
    """Return whether a file defines the study `name`; True if it cannot be loaded, as while it is edited."""
    try:
        return _load(file).name == name
    except InputError as error:
        return NO_STUDY not in str(error)


def _load(file: Path) -> Study:
    from harness.config.study import Study

    spec = importlib.util.spec_from_file_location(f"study_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there, if the study defines any
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be for JSON
            spec.loader.exec_module(module)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (Exception, SystemExit) as error:
        line = next(
            (each.lineno for each in reversed(traceback.extract_tb(error.__traceback__)) if each.filename == str(file)),
            None,
        )
        line = error.lineno if isinstance(error, SyntaxError) else line
        reason = error.msg if isinstance(error, SyntaxError) else f"{type(error).__name__}: {error}".splitlines()[0]
        place = f"{file}, line {line}" if line else str(file)
        raise InputError(f"{place}: {reason}; fix the study file.") from error
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise InputError(f"{file} {NO_STUDY}; see studies/demo.py for one.")
    return study
