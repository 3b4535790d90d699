"""The Python API: `harness.run`, `harness.open`, `harness.studies`.

The command line is a thin layer over this module. torch, MLflow and pandas are imported on first use.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.errors import InputError, Told, masked
from harness.base.files import folder_for, sqlite_file, sqlite_url
from harness.config import find as finding
from harness.config.events import Event
from harness.config.final_result import FinalResult
from harness.config.find import Found
from harness.config.options import RunOptions
from harness.config.study import Study
from harness.config.train import TrainConfig
from harness.final.sentences import test_sentence
from harness.report import overview
from harness.report.write import write_report
from harness.search.replay import replay_study
from harness.store.opening import as_begun, exists, names_in, read_store, url_of
from harness.store.store import Store
from harness.tracking.library import variables_back
from harness.tracking.places import uri_of
from harness.training import interrupt

if TYPE_CHECKING:
    import pandas
    from PIL import Image

    from harness.serving.predict import Guess, Predictor
    from harness.study.reproduce import Reproduction


def run(
    study: Study | str | Path,
    *,
    trials: int | None = None,
    workers: int = 1,
    storage: str | None = None,
    tracking_uri: str | None = None,
    home: str | Path | None = None,
    on_event: Callable[[Event], object] | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Run or resume a study, and return its result; a finished study is not run again.

    `study` is a `Study`, the name of one in `home`/studies, or a file. `trials` is the total number of finished trials.
    `storage` and `tracking_uri` are database URLs; both default to files in `home`: the current folder, or for a name
    the one where its file was found. `on_event` is called with every event (`harness.config.events`). `options` are
    the other fields of `RunOptions`, as on the command line: `set=["epochs=3"]`, `device`, `data_root`, `fresh`.

    Ctrl-C, or a notebook's stop button, finishes the batch, writes a checkpoint, and raises KeyboardInterrupt. Raises
    InputError for user errors, Halt if the study cannot continue here, StudyFailed if no trial has a result.

    As many arguments as there are options that most studies need.
    """
    from harness.report.display import StudyConsole
    from harness.study import start

    if on_event is not None and not callable(on_event):
        raise InputError(f"on_event must be a function that takes an event, not {on_event!r}.")
    if home is not None and not Path(home).is_dir():
        raise InputError(f"There is no folder {home}; create it first.")
    found = _found(study, home)
    given = {"trials": trials, "workers": workers, "storage": storage, "tracking_uri": tracking_uri} | options
    asked = RunOptions.of(given, command=_command(found.study.name, given))
    if found.study is study and not asked.trains_itself:
        raise InputError(
            "Workers load a study from its file, but this study has no file; give the name or the file of a study, or "
            "workers=1."
        )
    with _as_before(), folder_for(found.file.parent if found.study is study and storage is None else Path.cwd()):
        start.run(asked, found, StudyConsole(quiet=not progress), [] if on_event is None else [on_event])
    return Result(found, storage, tracking_uri)


@contextmanager
def _as_before() -> Iterator[None]:
    """Leave signals, environment variables and torch's modes to a program as it had them."""
    from harness.training.runtime import modes_back

    with interrupt.handled(), variables_back(), modes_back():
        yield


def open(
    study: Study | str | Path,
    storage: str | None = None,
    *,
    tracking_uri: str | None = None,
    home: str | Path | None = None,
) -> Result:
    """Open a study read-only, even while it runs. Raises InputError if it does not exist."""
    result = Result(_found(study, home), storage, tracking_uri)
    with result.store():
        return result


def studies(home: str | Path | None = None) -> pandas.DataFrame:
    """Return a row for each study in `home`/studies: its state, trials, best validation and test accuracy."""
    import pandas

    return pandas.DataFrame([asdict(row) for row in rows(home)], columns=[field.name for field in fields(overview.Row)])


def list_models(pattern: str = "") -> pandas.DataFrame:
    """Return a row for each model that a study file can name, and whose name contains `pattern` or matches it.

    Without a pattern, those of timm are left out. Raises InputError if no name matches.
    """
    import pandas

    from harness.models.catalog import find_models

    return pandas.DataFrame([asdict(each) for each in find_models(pattern)])


