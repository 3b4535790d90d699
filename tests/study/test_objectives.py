"""A study of another objective, from the search to the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score, recall_score

import harness
from harness.api import rows
from harness.base.errors import InputError
from harness.final.predictions import from_record
from harness.report.display import print_studies
from tests.small import small_study
from tests.tracking.test_tracker import client_of

WORDS = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "loss": "likelihood"}


@pytest.mark.usefixtures("mlruns")
@pytest.mark.parametrize(
    "objective", ["balanced_accuracy", *(pytest.param(each, marks=pytest.mark.slow) for each in ("macro_f1", "loss"))]
)
def test_a_study_maximizes_its_objective(
    objective: Any, image_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small_study(image_cache)
    final = dataclasses.replace(study.final, seeds=2, compare_base=True)
    study = dataclasses.replace(study, objective=objective, trials=3, final=final)
    result = harness.run(study, home=tmp_path, progress=False)
    assert result.final is not None
    with result.store() as store:
        complete = [trial for trial in store.trials() if trial.state == "complete"]
        for trial in complete:
            val = trial.epochs[-1].val
            assert val is not None
            assert (trial.value, val.objective) == (val.score, objective)
        assert store.best().value == max(trial.value for trial in complete)  # type: ignore[union-attr, type-var]
        found = from_record(store.facts().predictions or {})
        recorded = result.final.per_seed
        for number, seed in enumerate(recorded):
            score = {"balanced_accuracy": recall_score, "macro_f1": f1_score}.get(objective)
            if score is not None:
                assert seed.value == pytest.approx(score(found.labels, found.predicted[number], average="macro"))
    low, high = result.final.interval
    assert low <= result.final.value <= high
    assert result.final.value == pytest.approx(sum(seed.value for seed in recorded) / 2)
    words, said = WORDS[objective], result.summary()
    assert f"Test {words} " in said
    assert f"validation {words} of" in said
    assert f"val_{words.lower().replace(' ', '_')}" in _metrics(tmp_path, study.name)
    assert f"compared by validation {words}" in (tmp_path / "studies" / f"{study.name}.model" / "README.md").read_text()
    assert words in result.report.path.read_text(encoding="utf-8")
    assert result.doctor()
    (row,) = (each for each in rows(tmp_path) if each.study == study.name)
    assert (row.best, row.objective) == (result.best.value, objective)  # type: ignore[union-attr]
    print_studies([row])
    assert capsys.readouterr().out.splitlines()[-1].strip().endswith(words)
    assert all(each.same for each in result.reproduce(0))
    assert harness.run(study, home=tmp_path, progress=False).digest() == result.digest()
    with pytest.raises(InputError, match=rf"objective was '{objective}', is 'accuracy'"):
        harness.run(dataclasses.replace(study, objective="accuracy"), home=tmp_path, progress=False)


def _metrics(home: Path, name: str) -> set[str]:
    client = client_of(home / "mlruns")
    experiment = client.get_experiment_by_name(name)
    return {metric for run in client.search_runs([experiment.experiment_id]) for metric in run.data.metrics}


def test_another_objective_is_refused(image_cache: Path) -> None:
    with pytest.raises(InputError, match="objective must be accuracy or balanced_accuracy or macro_f1 or loss"):
        dataclasses.replace(small_study(image_cache), objective="f1")  # type: ignore[arg-type]
    study = small_study(image_cache).with_settings(["objective=loss", "class_weight=0.5"])
    assert (study.objective, study.train.class_weight) == ("loss", 0.5)
