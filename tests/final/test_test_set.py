"""The final step: the test set is opened once, after the search, and its number comes with what is known about it."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
import torch

from harness.base.errors import Halt, InputError
from harness.base.packing import unpack
from harness.cli.commands import main
from harness.config.events import Completed, TrialStarted
from harness.config.final_result import FinalResult
from harness.config.space import Choice
from harness.config.study import Study
from harness.config.train import FinalConfig
from harness.data import splits as tensors
from harness.data.splits import content_of
from harness.datasets.image_folder import ImageFolder
from harness.final import test_set as final
from harness.final.choice import rerank
from harness.final.retrain import Context, Retraining
from harness.final.sentences import conclusion, final_sentence
from harness.final.statistics import compare
from harness.final.test_set import final_run
from harness.garden.drawing import draw
from harness.garden.species import DEMO_SPECIES
from harness.report.overview import overview, summary
from harness.report.write import write_report
from harness.search.loop import search
from harness.serving.model import load_saved
from harness.store.leases import LeaseLost
from harness.store.opening import open_store
from harness.store.store import Store
from harness.study.stages import run
from harness.tracking.expected import expected_runs
from harness.training.loop import fit
from harness.training.step import Runtime
from tests.analytic import epoch_result, run_analytic
from tests.faulty import CommandLine, one_sentence
from tests.small import small_study

CPU = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)


@pytest.fixture
def study(image_cache: Path) -> Study:
    small = small_study(image_cache)
    return dataclasses.replace(small, trials=3, final=FinalConfig(seeds=2))


@pytest.fixture
def store(study: Study, tmp_path: Path) -> Iterator[Store]:
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        yield store


def everything(study: Study, store: Store, folder: Path, reason: str | None = None) -> None:
    """The search and all that comes after it."""
    list(run(context_of(study, store, folder), folder / "model", reason))


def context_of(study: Study, store: Store, folder: Path) -> Context:
    return Context(study=study, store=store, runtime=CPU, checkpoints=folder / "checkpoints")


def better_trial(study: Study, store: Store) -> int:
    """One more trial, which has everything right."""
    asked = store.ask(study)
    store.report(asked, 1, 1.0)
    store.tell(asked, Completed(value=1.0), [epoch_result(1, 1.0)], seconds=1.0)
    return asked.number


# -- the test set ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_waits_for_the_trials_that_another_command_asked_for(study: Study, store: Store, tmp_path: Path) -> None:
    store.set_attribute("wanted", study.trials + 2)
    everything(study, store, tmp_path)
    assert store.finished() == study.trials + 2
    assert store.has_final()


def test_the_search_cannot_reach_the_test_split(
    study: Study, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tensors._load

    def closed(dataset: Any, split: Any, *preparation: Any) -> Any:
        if split == "test":
            raise AssertionError("the test split was read")
        return load(dataset, split, *preparation)

    monkeypatch.setattr(tensors, "_load", closed)
    list(search(study, store, CPU, tmp_path / "checkpoints"))
    assert [trial.state for trial in store.trials()] == ["complete"] * 3
    assert store.attributes().get("ledger") is None
    # The same loader, once the search is over: it is the one that the final step goes through.
    with pytest.raises(AssertionError, match="the test split was read"):
        list(final_run(context_of(study, store, tmp_path), tmp_path / "model"))
    assert [line["event"] for line in store.ledger()] == ["opened"]


@pytest.mark.slow
def test_an_opening_and_its_result_are_lines_of_the_ledger(study: Study, store: Store, tmp_path: Path) -> None:
    everything(study, store, tmp_path)
    opened, result = store.ledger()
    found = store.attributes().get("final")
    assert (opened["event"], opened["trial"], opened["reason"]) == ("opened", found["trial"], None)
    assert {"time", "commit", "configuration"} <= opened.keys()
    assert [seed["correct"] for seed in result["seeds"]] == [seed["correct"] for seed in found["per_seed"]]
    assert (result["hash"], found["test_openings"]) == (found["ledger"], 1)


def test_stopped_anywhere_after_the_opening_the_same_opening_goes_on_to_the_same_result(
    study: Study, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, or for want of room: the result and its line are there together, or neither is."""
    with open_store(study, f"sqlite:///{tmp_path}/straight.db") as other:
        everything(study, other, tmp_path / "straight")
        straight = told(other)
    before = [(final, name) for name in ("load_test", "evaluated", "thumbnails", "_duplicates", "_with_result")]
    before += [(final, name) for name in ("keep_check_images", "save_model", "record_files")]
    last = [(Store, "set_as_leader"), (sqlalchemy.engine.Connection, "_commit_impl")]
    for number, (of, name) in enumerate([*before, *last]):
        stop = (_killed, _no_room)[number % 2]
        with monkeypatch.context() as patched:
            patched.setattr(of, name, stop if name != "_commit_impl" else _at_the_result(stop))
            with pytest.raises((KeyboardInterrupt, Halt)):
                everything(study, store, tmp_path)
        assert store.attributes().get("final") is None, name
        assert [line["event"] for line in store.ledger()] in ([], ["opened"]), name
    with monkeypatch.context() as patched:
        patched.setattr(Retraining, "end", _killed)
        with pytest.raises(KeyboardInterrupt):
            everything(study, store, tmp_path)
    assert store.attributes()["final"]["ledger"] == store.ledger()[-1]["hash"]
    everything(study, store, tmp_path)
    assert [(line["event"], line.get("reason")) for line in store.ledger()] == [("opened", None), ("result", None)]
    assert told(store) == straight
    assert store.attributes()["final"]["test_openings"] == 1
    better_trial(study, store)
    assert store.needs_reason()