def _command(name: str, given: Mapping[str, Any]) -> str:
    """Return the call that resumes a study, as text without passwords and one-time options."""
    lasting = {option: value for option, value in given.items() if option not in ("fresh", "reopen_test")}
    shown = "".join(f", {option}={value!r}" for option, value in lasting.items() if value is not None)
    return masked(f"harness.run({name!r}{shown})")


def _found(study: Study | str | Path, home: str | Path | None) -> Found:
    if isinstance(study, Study):
        place = Path(home) if home is not None else Path.cwd()
        return finding.Found(study=study, file=place.resolve() / "studies" / f"{study.name}.py", home=place.resolve())
    return finding.find(str(study), None if home is None else Path(home).resolve())


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """The trial that the final run retrains; before the choice, the complete trial with the highest value."""

    number: int
    value: float  # the objective on the validation images, 0 to 1
    params: dict[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class Report:
    """A study's report. In a notebook it shows the answer and a link."""

    path: Path
    answer: str

    def _repr_html_(self) -> str:
        link = f'<a href="{html.escape(self.path.as_uri())}">{html.escape(str(self.path))}</a>'
        return f"{html.escape(self.answer)}<br>{link}"


class Result:
    """The results of a study so far; each access reads the storage again."""

    def __init__(self, found: Found, storage: str | None = None, tracking_uri: str | None = None) -> None:
        self.name = found.study.name
        file = sqlite_file(url := url_of(found, storage))
        self.url = url if file is None or "?" in url else sqlite_url(file.absolute())
        self._found, self._tracking_uri = found, None if tracking_uri is None else str(tracking_uri)

    def store(self) -> AbstractContextManager[Store]:
        """Return a context manager that opens the study's storage read-only."""
        return read_store(self.name, self.url)

    @property
    def tracking_uri(self) -> str:
        return uri_of(self._tracking_uri, self._found.mlruns)

    @property
    def best(self) -> BestTrial | None:
        """The best trial; None until a trial is complete."""
        with self.store() as store:
            trial = store.chosen() or store.best()
            if trial is None or trial.value is None:
                return None
            config = as_begun(self._found.study, store).config(trial.params)
            return BestTrial(number=trial.number, value=trial.value, params=trial.params, config=config)

    @property
    def final(self) -> FinalResult | None:
        """The test result; None until the test set is opened."""
        with self.store() as store:
            return store.facts().final

    def trials(self) -> pandas.DataFrame:
        """Return a row for each trial: number, state, value, epochs, seconds, reason, and each parameter."""
        with self.store() as store:
            return overview.frame(store)

    def curves(self) -> pandas.DataFrame:
        """Return a row for each epoch of each trial: its losses and accuracies, learning rate and seconds."""
        import pandas

        with self.store() as store:
            epochs = [(trial.number, each) for trial in store.trials() for each in trial.epochs]
        return pandas.DataFrame([{"trial": number, "epoch": each.epoch, **each.metrics()} for number, each in epochs])

    def summary(self) -> str:
        """Return the study in a few lines."""
        with self.store() as store:
            return overview.summary(self.name, store, self.tracking_uri)

    def overview(self) -> dict[str, Any]:
        """Return all results, ready for JSON."""
        with self.store() as store:
            return overview.overview(self.name, store, self.tracking_uri)

    def digest(self) -> str:
        """Return a sha256 of the results; equal studies have equal digests."""
        with self.store() as store:
            return overview.digest(store)

    @property
    def report(self) -> Report:
        """The study's current report, written beside the study file."""
        path = self.write_report()
        with self.store() as store:
            return Report(path, test_sentence(store))

    def write_report(self, folder: str | Path | None = None) -> Path:
        """Write report.html, trials.csv and suspects.csv; return the page's path. Raises Halt if the disk is full."""
        with self.store() as store:
            return write_report(
                self.name, store, self.tracking_uri, Path(folder or self._found.beside(self.url, ".report"))
            )

    @property
    def model(self) -> Model:
        """The final model, loaded on the CPU. Raises InputError if there is none."""
        from harness.serving.predict import load_predictor

        return Model(load_predictor(self._found, self.url, "cpu"))

    def reproduce(self, trial: int, *, data_root: str | None = None, device: str | None = None) -> Reproduction:
        """Return an iterator that retrains a trial and compares each epoch. Raises InputError for an unknown trial."""
        from harness.study.reproduce import reproduction

        return reproduction(self._found, self.url, trial, data_root, device)

    def replay(self) -> bool:
        """Ask the sampler for every trial again and print the differences; return whether there are none."""
        with self.store() as store:
            return replay_study(as_begun(self._found.study, store), store)

    def audit(self, fraction: float = 0.1, seed: int = 0, **options: Any) -> None:
        """Train a fraction of the pruned trials to the last epoch; print what pruning saved and cost."""
        from harness.study.audit import audit_study

        given = {"storage": self.url, "tracking_uri": self._tracking_uri} | options
        with _as_before():
            audit_study(RunOptions.of(given), self._found, fraction, seed)

    def ablate(self, **options: Any) -> None:
        """Train from the base to the chosen configuration, one field at a time; print what each one gained."""
        from harness.study.ablate import ablate_study

        given = {"storage": self.url, "tracking_uri": self._tracking_uri} | options
        with _as_before():
            ablate_study(RunOptions.of(given), self._found)

    def doctor(self, fix: bool = False) -> bool:
        """Print, or `fix`, disagreements of storage, MLflow, checkpoints and processes. Return whether all agree."""
        from harness.study.doctor import consult

        with variables_back():
            return consult(self._found, self.url, self._tracking_uri, fix)

    def export_onnx(self, path: str | Path) -> None:
        """Write the final model as one ONNX file. Raises InputError for user errors."""
        from harness.serving.export import export_onnx

        export_onnx(self._found, self.url, Path(path))

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"


class Model:
    """The final model, ready to predict."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    @property
    def classes(self) -> Sequence[str]:
        return self.predictor.saved.classes

    def predict(self, images: Iterable[str | Path | Image.Image], top: int = 5) -> list[list[Guess]]:
        """Return the `top` likeliest classes of each photograph, likeliest first, with `name` and `probability`.

        `images` are files or Pillow images of any size. Raises InputError naming a file that is not an image.
        """
        import torch
        from PIL import Image

        if isinstance(images, str | Path | Image.Image):
            raise InputError("predict takes a list of photographs; put the photograph into brackets.")
        if not isinstance(top, int) or isinstance(top, bool) or top < 1:
            raise InputError(f"top is a number of classes from 1, not {top!r}.")
        if not (images := list(images)):
            return []
        for each in images:
            if not isinstance(each, str | Path | Image.Image):
                raise InputError(f"predict takes files or Pillow images, not {each!r}.")
            if not isinstance(each, Image.Image) and not Path(each).is_file():
                raise InputError(f"There is no file {each}.")
        tensors = [self.predictor.photograph(Path(each) if isinstance(each, str) else each) for each in images]
        return self.predictor.guesses(torch.stack(tensors), min(top, len(self.classes)))


def rows(home: str | Path | None = None) -> list[overview.Row]:
    """Return the studies in `home`/studies, in order: those with a file, then those that a program ran there."""
    place = finding.find_home() if home is None else Path(home)
    files = {file.stem: file for file in (place / "studies").glob("*.db") if "." not in file.stem}
    found = []
    for name in finding.names(place):
        try:
            each = finding.find(name, place)
            found.append(_row(each.study.name, url_of(each, None), each.study.trials))
        except Told as error:
            found.append(overview.Row(study=name, state="cannot be read", note=str(error)))
    seen = {row.study for row in found}
    found += [_row(name, sqlite_url(file.resolve()), 0) for name, file in sorted(files.items()) if name not in seen]
    return found


def _row(name: str, url: str, trials: int) -> overview.Row:
    try:
        # A database without a study file, such as a copy, may have another name than the study in it.
        inside = next(iter([] if trials else sorted(names_in(url), key=lambda each: each != name)), name)
        if not exists(inside, url):
            return overview.Row(study=name, state="not begun", trials=trials)
        with read_store(inside, url) as store:
            return replace(overview.row_of(inside, store, trials), study=name)
    except Told as error:  # for example another program's database, or a damaged one
        return overview.Row(study=name, state="cannot be read", note=str(error))
