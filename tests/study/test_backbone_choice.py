"""A search over backbones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import harness
from harness import Choice, Float, Module, Preprocessing
from harness.config.study import Study
from tests.analytic import memory_store, run_analytic
from tests.contracts.test_backbones import net
from tests.small import small_study

PRESETS = Preprocessing(mean=(0.5, 0.5, 0.5)), Preprocessing(resize=80, crop=64)


def searched(cache: Path) -> Study:
    """Two backbones of one function, whose images are prepared differently."""
    study = small_study(cache)
    options = tuple(Module(build=net, hidden=(8,), preprocessing=each) for each in PRESETS)
    space = {"backbone": Choice(options), "backbone.dropout": Float(0.0, 0.5), "optim.base_lr": Float(1e-4, 1e-2)}
    train = dataclasses.replace(study.train, backbone=options[0])
    return dataclasses.replace(study, train=train, space=space, trials=5, sampler=harness.gp())


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_every_trial_trains_the_backbone_that_was_chosen(image_cache: Path, tmp_path: Path) -> None:
    study = searched(image_cache)
    result = harness.run(study, home=tmp_path, progress=False)
    trials = result.trials()
    names = study.space["backbone"].labels  # type: ignore[union-attr]
    assert set(trials["backbone"]) == set(names), "five trials tried only one"
    for _, row in trials.iterrows():
        params = {name: row[name] for name in study.space}
        config = study.config(params)
        assert config.backbone.preprocessing() == PRESETS[names.index(row["backbone"])]
        assert config.backbone.dropout == row["backbone.dropout"]  # type: ignore[attr-defined]
    assert "Seconds per epoch: " in result.report.path.read_text(encoding="utf-8")
    assert result.replay()
    assert result.doctor()
    assert all(each.same for each in result.reproduce(int(trials["number"].iloc[-1])))
    assert len(result.model.classes) == 16


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_stopped_and_resumed_it_is_the_same(image_cache: Path, tmp_path: Path) -> None:
    study = searched(image_cache)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = harness.run(study, home=tmp_path / "whole", progress=False)
    for trials in (1, 3, 5):
        parts = harness.run(study, trials=trials, home=tmp_path / "parts", progress=False)
    assert parts.overview()["trials"] == whole.overview()["trials"]
    assert parts.trials().drop(columns="seconds").equals(whole.trials().drop(columns="seconds"))


def test_a_field_of_a_searched_backbone_is_changed_alone(image_cache: Path) -> None:
    study = searched(image_cache)
    options = study.space["backbone"]
    assert isinstance(options, Choice)
    other, name = options.options[1], options.labels[1]
    base = study.params({})
    assert study.params({"backbone.dropout": 0.4}) == {**base, "backbone.dropout": 0.4}
    assert study.params({"backbone": other}) == {**base, "backbone": name}
    both = {**base, "backbone": name, "backbone.dropout": 0.4}
    assert study.params({"backbone": other, "backbone.dropout": 0.4}) == both
    assert study.params({"backbone.dropout": 0.4, "backbone": other}) == both
    assert study.config(both).backbone.dropout == 0.4  # type: ignore[attr-defined]
    first = dataclasses.replace(study, first=({"backbone.dropout": 0.4},))
    store = memory_store(first)
    run_analytic(first, store, 2, curve=lambda params, epoch: 0.5)
    assert store.trials()[1].params == {**base, "backbone.dropout": 0.4}
