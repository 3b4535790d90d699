"""The storage is the truth: whatever kills the process, the study goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from PIL import Image

from harness.base.errors import InputError
from harness.config.events import Completed, Diverged, Failed, Pruned
from harness.config.space import Choice, Float
from harness.config.study import Study
from harness.config.train import FinalConfig
from harness.datasets.image_folder import ImageFolder
from harness.final.test_set import summary
from harness.search.pruners import Pruner, asha, no_pruning
from harness.search.rehearsal import rehearse
from harness.search.samplers import Sampler, gp, grid, tpe
from harness.store import database, opening
from harness.store.opening import open_store, read_store
from harness.store.store import Store
from tests.analytic import NOT_COMPARED, Died, accuracy, epoch_result, evaluate, fail_trial, run_analytic
from tests.conftest import PROJECT, make_study

TRIALS = 25
SOME = 12  # for the tests that need not go as far
EPOCHS = 6


def searching(**changes: Any) -> Study:
    """A study over the analytic curves, with TPE beyond its start-up and pruning at epochs 2 and 4."""
    return make_study(
        "cache", **{"sampler": tpe(n_startup_trials=5), "pruner": asha(min_epochs=2), "trials": TRIALS, **changes}
    )


def url_of(file: Path) -> str:
    return f"sqlite:///{file}"


def told(store: Store) -> list[dict[str, Any]]:
    """Everything that the storage knows about the trials and that may not depend on interruptions."""
    return [
        {
            "number": trial.number,
            "state": trial.state.name,
            "params": trial.params,
            "distributions": repr(trial.distributions),
            "values": trial.values,
            "intermediate": trial.intermediate_values,
            "epochs": [each["epoch"] for each in trial.user_attrs["epochs"]],
            "outcome": trial.user_attrs["outcome"],
            "seconds": trial.user_attrs["seconds"],
        }
        for trial in store.optuna_study.get_trials()
    ]


def run_straight(study: Study, file: Path, trials: int, **options: Any) -> list[dict[str, Any]]:
    with open_store(study, url_of(file)) as store:
        run_analytic(study, store, trials, **options)
        return told(store)


def run_on(study: Study, file: Path, trials: int, **options: Any) -> list[dict[str, Any]] | None:
    """Open the store anew and go on; None if the process died on the way."""
    try:
        return run_straight(study, file, trials, **options)
    except Died:
        return None


@contextlib.contextmanager
def death_at_write(number: int) -> Iterator[None]:
    """The process dies before its `number`-th change of a database: every state on disk that a kill can leave."""
    seen = 0

    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        nonlocal seen
        if not statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE", "CREATE")):
            return
        seen += 1
        if seen >= number:
            raise Died(statement)

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", count)
    try:
        yield
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", count)


def run_with_deaths(study: Study, file: Path, trials: int, writes: Iterator[int]) -> tuple[list[dict[str, Any]], int]:
    """Die again and again, each time before as many writes as `writes` says; the end, and the number of deaths."""
    for deaths, number in enumerate(writes):
        with death_at_write(number):
            end = run_on(study, file, trials, epochs=EPOCHS)
        if end is not None:
            return end, deaths
    raise AssertionError("not reached: `writes` ended")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """25 trials without an interruption."""
    return run_straight(searching(), tmp_path_factory.mktemp("straight") / "tiny.db", TRIALS, epochs=EPOCHS)


# -- the law: interrupted and resumed = uninterrupted --------------------------------------------------------------


def test_the_uninterrupted_study_has_every_kind_of_outcome(uninterrupted: list[dict[str, Any]]) -> None:
    states = [trial["outcome"]["state"] for trial in uninterrupted]
    assert len(uninterrupted) == TRIALS
    assert {"complete", "pruned"} <= set(states)
    assert len({str(trial["params"]) for trial in uninterrupted}) == TRIALS


def test_two_straight_runs_are_equal(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    assert run_straight(searching(), tmp_path / "tiny.db", 8, epochs=EPOCHS) == uninterrupted[:8]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop_after",
    [
        (0, 3, "report"),
        (9, 0, "ask"),
        (11, 0, "tell"),
        pytest.param((0, 0, "ask"), marks=pytest.mark.slow),
        pytest.param((3, 0, "tell"), marks=pytest.mark.slow),
        pytest.param((8, 1, "report"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_killed_once_and_resumed_equals_uninterrupted(
    stop_after: tuple[int, int, str], uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "tiny.db"
    assert run_on(searching(), file, SOME, epochs=EPOCHS, stop_after=stop_after) is None
    assert run_on(searching(), file, SOME, epochs=EPOCHS) == uninterrupted[:SOME]


@pytest.mark.slow
def test_killed_between_a_report_and_the_pruning_it_leads_to(
    uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The last report is on disk, the verdict is not: the resumed trial must be pruned after the same epoch."""
    pruned = [trial for trial in uninterrupted[:SOME] if trial["outcome"]["state"] == "pruned"]
    file = tmp_path / "tiny.db"
    for trial in (pruned[0], pruned[-1]):
        stop_after = (trial["number"], trial["outcome"]["epoch"], "report")
        assert run_on(searching(), file, SOME, epochs=EPOCHS, stop_after=stop_after) is None
    assert run_on(searching(), file, SOME, epochs=EPOCHS) == uninterrupted[:SOME]


