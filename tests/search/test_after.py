"""Studies that begin with the trials of an earlier one as the sampler's history."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.base.errors import InputError
from harness.cli.commands import main
from harness.config.find import find
from harness.config.space import Choice, Float, encode
from harness.config.study import Study
from harness.search.replay import replay
from harness.search.samplers import MOST_EARLIER, Sampler, earlier_trials, gp, grid, tpe, with_earlier
from harness.search.suggest import _sampler
from harness.store.opening import read_earlier
from harness.store.store import Store
from tests.analytic import ceiling, memory_store, run_analytic
from tests.conftest import make_study
from tests.small import study_in

SAMPLERS = {"TPE": tpe(n_startup_trials=4), "Gaussian process": gp(n_startup_trials=4)}
COUNT = 12


def after(old: Study, store: Store, **changes: Any) -> tuple[Study, Store]:
    """A study in memory that has kept the trials of another."""
    new = dataclasses.replace(old, name="new", after=old.name, seed=1, **changes)
    fresh = memory_store(new)
    fresh.set_attribute("after", {"trials": earlier_trials(new, store.optuna_study.trials, old.definition())})
    return new, fresh


@pytest.fixture(scope="module", params=SAMPLERS)
def old(request: pytest.FixtureRequest) -> tuple[Study, Store]:
    study = make_study("cache", sampler=SAMPLERS[request.param])
    store = memory_store(study)
    run_analytic(study, store, COUNT)
    return study, store


def test_every_suggestion_replays_and_the_random_ones_are_skipped(old: tuple[Study, Store]) -> None:
    new, store = after(*old)
    run_analytic(new, store, 6)
    replayed = list(replay(new, store.optuna_study.trials, store.facts().after))
    assert len(replayed) == 6
    assert all(each.same for each in replayed)
    without = dataclasses.replace(new, after=None)
    assert [each.number for each in replay(without, store.optuna_study.trials) if not each.same] == [1, 2, 3, 4, 5]


def test_the_head_start_is_worth_something() -> None:
    """On the analytic curves: the mean of trials 1 to 4 is better than that of random ones, and so is the best."""
    study = make_study("cache", sampler=gp())
    store = memory_store(study)
    run_analytic(study, store, 30)
    begun = {}
    for seed in range(5):
        new, informed = after(study, store)
        new = dataclasses.replace(new, seed=10 + seed)
        run_analytic(new, informed, 5)
        plain = dataclasses.replace(new, after=None)
        uninformed = memory_store(plain)
        run_analytic(plain, uninformed, 5)
        begun[seed] = [sum(ceiling(trial.params) for trial in each.trials()[1:]) / 4 for each in (informed, uninformed)]
    assert all(informed > uninformed for informed, uninformed in begun.values()), begun


def test_values_enter_by_rank() -> None:
    study = make_study("cache")
    store = memory_store(study)
    run_analytic(study, store, 5)
    history = store.optuna_study.trials
    kept = earlier_trials(study, history, study.definition())
    halved = [{**each, "value": each["value"] / 2} for each in kept]  # other data: another scale
    shown, again = (with_earlier(study, each, history) for each in (kept, halved))
    assert [trial.value for trial in shown] == [trial.value for trial in again]
    assert [trial.number for trial in shown] == [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4]
    assert [trial.params for trial in shown[:5]] == [trial.params for trial in shown[5:]]
    assert [trial.value for trial in shown[:5]] == [trial.value for trial in shown[5:]]
    best = max(history, key=lambda trial: trial.value or 0.0)
    assert max(shown[:5], key=lambda trial: trial.value or 0.0).params == best.params


def test_earlier_trials_that_diverged_are_never_good_ones_of_tpe() -> None:
    study = dataclasses.replace(make_study("cache", sampler=tpe()), after="old", name="new")
    earlier: list[dict[str, Any]] = [{"params": encode(study.space, study.train), "value": None} for _ in range(10)]
    sampler: Any = _sampler(study, 0, with_earlier(study, earlier, []))
    assert sampler._gamma(10) == 0
    earlier[0]["value"] = 0.5
    sampler = _sampler(study, 0, with_earlier(study, earlier, []))
    assert sampler._gamma(10) == 1


def test_every_trial_takes_the_place_of_an_earlier_one() -> None:
    study = make_study("cache", sampler=Sampler("RandomSampler"))
    store = memory_store(study)
    run_analytic(study, store, MOST_EARLIER + 1)
    history = store.optuna_study.trials
    kept = earlier_trials(study, history, study.definition())
    for own in (0, 1, 20, MOST_EARLIER - 1):
        shown = with_earlier(study, kept, history[:own])
        assert len(shown) == MOST_EARLIER
        best = max(shown[: MOST_EARLIER - own], key=lambda trial: trial.value or 0.0)
        assert best.params == max(history, key=lambda trial: trial.value or 0.0).params
    assert with_earlier(study, kept, history[:MOST_EARLIER]) == history[:MOST_EARLIER]


def test_trials_of_another_space_are_completed_from_the_definition_and_those_outside_are_left_out() -> None:
    old = make_study("cache")
    store = memory_store(old)
    run_analytic(old, store, COUNT)
    params = {trial.params["optim.base_lr"] for trial in store.trials() if trial.params["optim.base_lr"] <= 1e-3}
    space = {"optim.base_lr": Float(1e-4, 1e-3, log=True), "batch_size": Choice((8, 16)), "epochs": Choice((2, 3))}
    new = dataclasses.replace(old, name="new", after="tiny", space=space)
    kept = earlier_trials(new, store.optuna_study.trials, old.definition())
    assert {each["params"]["optim.base_lr"] for each in kept} == params
    assert {(each["params"]["batch_size"], each["params"]["epochs"]) for each in kept} == {(16, 2)}
    train = dataclasses.replace(old.train, batch_size=8)
    other = dataclasses.replace(new, space={**space, "batch_size": Choice((4, 8))}, train=train)
    assert earlier_trials(other, store.optuna_study.trials, old.definition()) == []


def test_after_is_part_of_the_definition_if_there_is_one() -> None:
    assert make_study("cache", after="old").definition()["after"] == "old"
    assert "after" not in make_study("cache").definition()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"after": "tiny"}, "after is the name of an earlier study, not 'tiny'"),
        ({"after": " "}, "after is the name of an earlier study"),
        ({"after": 3}, "after must be"),
        (
            {"after": "old", "sampler": grid(), "space": {"optim.base_lr": Choice((1e-3, 1e-2))}, "trials": 2},
            "A grid has its own order; remove after",
        ),
    ],
)
def test_a_wrong_after_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_study("cache", **changes)


# -- with files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path, image_cache: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study of milliseconds that has three trials."""
    monkeypatch.chdir(tmp_path)
    study_in(tmp_path, image_cache)
    harness.run("tiny", trials=3, progress=False)
    return tmp_path


