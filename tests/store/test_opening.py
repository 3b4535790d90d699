"""What continues a study, and where its images are looked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.base.errors import InputError
from harness.config.find import Found
from harness.config.space import Choice
from harness.config.study import Study
from harness.datasets.image_folder import ImageFolder
from harness.search.samplers import grid
from harness.store.opening import as_begun, check_definition, located, open_store, read_store
from harness.store.store import Store
from tests.small import small_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return small_study(tmp_path / "cache")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def redefined(study: Study, url: str, **changes: Any) -> None:
    """Keep a definition with these fields, or where they are None without them, as another version may have."""
    with open_store(study, url) as store:
        fields = {**study.definition(), **changes}
        store.set_attribute("definition", {path: value for path, value in fields.items() if value is not None})


def test_a_field_that_came_later_changes_nothing_while_it_has_its_default(study: Study, url: str) -> None:
    redefined(study, url, **{"optim.clip_norm": None, "final.fit_on": None})
    with read_store(study.name, url) as store:
        assert "optim.clip_norm" not in (store.facts().definition or {})
        assert as_begun(study, store) == study
        check_definition(study, store, None)
        other = study.with_settings(["augment.flip=0.25"])
        with pytest.raises(InputError, match=r"augment\.flip was 0\.5, is 0\.25"):
            check_definition(other, store, None)


def test_a_field_that_came_later_with_another_value_is_refused(study: Study, url: str) -> None:
    redefined(study, url, **{"final.fit_on": None})
    with read_store(study.name, url) as store:
        other = dataclasses.replace(study, final=dataclasses.replace(study.final, fit_on="train"))
        with pytest.raises(InputError, match=r"final\.fit_on is 'train', and was not a field"):
            check_definition(other, store, None)


def test_a_grid_whose_space_is_in_another_order_is_refused(study: Study, url: str) -> None:
    space = {"optim.base_lr": Choice((9e-4, 1e-3)), "backbone.dropout": Choice((0.0, 0.2))}
    train = study.with_settings(["optim.base_lr=0.001", "backbone.dropout=0.2"]).train
    study = dataclasses.replace(study, train=train, sampler=grid(), space=space, trials=4)
    other = dataclasses.replace(study, space=dict(reversed(space.items())))
    redefined(study, url)
    with read_store(study.name, url) as store:
        check_definition(study, store, None)
        with pytest.raises(InputError, match=r"in another order \(optim\.base_lr, backbone\.dropout\), in which"):
            check_definition(other, store, None)
        plain = dataclasses.replace(other, sampler=study.sampler)
        assert plain.definition() == study.definition()


def test_a_field_that_is_gone_is_refused(study: Study, url: str) -> None:
    redefined(study, url, **{"optim.lookahead": 3})
    with read_store(study.name, url) as store:
        refused = pytest.raises(InputError, match=r"optim\.lookahead was 3, and is no longer a field")
        with refused:
            check_definition(study, store, None)


def test_images_are_looked_for_where_the_last_start_found_them(study: Study, url: str, tmp_path: Path) -> None:
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, data=ImageFolder()))
    found = Found(study=study, file=tmp_path / "studies" / "tiny.py", home=tmp_path)

    def root(store: Store, data_root: str | None = None) -> str:
        data: Any = located(found, store, data_root).train.data
        return str(data.root)

    kept, given = tmp_path / "kept", tmp_path / "given"
    with open_store(study, url) as store:
        assert root(store) == str(tmp_path / "data")
        store.set_attribute("data_root", str(kept))
        assert root(store) == str(tmp_path / "data")  # the study was moved, and that folder is not there
        kept.mkdir()
        assert root(store) == str(kept)
        assert root(store, str(given)) == str(given)


def test_a_study_that_has_not_begun_is_named_with_the_command_that_begins_it(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match=r"run it with 'python run_study\.py --study tiny'")
    with refused, read_store("tiny", f"sqlite:///{tmp_path}/none.db"):
        raise AssertionError