def test_killed_several_times_and_resumed_equals_uninterrupted(
    uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "tiny.db"
    for stop_after in ((0, 1, "report"), (5, 0, "ask"), (5, 0, "tell"), (7, 1, "prune"), (7, 2, "report")):
        run_on(searching(), file, SOME, epochs=EPOCHS, stop_after=stop_after)
    assert run_on(searching(), file, SOME, epochs=EPOCHS) == uninterrupted[:SOME]


@pytest.mark.slow
@pytest.mark.parametrize(("writes", "trials"), [(23, SOME), pytest.param(9, TRIALS, marks=pytest.mark.slow)])
def test_killed_again_and_again_between_any_two_writes(
    writes: int, trials: int, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    end, deaths = run_with_deaths(searching(), tmp_path / "tiny.db", trials, iter([writes + n % 3 for n in range(200)]))
    assert deaths >= 5
    assert end == uninterrupted[:trials]


@pytest.mark.slow
def test_a_study_with_a_gaussian_process_killed_between_writes_equals_uninterrupted(tmp_path: Path) -> None:
    study = searching(sampler=gp(n_startup_trials=4), pruner=asha(first=0.2))
    expected = run_straight(study, tmp_path / "straight.db", SOME, epochs=EPOCHS)
    assert "pruned" in {trial["outcome"]["state"] for trial in expected}
    end, deaths = run_with_deaths(study, tmp_path / "tiny.db", SOME, iter([19 + n % 3 for n in range(200)]))
    assert deaths >= 5
    assert end == expected


@pytest.mark.slow
def test_killed_while_the_database_is_made(tmp_path: Path) -> None:
    """From the first CREATE TABLE to the parameters of the base configuration."""
    expected = run_straight(searching(), tmp_path / "straight.db", 1, epochs=EPOCHS)
    for number in (1, 12, 21, 33):
        file = tmp_path / f"{number}.db"
        with death_at_write(number):
            assert run_on(searching(), file, 1, epochs=EPOCHS) is None
        assert run_on(searching(), file, 1, epochs=EPOCHS) == expected, f"killed at write {number}"


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.chaos), pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_write_a_study_goes_on(step: int, tmp_path: Path) -> None:
    trials = 3
    expected = run_straight(searching(), tmp_path / "straight.db", trials, epochs=EPOCHS)
    number = 0
    while True:
        number += step
        file = tmp_path / f"{number}.db"
        with death_at_write(number):
            if run_on(searching(), file, trials, epochs=EPOCHS) is not None:
                break
        assert run_on(searching(), file, trials, epochs=EPOCHS) == expected, f"killed at write {number}"
    assert number > 60
    assert [trial["outcome"]["state"] for trial in expected].count("pruned") >= 1


OTHERS = {
    "RandomSampler": lambda: {"sampler": Sampler("RandomSampler")},
    "QMCSampler": lambda: {"sampler": Sampler("QMCSampler")},
    "NSGAIISampler": lambda: {"sampler": Sampler("NSGAIISampler", population_size=4)},
    "TPESampler": lambda: {"sampler": tpe(n_startup_trials=2, multivariate=False)},
    "MedianPruner": lambda: {"pruner": Pruner("MedianPruner", n_startup_trials=1, n_warmup_steps=1)},
    "SuccessiveHalvingPruner": lambda: {
        "pruner": Pruner("SuccessiveHalvingPruner", min_resource=2, reduction_factor=2)
    },
    "NopPruner": lambda: {"pruner": no_pruning()},
}
SIMPLE = {"backbone.dropout": Float(0.0, 0.6), "optim.base_lr": Float(1e-4, 1e-2, log=True)}
STATEFUL = {
    "QMCSampler": Sampler("QMCSampler"),
    "GridSampler": Sampler("GridSampler", search_space={path: [1e-3, 1e-2] for path in SIMPLE}),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_sampler_that_notes_elsewhere_what_it_has_tried_is_refused(name: str) -> None:
    study = searching(sampler=STATEFUL[name], space=SIMPLE, trials=12)
    with pytest.raises(InputError, match=f"{name} suggests .* resumed study cannot read it"):
        rehearse(study)


QUICK = ("QMCSampler", "SuccessiveHalvingPruner")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_every_sampler_and_pruner_goes_on_as_if_uninterrupted_or_is_refused(name: str, tmp_path: Path) -> None:
    """Some of Optuna's write into the storage while they decide, and decide otherwise after a kill."""
    try:
        study = searching(**OTHERS[name]())
        rehearse(dataclasses.replace(study, trials=7))
    except InputError:
        return
    expected = run_straight(study, tmp_path / "straight.db", 7, epochs=EPOCHS)
    end, deaths = run_with_deaths(study, tmp_path / "killed.db", 7, iter([13] * 200))
    assert deaths >= 5
    assert end == expected


@pytest.mark.slow
def test_the_grid_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    space = {"optim.base_lr": Choice((1e-2, 1e-3, 1e-4)), "optim.depth_lr_mult": Choice((0.5, 0.9))}
    space |= {"backbone.hidden": Choice(((16,),)), "backbone.dropout": Choice((0.1,))}
    study = searching(sampler=grid(), space=space, trials=6)
    expected = run_straight(study, tmp_path / "straight.db", 6, epochs=EPOCHS)
    end, _ = run_with_deaths(study, tmp_path / "killed.db", 6, iter([11] * 200))
    assert end == expected


def test_a_process_killed_for_real_is_continued(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    """SIGKILL in the middle of a trial, in a process of its own."""
    file = tmp_path / "tiny.db"
    process = start_child(file, "run_analytic(study, store, 7, epochs=6, curve=slow); print(flush=True)")
    assert process.stdout is not None
    try:
        while "trial 6 epoch 2" not in (line := process.stdout.readline()):
            assert line.startswith("trial"), "the child was not interrupted"
    finally:
        process.kill()
        process.wait()
    with read_store("tiny", url_of(file)) as store:
        assert store.counts()["running"] == 1
    assert run_on(searching(), file, 8, epochs=EPOCHS) == uninterrupted[:8]


# -- twice = once; more trials = a longer study --------------------------------------------------------------------


def test_running_twice_equals_running_once(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "tiny.db"
    for _ in range(2):
        with open_store(searching(), url_of(file)) as store:
            run_analytic(searching(), store, 8, epochs=EPOCHS)
            assert store.finished() == 8
            assert store.counts()["running"] == 0
            assert told(store) == uninterrupted[:8]


@pytest.mark.slow
def test_more_trials_continue_the_study(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "tiny.db"
    for trials in (1, 7, 12):
        assert run_on(searching(trials=trials), file, trials, epochs=EPOCHS) == uninterrupted[:trials]


def test_an_interrupted_trial_is_asked_again_with_its_number_and_parameters(tmp_path: Path) -> None:
    study, file = searching(), tmp_path / "tiny.db"
    run_on(study, file, TRIALS, epochs=EPOCHS, stop_after=(4, 1, "report"))
    with open_store(study, url_of(file)) as store:
        left = store.trials()[-1]
        assert (left.number, left.state, set(left.curve)) == (4, "running", {1})
        asked = store.ask(study)
        assert (asked.number, asked.params, asked.resumed) == (4, left.params, True)
        evaluate(study, store, asked, epochs=EPOCHS)
        assert not store.ask(study).resumed


def test_an_epoch_that_is_redone_with_the_same_result_is_not_worth_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(searching(), url_of(tmp_path / "tiny.db")) as store:
        asked = store.ask(searching())
        store.report(asked, 1, 0.5)
        store.report(asked, 1, 0.5)
        assert store.trials()[0].curve == {1: 0.5}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("died", [1, EPOCHS - 1, EPOCHS])
def test_curve_epochs_and_value_agree_when_redone_epochs_have_other_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], died: int
) -> None:
    study, file = searching(pruner=no_pruning()), tmp_path / "tiny.db"
    run_on(study, file, 1, epochs=EPOCHS, stop_after=(0, died, "report"))
    with open_store(study, url_of(file)) as store:
        before = store.trials()[0].curve
        evaluate(study, store, store.ask(study), epochs=EPOCHS, curve=lambda params, epoch: accuracy(params, epoch) / 2)
        (trial,) = store.trials()
    assert set(before) == set(range(1, died + 1))
    assert trial.state == "complete"
    assert trial.value == trial.curve[EPOCHS]
    assert trial.curve == {each.epoch: each.val.accuracy for each in trial.epochs if each.val is not None}
    assert all(trial.curve[epoch] != value for epoch, value in before.items())
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "in the repeated epoch" in line]) == died


# -- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, ["seed was 0, is 1"]),
        ({"sampler": tpe(n_startup_trials=6)}, ["sampler was"]),
        ({"pruner": no_pruning()}, ["pruner was"]),
        ({"final": FinalConfig(seeds=2)}, ["final.seeds was 1, is 2"]),
        ({"space": {"optim.base_lr": Float(1e-5, 1e-2, log=True)}}, ["space.optim.base_lr", "space.backbone.dropout"]),
    ],
)
def test_another_definition_is_refused_and_named(changes: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url) as store:
        run_analytic(searching(), store, 1)
    with (
        pytest.raises(InputError, match="started with another definition") as caught,
        open_store(searching(**changes), url),
    ):
        pass
    for words in (*named, "--fresh"):
        assert words in str(caught.value)