def test_a_branch_goes_on_after_a_change_that_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--study", "tiny", "--trials", "4", "--set", "batch_size=8"]) == 2
    assert "another definition (batch_size was 16, is 8)" in capsys.readouterr().err
    assert main(["branch", "tiny", "wide", "--set", "batch_size=8"]) == 0
    file = begun / "studies" / "wide.py"
    assert capsys.readouterr().out == (
        f"batch_size was 16, is 8\nWrote {file}. Run it with: python -m harness run --study wide\n"
    )
    assert main(["run", "--study", "wide", "--trials", "3"]) == 0
    capsys.readouterr()
    assert main(["show", "wide"]) == 0
    assert "The sampler's history begins with 3 of the 3 trials of study tiny." in capsys.readouterr().out
    result = harness.open("wide")
    assert result.replay()
    assert result.doctor()
    assert result.overview()["after"]["study"] == "tiny"


def test_the_old_study_is_read_once(begun: Path) -> None:
    main(["branch", "tiny", "wide"])
    harness.run("wide", trials=2, progress=False)
    harness.run("tiny", trials=4, progress=False)  # goes on
    (begun / "studies" / "tiny.db").rename(begun / "elsewhere.db")
    result = harness.run("wide", trials=3, progress=False)
    assert result.overview()["after"]["of"] == 3
    assert result.replay()


