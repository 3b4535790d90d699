"""A study is data that checks itself, knows what identifies it, and can be changed by `--set`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from harness.base.errors import InputError
from harness.config.space import Choice, Float, Int, extremes, leaves, replace
from harness.config.study import Study
from harness.config.train import FinalConfig, TrainConfig
from harness.datasets.image_folder import ImageFolder
from harness.models.maxvit import MaxViTT
from harness.models.module import Module
from harness.search.pruners import asha
from harness.search.samplers import tpe
from tests.conftest import make_study
from tests.contracts.test_backbones import net

STUDY = make_study("cache")
# The same with a frozen backbone and without weight decay, for what goes with no other.
FROZEN = make_study(
    "cache",
    train=replace(replace(STUDY.train, "optim.depth_lr_mult", 0.0), "optim.weight_decay", 0.0),
    space={path: each for path, each in STUDY.space.items() if path != "optim.depth_lr_mult"},
)

# Another valid value for every leaf of the base that decides results; a leaf that is not here fails the test below.
OTHER: dict[str, Any] = {
    "data.species": "pretraining",
    "data.train_per_class": 3,
    "data.val_per_class": 3,
    "data.test_per_class": 3,
    "data.seed": 1,
    "data.image_size": 32,
    "data.stored_size": 80,
    "data.limit": 8,
    "backbone.pretrained": True,
    "backbone.hidden": (16, 8),
    "backbone.dropout": 0.3,
    "backbone.weights": "other.pth",
    "class_weight": 0.5,
    "backbone.stochastic_depth": 0.1,
    "backbone.bn_momentum": 0.01,
    "augment.crop_scale": (0.7, 1.0),
    "augment.crop_ratio": (1.0, 1.0),
    "augment.flip": 0.0,
    "augment.rotation_degrees": 5.0,
    "augment.brightness": 0.5,
    "augment.contrast": 0.5,
    "augment.saturation": 0.5,
    "augment.hue": 0.1,
    "augment.trivial_augment": True,
    "augment.random_erasing": 0.5,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "augment.early_size": 32,
    "augment.tail": 0.5,
    "optim.name": "adam",
    "optim.base_lr": 2e-3,
    "optim.depth_lr_mult": 0.7,
    "optim.depth_by": "layer",
    "optim.head_epochs": 1,
    "optim.frozen_depths": 1,
    "optim.momentum": 0.8,
    "optim.lr_floor": 0.1,
    "optim.weight_decay": 0.01,
    "optim.schedule": "constant",
    "optim.warmup_epochs": 0.5,
    "optim.clip_norm": None,
    "runtime.precision": "bf16",
    "runtime.channels_last": "on",
    "runtime.compile": "on",
    "runtime.deterministic": False,
    "batch_size": 8,
    "epochs": 3,
    "label_smoothing": 0.0,
    "ema": 0.1,
    "feature_views": 2,
}


# -- --set ---------------------------------------------------------------------------------------------------------


def test_settings_change_the_base_the_final_run_and_the_seed() -> None:
    study = STUDY.with_settings(
        ["optim.weight_decay=0.05", "epochs=7", "backbone.hidden=16,8", "final.seeds=5", "final.fit_on=train", "seed=3"]
    )
    assert study.train.optim.weight_decay == 0.05
    assert study.train.epochs == 7
    assert study.train.backbone.hidden == (16, 8)  # type: ignore[attr-defined]
    assert study.final == dataclasses.replace(STUDY.final, seeds=5, fit_on="train")
    assert study.seed == 3
    assert STUDY.train.epochs == 2


def test_the_last_of_two_settings_wins() -> None:
    assert STUDY.with_settings(["epochs=7", "epochs=9"]).train.epochs == 9


@pytest.mark.parametrize(
    "settings",
    [
        ["optim.warmup_epochs=5", "epochs=6"],
        ["optim.name=adam", "optim.weight_decay=0"],
        ["data.image_size=128", "data.stored_size=144"],
    ],
)
def test_settings_that_need_each_other_may_come_in_any_order(settings: list[str]) -> None:
    one, other = STUDY.with_settings(settings), STUDY.with_settings(settings[::-1])
    assert one == other != STUDY


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.warmup_epochs=2.5"], ["optim.warmup_epochs", "2.5", "epochs", "2;"]),
        (["epochs=1", "optim.warmup_epochs=1.01"], ["optim.warmup_epochs", "1.01", "choose a shorter warm-up"]),
        (["optim.name=adam"], ["optim.name adam", "0.02", "optim.weight_decay to 0"]),
        (["optim.clip_norm=Infinity"], ["optim.clip_norm", "finite, or null"]),
        (["optim.clip_norm=NaN"], ["optim.clip_norm"]),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        STUDY.with_settings(settings)
    for word in ["--set ", *words]:
        assert word in str(caught.value)


def test_a_warm_up_as_long_as_the_training_is_allowed() -> None:
    assert STUDY.with_settings(["epochs=1", "optim.warmup_epochs=1"]).train.epochs == 1


@pytest.mark.parametrize(
    ("space", "refused"),
    [
        ({"epochs": Int(1, 8)}, False),  # the base warms up for one epoch
        ({"optim.warmup_epochs": Float(0.0, 2.0)}, False),
        ({"optim.warmup_epochs": Float(0.0, 3.0)}, True),
        ({"epochs": Int(2, 8), "optim.warmup_epochs": Float(0.0, 2.0)}, False),
        ({"epochs": Int(1, 8), "optim.warmup_epochs": Float(0.0, 2.0)}, True),  # each end fits the base, not the other
        ({"optim.warmup_epochs": Choice((1.0, 1.5)), "epochs": Choice((1, 2))}, True),
        ({"optim.weight_decay": Float(0.0, 0.1), "optim.name": Choice(("adamw", "adam"))}, True),
        ({"data.stored_size": Choice((72, 144)), "data.image_size": Choice((64, 128))}, True),
    ],
)
def test_what_a_space_may_combine_is_checked_before_anything_runs(space: Any, refused: bool) -> None:
    if not refused:
        study = make_study("cache", space=space)
        ends = [[(path, end) for end in extremes(each)] for path, each in space.items()]
        for params in itertools.product(*ends):
            study.config(dict(params))
        return
    with pytest.raises(InputError, match=r"may become|may combine|must not be smaller"):
        make_study("cache", space=space)


def test_no_settings_change_nothing() -> None:
    assert STUDY.with_settings([]) == STUDY


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.lr=1", ["--set optim.lr=1", "no field 'optim.lr'", "optim.base_lr", "backbone.dropout"]),
        ("final.seed=1", ["--set final.seed=1", "seeds", "fit_on"]),
        ("final.=1", ["seeds"]),
        ("epochs=many", ["--set epochs=many", "epochs must be a whole number", "'many'"]),
        ("epochs", ["no value", "PATH=VALUE"]),
        ("", ["no value"]),
        ("=3", ["no field ''"]),
        ("seed=abc", ["seed must be a whole number"]),
        ("final.seeds=0", ["final.seeds must be at least 1"]),
        ("optim.base_lr=-1", ["optim.base_lr must be greater than 0"]),
        ("backbone.dropout=1.5", ["backbone.dropout must lie in"]),
        ("trials=4", ["no field 'trials'"]),
        ("data.type=Flowers102", ["no field 'data.type'"]),
    ],
)
def test_a_wrong_setting_says_what_is_right(setting: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        STUDY.with_settings([setting])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_outside_of_the_search_range_is_refused_for_trial_0_is_the_base() -> None:
    with pytest.raises(InputError, match="outside of its search range"):
        STUDY.with_settings(["optim.base_lr=0.5"])


# -- places --------------------------------------------------------------------------------------------------------


def with_folder(**changes: Any) -> Study:
    data = ImageFolder(**{"image_size": 64, "stored_size": 72, **changes})
    return dataclasses.replace(STUDY, train=dataclasses.replace(STUDY.train, data=data))


def test_located_takes_relative_folders_from_home(tmp_path: Path) -> None:
    data: Any = with_folder(root="pictures", cache="kept").located(tmp_path, None, None).train.data
    assert data.root == str(tmp_path / "pictures")
    assert data.cache == str(tmp_path / "kept")


def test_located_takes_the_data_root_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data: Any = with_folder().located(tmp_path / "home", "mine", None).train.data
    assert data.root == str(tmp_path / "mine")


def test_located_leaves_absolute_folders_alone(tmp_path: Path) -> None:
    data: Any = with_folder(root="/pictures", cache="/kept").located(tmp_path, None, None).train.data
    assert (data.root, data.cache) == ("/pictures", "/kept")


def test_located_sets_the_device_only_if_one_is_given(tmp_path: Path) -> None:
    assert STUDY.located(tmp_path, None, None).train.runtime.device == "cpu"
    assert STUDY.located(tmp_path, None, "cuda:1").train.runtime.device == "cuda:1"


def test_a_data_root_for_drawn_flowers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Garden reads no folder; leave the option out"):
        STUDY.located(tmp_path, str(tmp_path), None)


def test_where_a_study_runs_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    study = with_folder()
    assert study.definition() == study.located(tmp_path, "elsewhere", "cuda:1").definition()


# -- definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [STUDY, make_study("c", pruner=asha(min_epochs=3)), with_folder()])
def test_a_definition_survives_json(study: Study) -> None:
    assert json.loads(json.dumps(study.definition())) == study.definition()


def test_a_definition_leaves_out_trials_and_places() -> None:
    assert dataclasses.replace(STUDY, trials=99).definition() == STUDY.definition()
    assert not {"trials", "data.cache", "data.root", "runtime.device"} & set(STUDY.definition())
    for path, value in (("data.cache", "elsewhere"), ("runtime.device", "cuda")):
        moved = dataclasses.replace(STUDY, train=replace(STUDY.train, path, value))
        assert moved.definition() == STUDY.definition()


def test_every_leaf_that_decides_results_has_another_value_in_this_test() -> None:
    deciding = {path for path, _ in leaves(STUDY.train, identity_only=True) if not path.endswith(".type")}
    assert deciding == set(OTHER)


@pytest.mark.parametrize("path", OTHER)
def test_a_definition_changes_with_every_leaf_of_the_base(path: str) -> None:
    changed = dataclasses.replace(FROZEN, train=replace(FROZEN.train, path, OTHER[path])).definition()
    assert {name for name in changed if changed[name] != FROZEN.definition()[name]} == {path}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"sampler": tpe(n_startup_trials=3)},
        {"pruner": asha(min_epochs=1)},
        {"final": FinalConfig(seeds=2)},
        {"final": FinalConfig(seeds=1, fit_on="train")},
        {"space": {**STUDY.space, "backbone.dropout": Float(0.0, 0.5)}},
        {"space": {**STUDY.space, "batch_size": Choice((16, 32))}},
        {"space": {"optim.base_lr": STUDY.space["optim.base_lr"]}},
    ],
)
def test_a_definition_changes_with_space_sampler_pruner_final_and_seed(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(STUDY, **changes).definition() != STUDY.definition()


def test_a_definition_changes_with_the_class_of_the_data_and_of_the_backbone() -> None:
    assert with_folder().definition()["data.type"] == "ImageFolder"
    other = dataclasses.replace(
        STUDY, train=dataclasses.replace(STUDY.train, backbone=MaxViTT(pretrained=False, hidden=(16,)))
    )
    assert other.definition()["backbone.type"] == "MaxViTT"


# -- a study checks itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "Flowers-102_b", "7"])
def test_a_plain_name_is_a_study_name(name: str) -> None:
    assert make_study("cache", name=name).name == name


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", "a.b", "-_-", "x\n", 'q"'])
def test_a_name_that_would_not_make_a_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="letters, digits"):
        make_study("cache", name=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, "trials must be at least 1"),
        ({"space": {}}, "space is empty"),
        ({"space": {"optim.lr": Float(0.0, 1.0)}}, "no field 'optim.lr'.*optim.base_lr"),
        ({"space": {"optim.base_lr": Float(0.5, 1.0)}}, "outside of its search range"),
    ],
)
def test_a_study_that_cannot_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_study("cache", **changes)


def test_a_configuration_of_stored_parameters_differs_from_the_base_in_them_only() -> None:
    params = {
        "backbone.dropout": 0.5,
        "backbone.hidden": "16-8",
        "optim.base_lr": 5e-3,
        "optim.depth_lr_mult": 0.0,
    }
    config: TrainConfig = STUDY.config(params)
    changed = {path for path, value in leaves(config) if value != dict(leaves(STUDY.train))[path]}
    assert changed == set(params)
    assert config.backbone.hidden == (16, 8)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "dimension", "said"),
    [
        ("runtime.precision", Choice(("auto", "fp32")), "runtime.precision is decided once per study"),
        ("data.cache", Choice(("data/cache", "other")), "data.cache is decided once per study"),
        ("data.limit", Choice((None, 32)), "data.limit cannot be searched: trials would be measured on other images"),
    ],
)
def test_what_no_trial_has_for_itself_cannot_be_searched(path: str, dimension: Choice, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_study("data/cache", space={path: dimension})


def test_whole_numbers_of_a_field_of_real_ones_may_be_searched() -> None:
    study = make_study("cache", space={"augment.rotation_degrees": Int(0, 45)})
    assert study.params({"augment.rotation_degrees": 15})["augment.rotation_degrees"] == 15
    assert study.with_settings(["augment.rotation_degrees=20"]).train.augment.rotation_degrees == 20


def test_a_field_without_a_type_for_text_is_left_to_the_study_file() -> None:
    backbone = Module(build=net, hidden=(8,))
    study = make_study("cache", space={"epochs": Int(1, 2)})
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, backbone=backbone))
    with pytest.raises(InputError, match=r"backbone\.function cannot be set here; change it in the study file"):
        study.with_settings(["backbone.function=x"])