def test_another_base_is_refused_and_its_fields_are_named(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url):
        pass
    changed = searching().with_settings(["epochs=3", "optim.weight_decay=0.5"])
    with pytest.raises(InputError) as caught, open_store(changed, url):
        pass
    assert "epochs was 2, is 3; " in str(caught.value) or "; epochs was 2, is 3" in str(caught.value)
    assert "optim.weight_decay was 0.02, is 0.5" in str(caught.value)
    assert "base_lr" not in str(caught.value)


@pytest.mark.parametrize("kept", [None, 2])
def test_a_study_in_another_format_is_refused(kept: int | None, tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url) as store:
        store.set_attribute("format", kept)
    words = rf"written by another version of the harness \(format {kept or 0}, this version reads 1\); open it with"
    with pytest.raises(InputError, match=words), open_store(searching(), url):
        pass
    with pytest.raises(InputError, match=words), read_store("tiny", url):
        pass


def test_the_number_of_trials_and_the_places_may_change(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url) as store:
        uid = store.attributes().get("uid")
    moved = dataclasses.replace(searching(trials=99).located(tmp_path, None, None))
    with open_store(moved, url) as store:
        assert store.attributes().get("uid") == uid


def test_other_images_or_weights_are_refused_and_unknown_ones_are_not(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url, {"data": "aaaa", "weights": "none"}):
        pass
    with open_store(searching(), url, None):  # the no-op does not read the images
        pass
    with (
        pytest.raises(InputError, match=r"the images differ from those at the start \(\d+ then, \d+ now\)") as said,
        open_store(searching(), url, {"data": "bbbb", "weights": "none"}),
    ):
        pass
    assert "aaaa" not in str(said.value)
    assert "bbbb" not in str(said.value)
    with (
        pytest.raises(InputError, match="the pretrained weights differ from those at the start"),
        open_store(searching(), url, {"data": "aaaa", "weights": "others"}),
    ):
        pass


