"""From the base to the chosen configuration, one field at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

import harness
from harness.base.keys import ablation_key
from harness.base.packing import pack_bits
from harness.cli.commands import main
from harness.config.space import Float
from harness.config.study import Study
from harness.config.train import FinalConfig, OptimConfig
from harness.final.choice import ablation_path
from harness.final.sentences import ablation_sentences
from harness.search.samplers import gp
from harness.store.opening import read_store
from harness.study.stages import wanted_keys
from harness.training.checkpoint import Checkpoint, stale, write_tensors
from tests.analytic import memory_store, run_analytic
from tests.conftest import make_study
from tests.small import small_study

FIRST = {"backbone.dropout": 0.0, "optim.base_lr": 3e-2}


def slow_base(cache: Path | str, **changes: Any) -> Study:
    """Two small trials: a base that learns nothing, and one that does."""
    study = small_study(cache)
    train = dataclasses.replace(study.train, optim=OptimConfig(base_lr=1e-6, depth_lr_mult=1.0), epochs=4)
    space = {"optim.base_lr": Float(1e-6, 1e-1, log=True), "backbone.dropout": Float(0.0, 0.6)}
    study = dataclasses.replace(study, train=train, space=space, first=(FIRST,), trials=2)
    return dataclasses.replace(study, final=FinalConfig(seeds=2, publish=False), **changes)


@pytest.fixture
def place(tmp_path: Path, image_cache: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the finished study, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    text = f"from tests.study.test_ablate import slow_base\n\nSTUDY = slow_base({str(image_cache)!r})\n"
    (tmp_path / "studies" / "tiny.py").write_text(text)
    result = harness.run("tiny", progress=False)
    assert result.overview()["chosen"] == 1
    return tmp_path


def record(place: Path) -> Any:
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        return store.attributes().get("ablation")


def test_each_step_is_trained_once_and_judged_on_the_validation_images(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = harness.open("tiny").digest()
    assert main(["ablate", "tiny"]) == 0
    out = capsys.readouterr().out
    assert out.count("epoch 4/4") == 3 * 2  # base, one field, both; two seeds
    assert "From the base (" in out
    assert "\noptim.base_lr from 1e-06 to 0.03: +" in out
    assert "\nbackbone.dropout from 0.3 to 0: " in out
    found = record(place)
    assert found["trial"] == 1
    assert [len(results) for results in found["results"].values()] == [2, 2, 2]
    assert not list((place / "studies" / "tiny.checkpoints").glob("*"))
    assert main(["ablate", "tiny"]) == 0
    assert "epoch" not in capsys.readouterr().out
    assert record(place) == found
    result = harness.open("tiny")
    assert result.digest() == before
    assert result.doctor()
    assert "From the base to the winner" in (place / "studies" / "tiny.report" / "report.html").read_text()
    assert main(["show", "tiny", "--json"]) == 0
    printed = capsys.readouterr().out
    shown = json.loads(printed[printed.index("{") :])["ablation"]
    assert shown["results"]["0"] == [each["value"] for each in found["results"]["0"]]


def test_an_interrupted_ablation_resumes_to_the_same_record(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_batch, count = Checkpoint.after_batch, 0

    def interrupted(checkpoint: Checkpoint) -> None:
        nonlocal count
        count += 1
        if count == 13:  # within an epoch of the second training
            raise KeyboardInterrupt
        after_batch(checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "after_batch", interrupted)
        assert main(["ablate", "tiny"]) == 130
    assert len(record(place)["results"]["0"]) == 1
    assert len(list((place / "studies" / "tiny.checkpoints").glob("ablation-*"))) == 1
    harness.run("tiny", progress=False)  # leaves the checkpoint of the ablation where it is
    assert len(list((place / "studies" / "tiny.checkpoints").glob("ablation-*"))) == 1
    assert main(["ablate", "tiny"]) == 0
    resumed = record(place)
    with harness.open("tiny").store() as store, store._engine.begin() as connection:  # type: ignore[union-attr]
        connection.exec_driver_sql("DELETE FROM study_user_attributes WHERE key = 'ablation'")
    assert main(["ablate", "tiny"]) == 0
    assert record(place) == resumed


def test_the_base_itself_and_a_study_under_way_are_sentences(
    tmp_path: Path, image_cache: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    text = f"from tests.study.test_ablate import slow_base\n\nSTUDY = slow_base({str(image_cache)!r}, trials=1)\n"
    (tmp_path / "studies" / "tiny.py").write_text(text)
    assert main(["ablate", "tiny"]) == 2
    assert "Study 'tiny' has no results yet" in capsys.readouterr().err
    harness.run("tiny", progress=False)
    assert main(["ablate", "tiny"]) == 0
    assert capsys.readouterr().out == "Study 'tiny' chose the base configuration; there is nothing to ablate.\n"


def test_the_field_that_matters_comes_first() -> None:
    study = make_study("cache", sampler=gp())
    store = memory_store(study)
    run_analytic(study, store, 30)
    base = {"optim.base_lr": 1e-4, "optim.depth_lr_mult": 0.55, "backbone.dropout": 0.25, "backbone.hidden": "16-8"}
    best = base | {"optim.base_lr": 1e-3, "optim.depth_lr_mult": 0.6}
    assert ablation_path(store.trials(), study.space, base, best) == ["optim.base_lr", "optim.depth_lr_mult"]
    assert ablation_path([], study.space, base, best) == ["optim.base_lr", "optim.depth_lr_mult"]
    assert ablation_path(store.trials(), study.space, base, base) == []


def step(*hits: int) -> list[dict[str, Any]]:
    """Two seeds with so many hits of 100 images."""
    rows = [numpy.arange(100) < each for each in hits]
    return [
        {"value": each / 100, "images": 100, "hits": pack_bits(row), "contributions": None}
        for each, row in zip(hits, rows, strict=True)
    ]


def test_the_sentences() -> None:
    values = {"optim.base_lr": [1e-3, 0.00312], "backbone.hidden": ["256", "512"]}
    found = {"trial": 7, "seeds": [0, 1], "fields": list(values), "values": values, "results": {"0": step(50, 52)}}
    assert ablation_sentences(found) == ["The ablation is not complete; run the same command again."]
    found["results"] |= {"1": step(80, 82), "2": step(81)}
    assert ablation_sentences(found) == ["The ablation is not complete; run the same command again."]
    found["results"] |= {"2": step(81, 81)}
    first, lr, hidden, last = ablation_sentences(found)
    assert first == (
        "From the base (51.00 %) to trial 7 (81.00 %), field by field; each step trained on 2 seeds and judged on 100 "
        "validation images."
    )
    assert lr.startswith("optim.base_lr from 0.001 to 0.00312: +30.00 points (+")
    assert hidden.startswith("backbone.hidden from 256 to 512: +0.00 points (-")
    assert hidden.endswith(", no difference shown.")
    assert "biased upwards" in last


def test_what_a_kill_after_the_last_result_left_is_unused(place: Path) -> None:
    assert main(["ablate", "tiny"]) == 0
    left = place / "studies" / "tiny.checkpoints" / f"{ablation_key(0, 0)}.safetensors"
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        write_tensors(left, {}, {"identity": {"study": store.uid}})
        study = slow_base("cache")
        assert stale(left.parent, wanted_keys(study, store, place / "studies" / "tiny.model"), store.uid) == [left]
