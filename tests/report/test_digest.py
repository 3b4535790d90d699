"""The digest: equal for equal studies, wherever and however long they ran, and another for any other result."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness.cli.commands import main
from harness.config.events import Completed, Diverged, Pruned
from harness.config.study import Study
from harness.final.test_set import summary
from harness.report.overview import digest
from harness.search.pruners import asha
from harness.store.opening import open_store, read_store
from harness.store.store import Store
from tests.analytic import NOT_COMPARED, Died, epoch_result, fail_trial, memory_store, run_analytic
from tests.conftest import make_study
from tests.small import study_in


@pytest.fixture
def study() -> Study:
    return make_study("cache", pruner=asha(min_epochs=2), trials=8)


def final_result() -> dict[str, Any]:
    each = {"total": 100, "accuracy": 0.9, "loss": 0.3, "epochs": [epoch_result(1, 0.9).to_dict()]}
    per_seed = [each | {"seed": number, "correct": 90 + number, "weights": f"{number}" * 64} for number in range(2)]
    return summary(per_seed) | {"trial": 0, "fit_on": "train+val", "test_openings": 1} | NOT_COMPARED


def fill(study: Study, store: Store, seconds: float = 1.0) -> Store:
    """Analytic trials, one of every other end, and a final result."""
    run_analytic(study, store, 4)
    for outcome in (Completed(value=0.4), Pruned(epoch=1), Diverged(epoch=2)):
        asked = store.ask(study)
        store.report(asked, 1, 0.4)
        store.tell(asked, outcome, [epoch_result(1, 0.4)], seconds, [{"torch": str(seconds)}])
    fail_trial(study, store)
    store.set_attribute("final", final_result())
    return store


def test_it_is_a_sha256_in_hexadecimal(study: Study) -> None:
    found = digest(memory_store(study))
    assert len(found) == 64
    assert int(found, 16) >= 0


def test_equal_studies_have_equal_digests_whatever_their_times_places_and_environments(
    study: Study, tmp_path: Path
) -> None:
    expected = digest(fill(study, memory_store(study)))
    with open_store(study, f"sqlite:///{tmp_path}/a.db") as store:
        store.set_attribute("runtime", {"device": "another"})
        assert digest(fill(study, store, seconds=99.0)) == expected
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a.db", tmp_path / "elsewhere" / "b.db")
    assert digest_of(tmp_path / "elsewhere" / "b.db") == expected


@pytest.mark.parametrize("stop", [(2, 0, "ask"), (2, 1, "report"), (2, 1, "prune"), (2, 0, "tell")])
def test_a_study_that_died_and_went_on_has_the_digest_of_one_that_did_not(
    study: Study, stop: tuple[int, int, str]
) -> None:
    whole, other = memory_store(study), memory_store(study)
    run_analytic(study, whole, 5)
    with pytest.raises(Died):
        run_analytic(study, other, 5, stop_after=stop)
    assert digest(other) != digest(whole)
    run_analytic(study, other, 5)
    assert digest(other) == digest(whole)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study's file and its digest."""
    folder = tmp_path_factory.mktemp("filled")
    study = make_study("cache", pruner=asha(min_epochs=2), trials=8)
    with open_store(study, f"sqlite:///{folder}/a.db") as store:
        return folder / "a.db", digest(fill(study, store))


def digest_of(file: Path) -> str:
    with read_store("tiny", f"sqlite:///{file}") as store:
        return digest(store)


FIRST = "WHERE trial_id = (SELECT MIN(trial_id) FROM trials)"


@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE trial_params SET param_value = param_value * 1.0000000001 {FIRST} AND param_name = 'optim.base_lr'",
        f"UPDATE trial_params SET param_value = 1 - param_value {FIRST} AND param_name = 'backbone.hidden'",
        f"UPDATE trials SET state = 'PRUNED' {FIRST}",
        f"UPDATE trial_values SET value = value + 1e-9 {FIRST}",
        f"UPDATE trial_intermediate_values SET intermediate_value = intermediate_value + 1e-9 {FIRST} AND step = 2",
        f"DELETE FROM trial_intermediate_values {FIRST} AND step = 2",
        "UPDATE trial_user_attributes SET value_json = REPLACE(value_json, 'diverged', 'pruned') WHERE key = 'outcome'",
    ],
)
def test_any_other_result_of_a_trial_gives_another_digest(
    filled: tuple[Path, str], tmp_path: Path, statement: str
) -> None:
    shutil.copy(filled[0], tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        assert database.execute(statement).rowcount >= 1
        database.commit()
    assert digest_of(tmp_path / "a.db") != filled[1]


@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE trials SET datetime_start = '2000-01-01 00:00:00', datetime_complete = '2001-01-01 00:00:00' {FIRST}",
        "UPDATE trial_user_attributes SET value_json = '1e6' WHERE key = 'seconds'",
        "UPDATE trial_user_attributes SET value_json = '[]' WHERE key = 'environments'",
        "UPDATE study_user_attributes SET value_json = '\"another\"' WHERE key = 'uid'",
    ],
)
def test_times_environments_and_the_uid_are_no_part_of_it(
    filled: tuple[Path, str], tmp_path: Path, statement: str
) -> None:
    shutil.copy(filled[0], tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        assert database.execute(statement).rowcount >= 1
        database.commit()
    assert digest_of(tmp_path / "a.db") == filled[1]


def set_in(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(final: dict[str, Any]) -> None:
        owner: Any = final
        for each in path[:-1]:
            owner = owner[each]
        owner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (set_in(("trial",), 1), True),
        (set_in(("per_seed", 1, "correct"), 92), True),
        (set_in(("per_seed", 1, "total"), 101), True),
        (set_in(("per_seed", 0, "weights"), "f" * 64), True),
        (set_in(("per_seed", 1, "seed"), 7), True),
        (lambda final: final["per_seed"].reverse(), True),
        (lambda final: final["per_seed"].pop(), True),
        # Each opening of the test set counts, but it changes no result.
        (set_in(("test_openings",), 2), False),
        (set_in(("per_seed", 0, "epochs", 0, "seconds"), 9e9), False),
    ],
)
def test_any_other_final_result_gives_another_digest(
    study: Study, change: Callable[[dict[str, Any]], None], part: bool
) -> None:
    store = memory_store(study)
    run_analytic(study, store, 2)
    store.set_attribute("final", final_result())
    before, changed = digest(store), final_result()
    change(changed)
    store.set_attribute("final", changed)
    assert (digest(store) != before) is part


def test_one_trial_more_or_under_way_gives_another_digest(study: Study) -> None:
    store = memory_store(study)
    seen = {digest(store)}
    run_analytic(study, store, 1)
    seen.add(digest(store))
    store.report(store.ask(study), 1, 0.3)
    seen.add(digest(store))
    assert len(seen) == 3


def test_show_prints_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, url = study_in(tmp_path, tmp_path / "cache")
    with open_store(study, url) as store:
        run_analytic(study, store, 2)
        expected = digest(store)
    assert main(["show", str(tmp_path / "studies" / "tiny.py"), "--digest"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