def test_images_that_were_added_are_counted_in_the_refusal(tmp_path: Path) -> None:
    """As many as then, and as many as now, with the folder that they lie in."""
    folder = tmp_path / "pictures"
    for number in range(10):
        for name in ("a", "b"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, name == "b", 0)).save(folder / name / f"{number}.bmp")
    data = ImageFolder(root=str(folder), image_size=8, stored_size=8, cache=str(tmp_path / "cache"))
    study = searching()
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, data=data))
    with open_store(study, url_of(tmp_path / "tiny.db"), {"data": "aaaa"}):
        pass
    Image.new("RGB", (8, 8), (99, 0, 0)).save(folder / "a" / "99.bmp")
    text = re.escape(f"the images in {folder} differ from those at the start (20 then, 21 now)")
    with pytest.raises(InputError, match=text), open_store(study, url_of(tmp_path / "tiny.db"), {"data": "bbbb"}):
        pass


def test_a_refused_definition_frees_the_lock(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url):
        pass
    with pytest.raises(InputError), open_store(searching(seed=1), url):
        pass
    with open_store(searching(), url):
        pass


# -- one writer ----------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from harness.store.opening import open_store
from tests.analytic import accuracy, run_analytic
from tests.store.test_store import searching

def slow(params, epoch):
    print(f"trial {len(store.trials()) - 1} epoch {epoch}", flush=True)
    time.sleep(0.01)
    return accuracy(params, epoch)