def told(store: Store) -> list[tuple[int, int, str]]:
    """The test result, and of which weights it is."""
    return [(each["seed"], each["correct"], each["weights"]) for each in store.attributes()["final"]["per_seed"]]


def _no_room(*_: Any) -> None:
    raise Halt("There is no room.")


def _at_the_result(stop: Callable[..., None]) -> Callable[..., None]:
    """A commit that is stopped when it would write the result."""
    commit = sqlalchemy.engine.Connection._commit_impl

    def stopped(connection: sqlalchemy.engine.Connection) -> None:
        if connection.in_transaction():
            query = "SELECT 1 FROM study_user_attributes WHERE key = 'final'"
            if connection.exec_driver_sql(query).first() is not None:
                stop()
        commit(connection)

    return stopped


@pytest.mark.slow
def test_the_ledger_knows_a_result_that_is_missing_and_asks_for_a_reason(
    study: Study, store: Store, tmp_path: Path
) -> None:
    """As where the two were written apart, and something came between."""
    everything(study, store, tmp_path)
    whole, straight = store.attributes().get("final"), told(store)
    _lose(tmp_path / "tiny.db", "final")
    assert not store.needs_reason()
    everything(study, store, tmp_path)
    assert (told(store), store.attributes()["final"]["ledger"]) == (straight, whole["ledger"])
    assert [line["event"] for line in store.ledger()] == ["opened", "result"]
    _lose(tmp_path / "tiny.db", "final")
    number = better_trial(study, store)
    assert store.needs_reason()
    everything(study, store, tmp_path)
    assert [line["event"] for line in store.ledger()] == ["opened", "result"]
    known = ("trial", "correct", "total", "accuracy", "interval", "spread", "test_openings", "ledger")
    assert {key: store.attributes()["final"][key] for key in known} == {key: whole[key] for key in known}
    assert store.ledger_fault() is None
    shown = summary("tiny", store, "nowhere")
    assert f"{whole['correct']} correct of {whole['total']}" in shown
    assert store.why_closed() in shown
    assert write_report("tiny", store, "nowhere", tmp_path).is_file()
    everything(study, store, tmp_path, reason="a longer search")
    assert store.attributes()["final"]["trial"] == number
    assert [line.get("reason") for line in store.ledger()] == [None, None, "a longer search", None]


def _lose(database: Path, attribute: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("DELETE FROM study_user_attributes WHERE key = ?", (attribute,))
        connection.commit()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["thumbnails", "record_files"])
