"""Paths and search spaces: every change of a configuration goes through one checked function."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.base.errors import InputError
from harness.config.space import (
    Choice,
    Dimension,
    Float,
    Int,
    apply,
    check,
    encode,
    get,
    label,
    leaves,
    parse,
    paths,
    replace,
)
from harness.config.train import AugmentConfig, FinalConfig, OptimConfig, TrainConfig
from harness.models.maxvit import TinyMaxViT
from harness.models.torchvision import Torchvision
from tests.conftest import make_study

BASE: TrainConfig = make_study("cache").train

SPACE: dict[str, Dimension] = {
    "backbone.dropout": Float(0.0, 0.6),
    "backbone.hidden": Choice(((16,), (16, 8), (), (1024, 512))),
    "optim.base_lr": Float(1e-4, 1e-2, log=True),
    "batch_size": Int(8, 64, log=True),
    "optim.schedule": Choice(("cosine", "constant")),
    "optim.clip_norm": Choice((None, 1.0, 5.0)),
}

# Paths with values that fit them, for the laws of `replace`.
FITTING = st.one_of(
    st.tuples(st.just("optim.base_lr"), st.floats(1e-6, 1.0)),
    st.tuples(st.just("optim.depth_lr_mult"), st.floats(0.0, 1.0)),
    st.tuples(st.just("backbone.dropout"), st.floats(0.0, 0.99)),
    st.tuples(st.just("backbone.hidden"), st.lists(st.integers(1, 4096), max_size=3).map(tuple)),
    st.tuples(st.just("backbone.pretrained"), st.booleans()),
    st.tuples(st.just("data.limit"), st.one_of(st.none(), st.integers(1, 1000))),
    st.tuples(st.just("augment.crop_scale"), st.tuples(st.floats(0.1, 0.5), st.floats(0.5, 1.0))),
    st.tuples(st.just("optim.schedule"), st.sampled_from(["cosine", "constant"])),
    st.tuples(st.just("runtime.device"), st.text(max_size=8)),
    st.tuples(st.just("epochs"), st.integers(1, 1000)),
)


def configs() -> st.SearchStrategy[TrainConfig]:
    """Random configurations of SPACE."""

    def build(dropout: float, hidden: Any, lr: float, batch: int, schedule: str, clip: float | None) -> TrainConfig:
        config = BASE
        for path, value in zip(SPACE, (dropout, hidden, lr, batch, schedule, clip), strict=True):
            config = replace(config, path, value)
        return config

    return st.builds(
        build,
        st.floats(0.0, 0.6),
        st.sampled_from(SPACE["backbone.hidden"].options),  # type: ignore[union-attr]
        st.floats(1e-4, 1e-2),
        st.integers(8, 64),
        st.sampled_from(["cosine", "constant"]),
        st.sampled_from([None, 1.0, 5.0]),
    )


# -- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["optim.base_rl", "lr", "data.type", "optim.base_lr.x", "", ".", "__class__"])
def test_a_wrong_path_lists_the_right_ones(path: str) -> None:
    for action in (lambda: get(BASE, path), lambda: replace(BASE, path, 1), lambda: parse(BASE, path, "1")):
        with pytest.raises(InputError, match=r"There is no field") as caught:
            action()
        for right in ("optim.base_lr", "backbone.hidden", "data.train_per_class", "epochs"):
            assert right in str(caught.value)


def test_leaves_walk_every_field_in_order_and_name_the_classes() -> None:
    found = dict(leaves(BASE))
    assert found["data.type"] == "Garden"
    assert found["backbone.type"] == "TinyMaxViT"
    assert found["optim.base_lr"] == BASE.optim.base_lr
    assert list(found)[:2] == ["data.type", "data.image_size"]
    assert list(found)[-3:] == ["ema", "feature_views", "checkpoint_seconds"]


def test_leaves_of_the_identity_leave_out_where_things_lie() -> None:
    names = {path for path, _ in leaves(BASE, identity_only=True)}
    assert {path for path, _ in leaves(BASE)} - names == {"data.cache", "runtime.device", "checkpoint_seconds"}


def test_paths_are_exactly_what_get_accepts() -> None:
    for path in paths(BASE):
        get(BASE, path)
    assert not any(path.endswith(".type") for path in paths(BASE))


def test_get_gives_the_value() -> None:
    assert get(BASE, "backbone.hidden") == (16,)
    assert get(BASE, "epochs") == 2


# -- replace -------------------------------------------------------------------------------------------------------


@given(FITTING)
def test_replace_then_get_gives_the_value_and_touches_nothing_else(change: tuple[str, Any]) -> None:
    path, value = change
    changed = replace(BASE, path, value)
    assert get(changed, path) == value
    before, after = dict(leaves(BASE)), dict(leaves(changed))
    assert {name: old for name, old in before.items() if name != path} == {
        name: new for name, new in after.items() if name != path
    }


@given(FITTING, FITTING)
def test_changes_of_two_fields_commute(one: tuple[str, Any], other: tuple[str, Any]) -> None:
    if one[0] != other[0]:
        assert replace(replace(BASE, *one), *other) == replace(replace(BASE, *other), *one)


def test_replace_leaves_the_original_as_it_was() -> None:
    before = dict(leaves(BASE))
    replace(BASE, "optim.base_lr", 0.5)
    assert dict(leaves(BASE)) == before


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("optim.base_lr", "fast", "a number"),
        ("optim.base_lr", "0.1", "a number"),
        ("optim.base_lr", None, "a number"),
        ("optim.base_lr", True, "a number"),
        ("epochs", 2.5, "a whole number"),
        ("epochs", 2.0, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", "3", "a whole number"),
        ("backbone.pretrained", 1, "true or false"),
        ("backbone.pretrained", "true", "true or false"),
        ("backbone.hidden", 512, "a tuple of whole numbers such as (512, 256)"),
        ("backbone.hidden", (512, "wide"), "tuple"),
        ("backbone.hidden", (512.5,), "tuple"),
        ("augment.crop_scale", (0.5,), "a tuple of 2 numbers such as (0.5, 1.0)"),
        ("augment.crop_scale", (0.2, 0.5, 1.0), "tuple"),
        ("optim.name", "lion", "adamw or adam or nadam"),
        ("optim.schedule", 3, "cosine"),
        ("data.limit", "all", "a whole number or null"),
        ("data.cache", 3, "text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(path: str, value: Any, wanted: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(BASE, path, value)
    message = str(caught.value)
    assert message.startswith(f"{path} must be")
    assert wanted in message
    assert repr(value) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim.base_lr", 0.0),
        ("optim.base_lr", -1e-3),
        ("optim.base_lr", float("nan")),
        ("optim.depth_lr_mult", 1.5),
        ("optim.weight_decay", -0.1),
        ("optim.clip_norm", 0.0),
        ("backbone.dropout", 1.0),
        ("backbone.hidden", (0,)),
        ("augment.crop_scale", (0.9, 0.5)),
        ("augment.hue", 0.6),
        ("data.limit", 0),
        ("data.stored_size", 8),
        ("batch_size", 0),
        ("epochs", 0),
        ("label_smoothing", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_path(path: str, value: Any) -> None:
    with pytest.raises(InputError, match=path.replace(".", r"\.")):
        replace(BASE, path, value)


@pytest.mark.parametrize("path", ["optim.weight_decay", "optim.warmup_epochs"])
def test_an_infinite_rate_or_length_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=path.replace(".", r"\.")):
        replace(BASE, path, float("inf"))


def test_a_whole_number_fits_where_a_real_one_is_wanted() -> None:
    assert get(replace(BASE, "optim.base_lr", 1), "optim.base_lr") == 1.0
    assert get(replace(BASE, "augment.crop_scale", (1, 1)), "augment.crop_scale") == (1.0, 1.0)


def test_none_fits_where_none_is_allowed() -> None:
    assert get(replace(BASE, "optim.clip_norm", None), "optim.clip_norm") is None


def test_replace_works_on_other_configurations_too() -> None:
    assert replace(FinalConfig(), "seeds", 5).seeds == 5


# -- what --set means ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("backbone.hidden", "1024,512", (1024, 512)),
        ("backbone.hidden", "(1024, 512)", (1024, 512)),
        ("backbone.hidden", "[1024, 512]", (1024, 512)),
        ("backbone.hidden", "512", (512,)),
        ("backbone.hidden", "[]", ()),
        ("backbone.hidden", "()", ()),
        ("backbone.pretrained", "true", True),
        ("backbone.pretrained", "True", True),
        ("backbone.pretrained", "false", False),
        ("optim.clip_norm", "null", None),
        ("optim.clip_norm", "None", None),
        ("optim.base_lr", "1e-3", 1e-3),
        ("optim.base_lr", ".5", 0.5),
        ("epochs", "5", 5),
        ("optim.schedule", "constant", "constant"),
        ("runtime.device", "cuda:1", "cuda:1"),
        ("data.cache", "some/folder", "some/folder"),
    ],
)
def test_parse_reads_what_people_type(path: str, text: str, value: Any) -> None:
    parsed = parse(BASE, path, text)
    assert parsed == value
    assert type(parsed) is type(value)
    assert get(replace(BASE, path, parsed), path) == value


@given(st.text(max_size=40))
def test_parse_never_breaks_whatever_is_typed(text: str) -> None:
    parse(BASE, "runtime.device", text)


# -- dimensions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Float(1.0, 1.0),
        lambda: Float(0.6, 0.1),
        lambda: Float(0.0, float("inf")),
        lambda: Float(float("nan"), 1.0),
        lambda: Int(5, 5),
        lambda: Int(9, 3),
        lambda: Float(0.0, 1.0, log=True),
        lambda: Float(-1.0, 1.0, log=True),
        lambda: Int(0, 8, log=True),
        lambda: Choice(()),
        lambda: Choice((1, 2, 1)),
        lambda: Choice(((16, 8), (16, 8))),
        lambda: Choice(((), "none")),  # both would be stored as "none"
    ],
)
def test_an_empty_or_ambiguous_dimension_is_refused(make: Any) -> None:
    with pytest.raises(InputError):
        make()


def test_numpys_numbers_are_kept_as_pythons() -> None:
    assert repr(Float(numpy.float64(0.5), numpy.float64(1.0))) == "Float(low=0.5, high=1.0, log=False)"


def test_both_ends_of_a_range_belong_to_it() -> None:
    assert Float(0.0, 1.0).contains(0.0)
    assert Float(0.0, 1.0).contains(1)
    assert Int(1, 4).contains(4)
    assert not Float(0.0, 1.0).contains(1.1)
    assert not Float(0.0, 1.0).contains(float("nan"))
    assert not Float(0.0, 1.0).contains(True)
    assert not Float(0.0, 1.0).contains("0.5")
    assert Int(1, 4).contains(2.0)
    assert not Int(1, 4).contains(2.5)
    assert not Int(0, 1).contains(True)
    assert not Choice((1, 2)).contains(3)


@given(st.lists(st.lists(st.integers(1, 4096), max_size=4).map(tuple), min_size=1, max_size=6, unique=True))
def test_a_label_leads_back_to_its_option(options: list[tuple[int, ...]]) -> None:
    choice = Choice(tuple(options))
    assert [choice.option(each) for each in choice.labels] == options


def test_labels_are_what_a_person_would_write() -> None:
    assert label((1024, 512)) == "1024-512"
    assert label((16,)) == "16"
    assert label(()) == "none"
    assert label(0.5) == 0.5
    assert label(None) is None


# -- a space over a base -------------------------------------------------------------------------------------------


def test_a_space_around_the_base_passes() -> None:
    check(SPACE, BASE)


@pytest.mark.parametrize(
    ("path", "dimension", "words"),
    [
        ("optim.lr", Float(0.0, 1.0), "There is no field 'optim.lr'"),
        ("optim.base_lr", Float(0.1, 0.2), "outside of its search range"),
        ("backbone.hidden", Choice(((1,), (2,))), "outside of its search range"),
        ("backbone.dropout", Float(0.0, 1.5), "backbone.dropout"),
        ("optim.depth_lr_mult", Float(-1.0, 1.0), "optim.depth_lr_mult"),
        ("optim.schedule", Choice(("cosine", "linear")), "optim.schedule must be"),
        ("epochs", Choice((2, "many")), "epochs must be"),
        ("batch_size", Float(8.0, 64.0), "batch_size must be a whole number"),
    ],
)
def test_a_space_that_does_not_fit_the_base_is_refused(path: str, dimension: Dimension, words: str) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        check({path: dimension}, BASE)


@given(configs())
def test_encode_then_apply_gives_the_configuration_back(config: TrainConfig) -> None:
    stored = encode(SPACE, config)
    assert set(stored) == set(SPACE)
    assert all(isinstance(value, str | int | float | None) for value in stored.values())
    assert apply(SPACE, BASE, stored) == config


@given(configs())
def test_apply_changes_the_searched_fields_only(config: TrainConfig) -> None:
    applied = dict(leaves(apply(SPACE, BASE, encode(SPACE, config))))
    assert {path: value for path, value in applied.items() if path not in SPACE} == {
        path: value for path, value in leaves(BASE) if path not in SPACE
    }


# -- whole configurations ----------------------------------------------------------------------------------------------


def test_a_choice_replaces_a_whole_configuration_before_its_fields() -> None:
    one, other = Torchvision("resnet18", pretrained=False), Torchvision("resnet34", pretrained=False, hidden=(8,))
    base = dataclasses.replace(BASE, backbone=one)
    space: dict[str, Dimension] = {"backbone.dropout": Float(0.0, 0.6), "backbone": Choice((one, other))}
    check(space, base)
    labels = ("Torchvision('resnet18', pretrained=False)", "Torchvision('resnet34', pretrained=False, hidden=(8,))")
    assert space["backbone"].labels == labels  # type: ignore[union-attr]
    assert encode(space, base) == {"backbone.dropout": 0.2, "backbone": labels[0]}
    chosen = apply(space, base, {"backbone.dropout": 0.5, "backbone": labels[1]})
    assert chosen == dataclasses.replace(base, backbone=dataclasses.replace(other, dropout=0.5))
    assert repr(space["backbone"]) == f"Choice(options=({', '.join(labels)}))"


def test_only_a_configuration_replaces_a_configuration() -> None:
    for action in (lambda: replace(BASE, "optim", 1), lambda: parse(BASE, "optim", "1")):
        with pytest.raises(InputError, match="There is no field 'optim'"):
            action()


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"backbone": lambda: Choice((TinyMaxViT(), Torchvision("resnet18")))}, "have different fields"),
        ({"backbone": lambda: Choice((TinyMaxViT(), 3))}, "have different fields"),
        ({"backbone": lambda: Choice((TinyMaxViT(), TinyMaxViT()))}, "the same value twice"),
        ({"backbone": lambda: Choice((TinyMaxViT(dropout=0.5),))}, "outside of its search range"),
        ({"data": lambda: Choice((BASE.data,))}, "data says where something lies and cannot be searched as a whole"),
        ({"augment": lambda: Choice((AugmentConfig(), OptimConfig))}, "Choice cannot hold"),
    ],
)
def test_configurations_that_cannot_be_searched_are_refused(space: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check({path: made() for path, made in space.items()}, BASE)


def test_a_value_is_stored_as_the_option_that_equals_it() -> None:
    space: dict[str, Dimension] = {"augment.crop_scale": Choice(((0.5, 1), (0.8, 1)))}
    check(space, BASE)
    stored = encode(space, BASE)
    assert stored["augment.crop_scale"] in space["augment.crop_scale"].labels  # type: ignore[union-attr]
    assert apply(space, BASE, stored) == BASE