study = searching()
with open_store(study, sys.argv[1]) as store:
    print("held", flush=True)
    {work}
    sys.stdin.read()
"""


def start_child(file: Path, work: str = "pass") -> subprocess.Popen[str]:
    """Another process that holds the study of `file` and does `work`."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.replace("{work}", work), url_of(file)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_pid_and_sigkill_frees_the_lock(tmp_path: Path) -> None:
    file = tmp_path / "tiny.db"
    process = start_child(file)
    try:
        with pytest.raises(InputError, match=rf"run by process {process.pid}\b"), open_store(searching(), url_of(file)):
            pass
        with pytest.raises(InputError, match=rf"run by process {process.pid}\b"):
            opening.move_aside("tiny", url_of(file), tmp_path / "tiny.model")
        with read_store("tiny", url_of(file)) as store:  # looking is allowed
            assert store.finished() == 0
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with open_store(searching(), url_of(file)) as store:
        run_analytic(searching(), store, 1)
        assert Path(f"{file}.pid").read_text().strip() == str(os.getpid())
    assert not Path(f"{file}.pid").exists()


def test_studies_in_different_files_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with (
        open_store(searching(), url_of(tmp_path / "a.db")),
        open_store(searching(), url_of(tmp_path / "b.db")) as other,
    ):
        assert other.finished() == 0


# -- what cannot be opened -----------------------------------------------------------------------------------------


def garbage(folder: Path) -> str:
    (folder / "x.db").write_bytes(b"this is no database " * 100)
    return url_of(folder / "x.db")


def other_database(folder: Path) -> str:
    with contextlib.closing(sqlite3.connect(folder / "x.db")) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.execute("INSERT INTO recipes VALUES ('soup')")
        connection.commit()
    return url_of(folder / "x.db")


def truncated(folder: Path) -> str:
    file = folder / "x.db"
    with open_store(searching(), url_of(file)) as store:
        run_analytic(searching(), store, 2)
    for rest in folder.glob("x.db.*"):
        rest.unlink()
    file.write_bytes(file.read_bytes()[:3000])
    return url_of(file)