def test_a_leader_that_stood_still_does_not_overwrite(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    url = f"sqlite:///{tmp_path}/led.db"
    with open_store(study, url) as late, open_store(study, url, joining=True) as next_one:
        overtaken(study, late, next_one, tmp_path, monkeypatch, moment)


def overtaken(
    study: Study, late: Store, next_one: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The leader stands still at `moment`, the last before it writes, until another one has ended its work."""
    list(search(study, late, CPU, folder / "checkpoints"))
    written, go_on = [], getattr(final, moment)

    def stand_still(*args: Any) -> Any:
        monkeypatch.setattr(final, moment, go_on)
        with late._engine.begin() as connection:  # type: ignore[union-attr]
            connection.execute(sqlalchemy.text("UPDATE harness_leases SET until = 0"))
        assert next_one.lead()
        list(final_run(context_of(study, next_one, folder), folder / "model"))
        written.append((next_one.attributes().get("final"), next_one.ledger()))
        return go_on(*args)

    assert late.lead()
    monkeypatch.setattr(final, moment, stand_still)
    monkeypatch.setattr(final, "_now", lambda: {"time": f"2026-11-22T10:00:0{len(written)}+00:00", "commit": "abc"})
    with pytest.raises(LeaseLost):
        list(final_run(context_of(study, late, folder), folder / "model"))
    assert [(late.attributes().get("final"), late.ledger())] == written
    assert [line["event"] for line in late.ledger()] == ["opened", "result"]
    with pytest.raises(LeaseLost):
        late.set_as_leader({"rerank": {}})
    assert late.attributes().get("rerank") is None


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_edited_ledger_keeps_the_test_set_closed(study: Study, store: Store, tmp_path: Path) -> None:
    everything(study, store, tmp_path)
    lines = store.attributes().get("ledger")
    lines[1]["seeds"][0]["correct"] += 1
    store.set_attribute("ledger", lines)
    better_trial(study, store)
    with pytest.raises(InputError, match="line 2 of the test ledger was changed; the test set stays"):
        everything(study, store, tmp_path, reason="why not")
    assert "Do not trust this: line 2" in summary("tiny", store, "nowhere")
    assert overview("tiny", store, "nowhere")["ledger"]["fault"] is not None


@pytest.mark.slow
def test_what_is_no_ledger_is_named_by_every_command_and_keeps_the_test_set_closed(
    line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line.run("--trials", "1").code == 0
    for content in ("no JSON", "5", '["opened"]', "[{}]", '{"line": 1}'):
        _edit(line, "ledger", content)
        fault = "line 1 of the test ledger was changed"
        fault = fault if content.startswith("[") else "the test ledger was changed: it is not a list of lines"
        capsys.readouterr()
        assert main(["show", "tiny"]) == 0
        assert capsys.readouterr().out.startswith(f"warning   Do not trust this: {fault}.\n")
        assert main(["show", "tiny", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ledger"] == {"lines": [], "fault": fault}
        assert main(["report", "tiny"]) == 0
        assert f"Do not trust this: {fault}." in (line.place / "studies" / "tiny.report" / "report.html").read_text()
        assert main(["doctor", "tiny"]) == 1
        assert f"In the storage, {fault}; do not trust the test result" in capsys.readouterr().out
        again = line.run("--trials", "1")
        assert again.code == 1
        assert f"Do not trust this: {fault}." in again.out
        assert f"{fault}; do not trust the test result. Restore the storage from a backup." in again.err
        refused = line.run("--trials", "2", "--reopen-test", "why not")
        assert refused.code == 2
        assert f"{fault}; the test set stays closed. Restore the storage from a backup." in refused.err
        assert one_sentence(refused.err)


def _edit(line: CommandLine, attribute: str, content: str) -> None:
    """Write a text in the place of a study's attribute, past Optuna."""
    with contextlib.closing(sqlite3.connect(line.place / "studies" / "tiny.db")) as database:
        database.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = ?", (content, attribute))
        database.commit()


@pytest.mark.slow
def test_another_attribute_that_is_no_json_is_named(line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert line.run("--trials", "1").code == 0
    _edit(line, "final", "nothing")
    for command in (["show", "tiny"], ["doctor", "tiny"], ["run", "--study", "tiny", "--trials", "1"]):
        capsys.readouterr()
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "the study's 'final' is not JSON; restore the storage from a backup." in err
        assert one_sentence(err)


@pytest.mark.slow
def test_a_better_trial_leaves_the_test_set_closed_until_a_reason_is_given(
    study: Study, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything(study, store, tmp_path)
    before, at_the_opening = store.attributes().get("final"), conclusion(store)
    number = better_trial(study, store)
    everything(study, store, tmp_path)
    assert store.attributes().get("final") == before
    assert (
        f"The validation images now choose trial {number}, but the test result of trial {before['trial']}"
        in capsys.readouterr().err
    )
    shown = summary("tiny", store, "nowhere")
    page = html.unescape(write_report("tiny", store, "nowhere", tmp_path).read_text())
    for text in (shown, page):
        assert store.why_closed() in text
        assert "When the test set was opened" in text
    assert "When the test set was opened" not in at_the_opening
    assert store.is_settled()
    words = rf"gone holds no model\. The validation images now choose trial {number}, .*--reopen-test"
    with pytest.raises(InputError, match=words):
        load_saved(study, store, tmp_path / "gone")
    everything(study, store, tmp_path, reason="the first search was too short")
    after = store.attributes().get("final")
    assert (after["trial"], after["test_openings"]) == (number, 2)
    events = [(line["event"], line["trial"], line.get("reason")) for line in store.ledger()]
    assert events == [
        ("opened", before["trial"], None),
        ("result", before["trial"], None),
        ("opened", number, "the first search was too short"),
        ("result", number, None),
    ]
    assert "opened 2 times, so selection may have biased this number" in final_sentence(FinalResult.of(after))


@pytest.mark.slow
def test_an_opening_that_was_cut_off_does_not_close_the_test_set_for_a_better_trial(
    study: Study, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(final, "load_test", _killed)
        with pytest.raises(KeyboardInterrupt):
            everything(study, store, tmp_path)
    first = store.ledger()[0]["trial"]
    assert f"opened for trial {first}, but no result is recorded yet" in summary("tiny", store, "nowhere")
    number = better_trial(study, store)
    assert not store.needs_reason()
    everything(study, store, tmp_path)
    assert store.attributes()["final"]["trial"] == number
    assert store.ledger()[1]["reason"] == f"the opening for trial {first} ended before its result was recorded"


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"accuracy": 0.99}, {"correct": 63}, {"trial": 9}])
def test_a_final_result_that_is_not_the_ledgers_is_named(
    study: Study, store: Store, tmp_path: Path, change: dict[str, Any]
) -> None:
    everything(study, store, tmp_path)
    store.set_attribute("final", store.attributes().get("final") | change)
    assert "the final result differs from line 2 of the test ledger" in summary("tiny", store, "nowhere")


@pytest.mark.slow
def test_damaged_weights_are_made_again_and_the_test_set_stays_closed(line: CommandLine) -> None:
    assert line.run("--trials", "1").code == 0
    weights = line.place / "studies" / "tiny.model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-8] + b"12345678")
    ended = line.run("--trials", "1")
    assert ended.code == 0
    assert f"{weights} is damaged (its checksum is wrong); writing it again." in ended.err
    assert weights.read_bytes() == before
    assert "The test set was opened once." in ended.out
    assert "Nothing is missing" in line.run("--trials", "1").out


@pytest.mark.slow
def test_a_damaged_description_of_the_model_is_made_again(line: CommandLine) -> None:
    assert line.run("--trials", "1").code == 0
    description = line.place / "studies" / "tiny.model" / "model.json"
    before = description.read_bytes()
    description.write_text("{}")
    ended = line.run("--trials", "1")
    assert ended.code == 0
    assert f"{description} is damaged (its checksum is wrong); writing it again." in ended.err
    assert "retraining its seed" not in ended.err
    assert description.read_bytes() == before
    assert "The test set was opened once." in ended.out


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_predictions_that_are_kept_give_the_numbers(study: Study, store: Store, tmp_path: Path) -> None:
    everything(study, store, tmp_path)
    found, kept = store.attributes().get("final"), store.attributes().get("predictions")
    labels = unpack(kept["labels"], "uint16")
    for result, seed in zip(found["per_seed"], kept["seeds"], strict=True):
        predicted, confidence = unpack(seed["predicted"], "uint16"), unpack(seed["confidence"], "float32")
        assert (int((predicted == labels).sum()), len(labels)) == (result["correct"], result["total"])
        recalls = [(predicted[labels == label] == label).mean() for label in np.unique(labels)]
        assert result["balanced_accuracy"] == pytest.approx(np.mean(recalls))
        assert ((confidence > 0) & (confidence <= 1)).all()


def test_the_base_configuration_is_trained_the_same_way_and_compared_image_by_image(
    study: Study, store: Store, tmp_path: Path
) -> None:
    list(search(study, store, CPU, tmp_path / "checkpoints"))
    number = better_trial(study, store)
    study = dataclasses.replace(study, trials=4)
    everything(study, store, tmp_path)
    found, kept = store.attributes().get("final"), store.attributes().get("predictions")
    assert (found["trial"], found["base"]["trial"]) == (number, 0)
    labels = unpack(kept["labels"], "uint16")
    hits = [
        np.stack([unpack(each["predicted"], "uint16") == labels for each in kept[name]]) for name in ("seeds", "base")
    ]
    assert (
        [each["seed"] for each in found["base"]["per_seed"]] == [each["seed"] for each in found["per_seed"]] == [0, 1]
    )
    assert [each["correct"] for each in found["base"]["per_seed"]] == hits[1].sum(axis=1).tolist()
    assert found["base"]["accuracy"] == pytest.approx(hits[1].mean())
    assert found["comparison"] == dataclasses.asdict(compare(*hits))
    said = conclusion(store)
    for text in (
        f"is {100 * found['comparison']['difference']:+.2f} points",
        f"95 % interval {100 * found['comparison']['low']:+.2f} to {100 * found['comparison']['high']:+.2f}",
        f"p = {found['comparison']['p']:.2g}",
        "over 2 seeds of each and 32 test images",
    ):
        assert text in said
    page = html.unescape(write_report("tiny", store, "nowhere", tmp_path).read_text())
    for text in (said, "base, trial 0, seed 0", "base, trial 0, seed 1"):
        assert text in page
    assert all("epochs" not in each for each in overview("tiny", store, "nowhere")["final"]["base"]["per_seed"])
    runs = [each for each in expected_runs(study, store) if each.tags["harness.kind"] == "base"]
    assert [each.metrics["test_accuracy"] for each in runs] == [each["accuracy"] for each in found["base"]["per_seed"]]


@pytest.mark.slow
def test_better_is_said_only_where_it_is_shown(study: Study, store: Store, tmp_path: Path) -> None:
    finished_with_a_base(study, store, tmp_path)
    found = store.attributes().get("final")
    for claim, difference, low, high, p in (
        ("The best configuration is better than the base configuration: ", 0.0104, 0.0041, 0.0167, 0.012),
        ("The best configuration is worse than the base configuration: ", -0.0104, -0.0167, -0.0041, 0.012),
        ("No configuration is shown to be better than another: ", 0.0104, -0.0096, 0.0304, 0.31),
    ):
        shown = {"difference": difference, "low": low, "high": high, "p": p}
        store.set_attribute("final", found | {"comparison": found["comparison"] | shown})
        assert conclusion(store) == (
            f"{claim}the test accuracy of the best minus that of the base is {100 * difference:+.2f} points (95 % "
            f"interval {100 * low:+.2f} to {100 * high:+.2f}, p = {p}), over 2 seeds of each and 32 test images."
        )


@pytest.mark.slow
def test_one_test_image_shows_nothing(study: Study, store: Store, tmp_path: Path) -> None:
    finished_with_a_base(study, store, tmp_path)
    found = store.attributes()["final"]
    unknown = {"images": 1, "low": None, "high": None, "p": None}
    store.set_attribute("final", found | {"comparison": found["comparison"] | unknown})
    assert conclusion(store).endswith("with one test image, the spread is unknown.")


def finished_with_a_base(study: Study, store: Store, folder: Path) -> int:
    """A study that ended, whose best trial is not the base; returns the best."""
    list(search(study, store, CPU, folder / "checkpoints"))
    number = better_trial(study, store)
    everything(dataclasses.replace(study, trials=study.trials + 1), store, folder)
    return number


@pytest.mark.slow
def test_with_one_seed_nothing_is_claimed_and_why_is_said(study: Study, image_cache: Path, tmp_path: Path) -> None:
    study = dataclasses.replace(study, final=FinalConfig(seeds=1))
    with open_store(study, f"sqlite:///{tmp_path}/one.db") as store:
        finished_with_a_base(study, store, tmp_path)
        assert store.attributes()["final"]["comparison"]["p"] is None
        said = conclusion(store)
        assert said.startswith("No configuration is shown to be better than another: with one seed of the base,")
        assert "set final.seeds to 2 or more" in said
        assert said in html.unescape(write_report("tiny", store, "nowhere", tmp_path).read_text())


def description(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model" / "model.json").read_text()))


@pytest.mark.slow
def test_killed_between_the_seeds_of_the_base_none_is_trained_twice(study: Study, store: Store, tmp_path: Path) -> None:
    list(search(study, store, CPU, tmp_path / "checkpoints"))
    better_trial(study, store)
    begun: list[str] = []
    for cut in (True, False):
        with contextlib.closing(final_run(context_of(study, store, tmp_path), tmp_path / "model")) as events:
            for event in events:
                if isinstance(event, TrialStarted):
                    if cut and event.name == "base seed 1":
                        break
                    begun.append(event.name)
    assert begun == ["final seed 0", "final seed 1", "base seed 0", "base seed 1"]
    assert len(store.attributes()["final"]["base"]["per_seed"]) == 2


def test_a_training_that_has_not_ended_is_not_tested(study: Study, store: Store, tmp_path: Path) -> None:
    """A machine that was thought dead may write its older state over what another one has ended."""
    list(search(study, store, CPU, tmp_path / "checkpoints"))
    chosen = store.best()
    assert chosen is not None
    retraining = Retraining(context_of(study, store, tmp_path), "final", chosen, 0)
    checkpoint = retraining._checkpoint()
    with closing(fit(checkpoint.training, checkpoint.after_batch)) as results:
        next(results)
        checkpoint.save()
    with pytest.raises(Halt, match="has not ended; run the same command again"):
        retraining.trained()
    list(retraining.train())
    assert retraining.trained().progress.epoch > study.train.epochs


@pytest.mark.slow
def test_where_all_configurations_are_the_same_none_is_better(image_cache: Path, tmp_path: Path) -> None:
    small = small_study(image_cache)
    hidden = Choice((small.train.backbone.hidden,))  # type: ignore[attr-defined]
    study = dataclasses.replace(small, space={"backbone.hidden": hidden}, trials=3, final=FinalConfig(seeds=2))
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        everything(study, store, tmp_path)
        found = store.attributes().get("final")
        assert conclusion(store) == "No configuration is better than another: all 3 trials have the same one."
        if found["trial"] != 0:  # equal configurations and seeds: the same weights, so nothing can differ
            weights = [[each["weights"] for each in result["per_seed"]] for result in (found, found["base"])]
            assert weights[0] == weights[1]
            assert (found["comparison"]["difference"], found["comparison"]["p"]) == (0.0, 1.0)


@pytest.mark.slow
def test_what_the_choice_adds_is_computed_from_the_trials_validation_hits(
    study: Study, store: Store, tmp_path: Path
) -> None:
    everything(study, store, tmp_path)
    found = store.attributes()["final"]["selection"]
    assert (found["candidates"], found["images"]) == (3, 32)
    assert -0.01 <= found["excess"] <= 1
    kept = [epoch.val.hits is not None for trial in store.trials() for epoch in trial.epochs if epoch.val is not None]
    assert kept == [False, True] * 3  # the last epoch's alone


def test_the_base_is_not_trained_where_it_is_not_wanted(study: Study, store: Store, tmp_path: Path) -> None:
    list(search(study, store, CPU, tmp_path / "checkpoints"))
    better_trial(study, store)
    without = dataclasses.replace(study, final=FinalConfig(seeds=1, compare_base=False))
    list(final_run(context_of(without, store, tmp_path), tmp_path / "model"))
    assert store.attributes()["final"]["base"] is None
    assert "was not compared" in conclusion(store)


# -- a second look at the best -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rerank_chooses_by_the_mean_of_fresh_seeds(study: Study, store: Store, tmp_path: Path) -> None:
    study = dataclasses.replace(study, final=FinalConfig(seeds=2, rerank=2))
    with open_store(study, f"sqlite:///{tmp_path}/reranked.db") as store:
        everything(study, store, tmp_path)
        kept = store.attributes().get("rerank")
        assert kept["candidates"] == [trial.number for trial in store.candidates(2)]
        means = {
            int(number): np.mean([each["accuracy"] for each in found]) for number, found in kept["results"].items()
        }
        assert means[kept["chosen"]] == max(means.values())
        assert store.attributes()["final"]["trial"] == kept["chosen"]
        seeds = {each["weights"] for found in kept["results"].values() for each in found}
        assert len(seeds) == 4  # two configurations, two seeds each
        assert overview("tiny", store, "nowhere")["chosen"] == kept["chosen"]


def test_a_reranking_that_may_grow_is_open_again(study: Study, tmp_path: Path) -> None:
    study = dataclasses.replace(study, final=FinalConfig(seeds=1, rerank=4), trials=8)
    with open_store(study, f"sqlite:///{tmp_path}/growing.db") as store:
        run_analytic(study, store, 3)
        numbers = [trial.number for trial in store.candidates(4)]
        store.set_attribute("rerank", {"candidates": numbers, "results": {}, "chosen": numbers[0]})
        chosen = store.chosen()
        assert chosen is not None
        assert chosen.number == numbers[0]
        while len(store.candidates(4)) == len(numbers):
            run_analytic(study, store, store.finished() + 1)
        assert store.chosen() is None


@pytest.mark.slow
def test_a_rerank_that_is_cut_off_goes_on_and_trains_nothing_twice(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = dataclasses.replace(study, final=FinalConfig(seeds=2, rerank=2))
    results = []
    for name, cuts in (("whole", 0), ("cut", 3)):
        with open_store(study, f"sqlite:///{tmp_path}/{name}.db") as store:
            place = context_of(study, store, tmp_path / name)
            list(search(study, store, CPU, place.checkpoints))
            for _ in range(cuts):
                with monkeypatch.context() as patched:
                    patched.setattr(Store, "set_as_leader", _killed)
                    with pytest.raises(KeyboardInterrupt):
                        list(rerank(place))
            list(rerank(place))
            record = store.attributes().get("rerank")
            results.append([record["candidates"], record["chosen"], *_weights(record)])
            assert list(rerank(place)) == []
    assert results[0] == results[1]


def _weights(record: dict[str, Any]) -> list[str]:
    return [each["weights"] for found in record["results"].values() for each in found]


@pytest.mark.parametrize("value", [1, -1])
def test_a_rerank_of_one_is_wrong_input(value: int) -> None:
    with pytest.raises(InputError, match=r"final\.rerank must be at least 2 and at most 1,000, or 0"):
        FinalConfig(rerank=value)


@pytest.mark.slow
def test_show_json_is_json(study: Study, store: Store, tmp_path: Path) -> None:
    everything(study, store, tmp_path)
    assert json.loads(json.dumps(overview("tiny", store, "nowhere")))["final"]["trial"] is not None


@pytest.mark.slow
def test_images_that_changed_during_the_search_keep_the_test_set_closed(study: Study, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for split, count in (("train", 4), ("val", 3), ("test", 3)):
        for name, species in zip(("daisy", "rose"), DEMO_SPECIES, strict=False):
            (photos / split / name).mkdir(parents=True)
            for number in range(count):
                draw(species, number + 10 * len(split), 32).save(photos / split / name / f"{number}.png")
    data = ImageFolder(root=str(photos), image_size=64, stored_size=72, cache=str(tmp_path / "cache"))
    study = dataclasses.replace(study, trials=1, train=dataclasses.replace(study.train, data=data))
    with open_store(study, f"sqlite:///{tmp_path}/changed.db", content_of(study)) as store:
        place = context_of(study, store, tmp_path)
        list(search(study, store, place.runtime, place.checkpoints))
        shutil.copy(photos / "test" / "rose" / "0.png", photos / "test" / "rose" / "new.png")
        with pytest.raises(InputError, match=r"the images in .* differ from those at the start"):
            list(final_run(place, tmp_path / "model"))
        assert store.ledger() == []
        (photos / "test" / "rose" / "new.png").unlink()
        list(final_run(place, tmp_path / "model"))
        assert len(store.ledger()) == 2