def test_a_start_that_was_interrupted_reads_it_again(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["branch", "tiny", "wide"])
    write = Store.set_attribute

    def interrupted(store: Store, name: str, value: Any) -> None:
        if name == "after":
            raise KeyboardInterrupt
        write(store, name, value)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "set_attribute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harness.run("wide", trials=1, progress=False)
    harness.run("tiny", trials=4, progress=False)
    with pytest.raises(InputError, match="the trials of study 'tiny' differ from those at the start"):
        harness.run("wide", trials=1, progress=False)
    assert harness.run("wide", trials=2, progress=False, fresh=True).replay()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "tiny"], "tiny.py exists; give another NEW, or remove it."),
        (["tiny", "a b"], "NEW 'a b': a study's name has letters, digits, - and _ only, and no - first."),
        (["none", "wide"], "There is no study 'none'"),
        (["tiny", "wide", "--set", "batch_size=x"], "batch_size must be"),
        (["tiny", "wide", "--set", "sampler=grid"], "sampler"),
    ],
)
def test_a_wrong_branch_writes_nothing(
    begun: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((begun / "studies").iterdir())
    assert main(["branch", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted((begun / "studies").iterdir()) == before


def test_a_branch_of_trials_that_it_would_not_find_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The new study would silently take those of tiny.db."""
    harness.run("tiny", trials=1, progress=False, fresh=True)
    (moved,) = (begun / "studies").glob("tiny.*.db")
    assert main(["branch", "tiny", "wide", "--storage", f"sqlite:///{moved}"]) == 2
    assert "would not find the trials of sqlite:///" in capsys.readouterr().err
    assert not (begun / "studies" / "wide.py").exists()
    (begun / "old").mkdir()
    moved.rename(begun / "old" / "tiny.db")
    assert main(["branch", "tiny", "wide", "--storage", f"sqlite:///{begun}/old/tiny.db"]) == 0
    assert f"--storage sqlite:///{begun}/old/wide.db" in capsys.readouterr().out


def test_a_branch_of_a_study_that_has_not_begun(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (begun / "studies" / "tiny.py").read_text()
    (begun / "studies" / "new.py").write_text(text + "STUDY = STUDY.branch('new')\n")
    assert main(["branch", "new", "newer"]) == 2
    assert "Study 'new' has no results yet" in capsys.readouterr().err


def test_an_earlier_study_that_is_not_there(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["branch", "tiny", "wide"])
    (begun / "studies" / "tiny.db").unlink()
    assert main(["run", "--study", "wide", "--trials", "2"]) == 2
    assert "after: there is no study 'tiny' in" in capsys.readouterr().err
    assert not (begun / "studies" / "wide.db").exists()


@pytest.mark.parametrize(
    ("setting", "space", "said"),
    [
        (
            "optim.base_lr=1e-4",
            "'optim.base_lr': Float(1e-4, 1.01e-4)",
            "none of the 3 trials of 'tiny' fits this study's space; remove after.",
        ),
        (
            "batch_size=16",
            "'batch_size': Choice((8, 16))",
            "'tiny' searched none of this study's hyperparameters; remove after.",
        ),
    ],
)
def test_an_earlier_study_outside_of_the_space(
    begun: Path, capsys: pytest.CaptureFixture[str], setting: str, space: str, said: str
) -> None:
    text = (begun / "studies" / "tiny.py").read_text()
    (begun / "studies" / "new.py").write_text(
        text
        + "import dataclasses\nfrom harness import Choice, Float\n"
        + f"STUDY = dataclasses.replace(STUDY.branch('new', {setting!r}), space={{{space}}})\n"
    )
    assert main(["run", "--study", "new", "--trials", "2"]) == 2
    assert f"after: {said}" in capsys.readouterr().err
    assert not (begun / "studies" / "new.db").exists()


def test_a_branch_from_a_database_elsewhere_says_where_it_goes_on(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (begun / "big").mkdir()
    (begun / "studies" / "tiny.db").rename(begun / "big" / "tiny.db")
    assert main(["branch", "tiny", "wide", "--storage", f"sqlite:///{begun}/big/tiny.db"]) == 0
    url = f"sqlite:///{begun}/big/wide.db"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" --study wide --storage {url}")
    with read_earlier("tiny", url, begun / "studies") as store:
        assert store.url == f"sqlite:///{begun}/big/tiny.db"


def test_a_branch_of_a_file_that_computes_its_name_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = begun / "studies" / "tiny.py"
    lines = "import dataclasses, pathlib\nSTUDY = dataclasses.replace(STUDY, name=pathlib.Path(__file__).stem)\n"
    file.write_text(f"{file.read_text()}\n{lines}")
    assert main(["branch", "tiny", "wide"]) == 2
    assert "after is the name of an earlier study, not 'wide'" in capsys.readouterr().err
    assert not (begun / "studies" / "wide.py").exists()


def test_a_branch_of_a_file_in_another_encoding(begun: Path) -> None:
    file = begun / "studies" / "tiny.py"
    file.write_bytes(b"# -*- coding: latin-1 -*-\n# L\xf6wenzahn\n" + file.read_bytes())
    assert main(["branch", "tiny", "wide"]) == 0
    assert find("wide").study.after == "tiny"