UNOPENABLE = {
    "a file that is no database": garbage,
    "a database that is no study": other_database,
    "a truncated study": truncated,
    "a folder": lambda folder: url_of(folder),
    "in memory": lambda folder: "sqlite:///:memory:",
    "in memory, short": lambda folder: "sqlite://",
    "an unknown dialect": lambda folder: "flowerbase://localhost/x",
    "no URL": lambda folder: "studies/tiny.db",
    "nothing": lambda folder: "",
    "a missing folder": lambda folder: url_of(folder / "not" / "there" / "x.db"),
    "an unreachable server": lambda folder: "postgresql://nobody@127.0.0.1:1/x",
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def without_leftovers(files: dict[str, bytes]) -> dict[str, bytes]:
    """SQLite and the lock may leave their empty files behind."""
    return {
        name: content
        for name, content in files.items()
        if not (name.endswith("-shm") or (name.endswith((".lock", "-wal")) and content == b""))
    }


def refusal(attempt: Any) -> str | None:
    """The message of the InputError; None if there was none."""
    try:
        attempt()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("make", UNOPENABLE.values(), ids=UNOPENABLE.keys())
def test_what_cannot_be_opened_is_refused_in_one_sentence_and_left_alone(make: Any, tmp_path: Path) -> None:
    url = make(tmp_path)
    before = snapshot(tmp_path)
    attempts = (
        lambda: database.check_database(url),
        lambda: opening.exists("tiny", url),
        lambda: open_store(searching(), url).__enter__(),
        lambda: read_store("tiny", url).__enter__(),
    )
    for attempt in attempts:
        # Where there is no file there is no study either; that alone is an answer.
        reason = refusal(attempt) or ("no study" if attempt is attempts[1] else "")
        assert reason
        assert "\n" not in reason
        assert without_leftovers(snapshot(tmp_path)) == before


def test_looking_for_a_missing_study_makes_no_file(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with pytest.raises(InputError, match="no results yet"), read_store("tiny", url):
        pass
    assert not opening.exists("tiny", url)
    database.check_database(url)
    assert list(tmp_path.iterdir()) == []


def test_looking_while_the_tables_are_created_leaves_them_to_their_creator(tmp_path: Path) -> None:
    """The last one is empty for a moment; Optuna's storage would fill it, and its creator then fails."""
    url, file = url_of(tmp_path / "tiny.db"), tmp_path / "tiny.db"
    with open_store(searching(), url):
        pass
    with closing(sqlite3.connect(file)) as connection:
        (version,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("DELETE FROM alembic_version")
        connection.commit()
    with pytest.raises(InputError, match="holds no study"), read_store("tiny", url):
        pass
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT * FROM alembic_version").fetchall() == []
        connection.execute("INSERT INTO alembic_version VALUES (?)", [version])
        connection.commit()
    with read_store("tiny", url) as store:
        assert store.trials() == []


def test_looking_into_an_empty_file_leaves_it_empty(tmp_path: Path) -> None:
    file = tmp_path / "tiny.db"
    file.touch()
    assert not opening.exists("tiny", url_of(file))
    with pytest.raises(InputError), read_store("tiny", url_of(file)):
        pass
    assert file.read_bytes() == b""


@pytest.mark.slow
def test_looking_for_another_name_in_a_database_says_so(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url):
        pass
    with pytest.raises(InputError, match="no study named 'other'"), read_store("other", url):
        pass
    assert opening.exists("tiny", url)
    assert not opening.exists("other", url)


# -- SQLite --------------------------------------------------------------------------------------------------------


def pragma(store: Store, name: str) -> Any:
    kept: Any = store.optuna_study._storage
    with getattr(kept, "_backend", kept).engine.connect() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


def test_connections_write_ahead_and_do_not_wait_for_the_disk(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url) as store:
        assert pragma(store, "journal_mode") == "wal"
        assert pragma(store, "synchronous") == 1  # NORMAL
        assert pragma(store, "busy_timeout") == 60_000


def test_looking_leaves_a_database_in_its_own_mode(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    with open_store(searching(), url):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "tiny.db")) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    before = (tmp_path / "tiny.db").read_bytes()
    with read_store("tiny", url) as store:
        assert pragma(store, "journal_mode") == "delete"
    assert (tmp_path / "tiny.db").read_bytes() == before


def test_a_reader_in_a_transaction_does_not_block_a_tell(tmp_path: Path) -> None:
    file, study = tmp_path / "tiny.db", searching()
    with open_store(study, url_of(file)) as store:
        run_analytic(study, store, 2)
        with contextlib.closing(sqlite3.connect(file, timeout=0)) as reader:
            reader.execute("BEGIN")
            seen = reader.execute("SELECT count(*) FROM trials").fetchone()
            run_analytic(study, store, 4)
            assert reader.execute("SELECT count(*) FROM trials").fetchone() == seen
            reader.rollback()
            assert reader.execute("SELECT count(*) FROM trials").fetchone() == (4,)


def test_a_closed_study_is_one_file(tmp_path: Path) -> None:
    with open_store(searching(), url_of(tmp_path / "tiny.db")) as store:
        run_analytic(searching(), store, 2)
    assert [name for name in without_leftovers(snapshot(tmp_path))] == ["tiny.db"]


# -- what counts ---------------------------------------------------------------------------------------------------


def test_failed_and_diverged_trials_are_results(tmp_path: Path) -> None:
    study = searching()
    with open_store(study, url_of(tmp_path / "tiny.db")) as store:
        run_analytic(study, store, 1)
        fail_trial(study, store, "RuntimeError: out of memory")
        asked = store.ask(study)
        store.report(asked, 1, 0.4)
        store.tell(asked, Diverged(epoch=2), [epoch_result(1, 0.4)], seconds=1.0)
        asked = store.ask(study)
        store.report(asked, 1, 0.3)
        store.tell(asked, Pruned(epoch=1), [epoch_result(1, 0.3)], seconds=1.0)
        store.ask(study)
        assert store.finished() == 4
        assert store.counts() == {"complete": 1, "pruned": 1, "failed": 2, "running": 1}
        records = store.trials()
        assert [record.state for record in records] == ["complete", "failed", "diverged", "pruned", "running"]
        assert records[1].reason == "RuntimeError: out of memory"
        assert [record.value is None for record in records] == [False, True, True, True, True]
        states = [trial.state.name for trial in store.optuna_study.get_trials()]
        assert states == ["COMPLETE", "FAIL", "PRUNED", "PRUNED", "RUNNING"]


def test_records_give_back_the_epochs_that_were_told(tmp_path: Path) -> None:
    study, epochs = searching(), [epoch_result(1, 0.25), epoch_result(2, 0.5)]
    with open_store(study, url_of(tmp_path / "tiny.db")) as store:
        asked = store.ask(study)
        for result in epochs:
            store.report(asked, result.epoch, result.val.accuracy)  # type: ignore[union-attr]
        store.tell(asked, Completed(value=0.5), epochs, seconds=3.0)
        record = store.trials()[0]
        assert record.epochs == tuple(epochs)
        assert record.curve == {1: 0.25, 2: 0.5}
        assert (record.state, record.value, record.seconds) == ("complete", 0.5, 3.0)


def test_the_best_trial_is_the_earliest_of_equals(tmp_path: Path) -> None:
    study = searching(pruner=no_pruning())
    values = [0.2, 0.6, 0.5, 0.6, 0.6, 0.1]
    with open_store(study, url_of(tmp_path / "tiny.db")) as store:
        assert store.best() is None
        for value in values:
            store.tell(store.ask(study), Completed(value=value), [epoch_result(1, value)], seconds=1.0)
        best = store.best()
        assert best is not None
        assert (best.number, best.value) == (1, 0.6)


def test_no_failed_and_no_pruned_trial_is_the_best(tmp_path: Path) -> None:
    study = searching()
    with open_store(study, url_of(tmp_path / "tiny.db")) as store:
        store.tell(store.ask(study), Failed(reason="x", traceback="x"), [], seconds=1.0)
        asked = store.ask(study)
        store.report(asked, 1, 0.99)
        store.tell(asked, Pruned(epoch=1), [epoch_result(1, 0.99)], seconds=1.0)
        assert store.best() is None


def test_tell_writes_the_epochs_before_the_state(tmp_path: Path) -> None:
    study, statements = searching(), list[str]()

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE")):
            statements.append(f"{statement} {parameters}")

    with open_store(study, url_of(tmp_path / "tiny.db")) as store:
        asked = store.ask(study)
        sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", note)
        try:
            store.tell(asked, Completed(value=0.5), [epoch_result(1, 0.5)], seconds=1.0)
        finally:
            sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", note)
    state = next(n for n, each in enumerate(statements) if each.startswith("UPDATE trials SET state"))
    for name in ("epochs", "seconds", "outcome"):
        assert any(f"'{name}'" in each for each in statements[:state]), name
        assert not any(f"'{name}'" in each for each in statements[state:]), name


FINAL = (
    summary([{"seed": 0, "correct": 1, "total": 2, "accuracy": 0.5, "weights": "0"}])
    | {"fit_on": "train", "test_openings": 1}
    | NOT_COMPARED
)


def test_the_final_result_belongs_to_one_trial(tmp_path: Path) -> None:
    study = searching(pruner=no_pruning(), trials=2)
    with open_store(study, url_of(tmp_path / "tiny.db")) as store:
        store.tell(store.ask(study), Completed(value=0.5), [epoch_result(1, 0.5)], seconds=1.0)
        assert not store.has_final()
        store.set_attribute("final", FINAL | {"trial": 0})
        assert store.has_final()
        assert not store.is_complete(study)
        store.tell(store.ask(study), Completed(value=0.7), [epoch_result(1, 0.7)], seconds=1.0)
        assert not store.has_final()
        store.set_attribute("final", FINAL | {"trial": 1})
        assert not store.is_complete(study)  # not yet published
        store.set_attribute("published", 2)
        assert store.is_complete(study)
        assert not store.is_complete(dataclasses.replace(study, trials=3))


# -- --fresh -------------------------------------------------------------------------------------------------------


def finished_study(folder: Path, trials: int) -> list[dict[str, Any]]:
    (folder / "tiny.model").mkdir()
    (folder / "tiny.model" / "model.json").write_text(f"trials {trials}")
    return run_straight(searching(), folder / "tiny.db", trials)


@pytest.mark.slow
def test_a_study_moved_aside_keeps_its_data_and_its_model(tmp_path: Path) -> None:
    url = url_of(tmp_path / "tiny.db")
    before = finished_study(tmp_path, 3)
    moved = opening.move_aside("tiny", url, tmp_path / "tiny.model")
    assert moved is not None
    assert not (tmp_path / "tiny.db").exists()
    assert not (tmp_path / "tiny.model").exists()
    assert (moved.with_suffix(".model") / "model.json").read_text() == "trials 3"
    with read_store("tiny", url_of(moved)) as store:
        assert told(store) == before
    with open_store(searching(seed=5), url) as store:
        assert store.finished() == 0


@pytest.mark.slow
def test_studies_moved_aside_in_the_same_second_are_all_kept(tmp_path: Path) -> None:
    moved = []
    for trials in (1, 2, 3):
        finished_study(tmp_path, trials)
        moved.append(opening.move_aside("tiny", url_of(tmp_path / "tiny.db"), tmp_path / "tiny.model"))
    assert len(set(moved)) == 3
    for trials, file in zip((1, 2, 3), moved, strict=True):
        assert file is not None
        assert (file.with_suffix(".model") / "model.json").read_text() == f"trials {trials}"
        with read_store("tiny", url_of(file)) as store:
            assert store.finished() == trials


@pytest.mark.slow
def test_a_study_whose_process_was_killed_is_moved_aside_whole(tmp_path: Path) -> None:
    """Its last trials are in the write-ahead log beside the file."""
    file = tmp_path / "tiny.db"
    process = start_child(file, "run_analytic(study, store, 3); print('done', flush=True)")
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    process.kill()
    process.wait()
    assert Path(f"{file}-wal").stat().st_size > 0
    moved = opening.move_aside("tiny", url_of(file), tmp_path / "tiny.model")
    assert moved is not None
    assert not list(tmp_path.glob("tiny.db*-*"))
    with read_store("tiny", url_of(moved)) as store:
        assert store.finished() == 3


def test_a_study_that_another_program_has_open_is_not_moved_aside(tmp_path: Path) -> None:
    """Even if it is idle: its next write would go into the log of the new study."""
    file = tmp_path / "tiny.db"
    run_straight(searching(), file, 1)
    with closing(sqlite3.connect(file)) as other:
        other.execute("SELECT count(*) FROM trials").fetchall()
        with pytest.raises(InputError, match="another program reads or writes"):
            opening.move_aside("tiny", url_of(file), tmp_path / "tiny.model")
        assert file.exists()
    assert opening.move_aside("tiny", url_of(file), tmp_path / "tiny.model") is not None


def test_moving_nothing_aside_does_nothing(tmp_path: Path) -> None:
    assert opening.move_aside("tiny", url_of(tmp_path / "tiny.db"), tmp_path / "tiny.model") is None
    assert list(tmp_path.iterdir()) == []


def test_a_study_on_a_server_cannot_be_moved_aside(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--fresh"):
        opening.move_aside("tiny", "postgresql://localhost/x", tmp_path / "tiny.model")


def test_a_read_that_is_interrupted_leaves_no_traceback(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """SQLAlchemy closes the connection first, and says then that it could not close the cursor."""

    engine = sqlalchemy.create_engine(url_of(tmp_path / "some.db"))
    with engine.connect() as connection:
        cursor = connection.exec_driver_sql("select 1 union select 2").cursor
        connection.connection.invalidate()
        connection._safe_close_cursor(cursor)
    assert "closing cursor" not in caplog.text


def test_the_base_is_not_pruned_even_if_another_worker_is_ahead(tmp_path: Path) -> None:
    study, url = make_study("cache", pruner=asha(min_epochs=1)), f"sqlite:///{tmp_path}/tiny.db"
    with open_store(study, url) as one, open_store(study, url, joining=True) as two:
        base, other = one.ask(study), two.ask(study)
        assert (base.number, other.number) == (0, 1)
        two.report(other, 1, 0.9)
        one.report(base, 1, 0.1)
        assert not one.should_prune(base, 1)
        two.tell(other, Completed(value=0.9), [epoch_result(1, 0.9)], 1.0)
        third = two.ask(study)
        two.report(third, 1, 0.1)
        assert two.should_prune(third, 1)
