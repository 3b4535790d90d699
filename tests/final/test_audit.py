"""The audit of pruning: its statistics on learning curves with a known answer, its training on a small real study."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom, spearmanr

from harness.base.keys import audit_key
from harness.base.seeds import derive_seed
from harness.cli.commands import main
from harness.config.space import Float
from harness.config.study import Study
from harness.config.train import FinalConfig, OptimConfig
from harness.data.augment import IMAGENET
from harness.data.splits import prepare
from harness.final.pruning_cost import (
    Course,
    audit_sentences,
    draw,
    drawing_order,
    rank_correlation,
    record,
    share_interval,
)
from harness.final.retrain import Context
from harness.garden.dataset import Garden
from harness.report.overview import digest
from harness.report.write import write_report
from harness.search.pruners import asha
from harness.store.opening import open_store, read_store
from harness.store.store import Store
from harness.study import audit as auditing
from harness.study.stages import run as run_study
from harness.study.stages import wanted_keys
from harness.tracking.places import local_tracker
from harness.training.assemble import assemble, decide_runtime
from harness.training.loop import fit
from tests.analytic import memory_store, run_analytic
from tests.conftest import make_study
from tests.forked import Process
from tests.small import Run, command, copied, small_study
from tests.study.test_reproduce import change

SETTINGS: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}
EPOCHS = 8
LAW = {"state": "complete", "same": True, "explanation": None}


def late(params: Mapping[str, Any], epoch: int) -> float:
    """More dropout learns slower and ends higher, so that looking early is wrong about many trials."""
    slowness = params["backbone.dropout"] / 0.6
    return (0.5 + 0.4 * slowness) * (1 - math.exp(-epoch / (1 + 6 * slowness)))


@pytest.fixture(scope="module")
def curves() -> tuple[list[Course], dict[int, tuple[float, ...]], Store]:
    """Sixty analytic trials pruned by ASHA, and what each would have come to without it."""
    study = make_study("nowhere", pruner=asha(min_epochs=1, reduction=2), trials=60)
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, epochs=EPOCHS))
    store = memory_store(study)
    run_analytic(study, store, 60, epochs=EPOCHS, curve=late)
    whole = {
        trial.number: tuple(round(1000 * late(trial.params, epoch)) / 1000 for epoch in range(1, EPOCHS + 1))
        for trial in store.trials()
    }
    return [auditing.course(study, trial) for trial in store.trials()], whole, store


def audited(
    courses: list[Course], whole: Mapping[int, tuple[float, ...]], fraction: float, seed: int
) -> dict[str, Any]:
    """The record of an audit whose training is the formula."""
    numbers = draw([each.number for each in courses if each.state == "pruned"], fraction, seed)
    return record(courses, {str(number): {"curve": whole[number], **LAW} for number in numbers}, len(numbers), seed)


# -- the statistics ------------------------------------------------------------------------------------------------


def test_the_whole_audit_gives_the_known_answer(curves: Any) -> None:
    courses, whole, _ = curves
    pruned = [each for each in courses if each.state == "pruned"]
    ended = [each for each in courses if each.state == "complete"]
    best = max(each.curve[-1] for each in ended)
    better = sum(whole[each.number][-1] > best for each in pruned)
    assert len(pruned) > 20
    assert 0 < better < len(pruned), "the curves must make pruning wrong about some"
    found = audited(courses, whole, 1.0, seed=3)
    assert (found["pruned"], found["audited"], found["better"]) == (len(pruned), len(pruned), better)
    assert found["share_better"] == better / len(pruned)
    assert found["interval"] == [better / len(pruned), better / len(pruned)]
    assert found["winner"]["value"] == best
    assert found["best_audited"]["value"] == max(whole[each.number][-1] for each in pruned)
    # Every analytic epoch takes half a second, and a trial is told to have taken a second an epoch.
    missing = sum(EPOCHS - len(each.curve) for each in pruned)
    assert found["saved"]["seconds"] == 0.5 * missing
    assert found["saved"]["hours"] == 0.5 * missing / 3600
    assert found["saved"]["share"] == 0.5 * missing / (0.5 * missing + sum(len(each.curve) for each in courses))


def test_the_rank_correlations_of_the_whole_audit_are_those_of_all_curves(curves: Any) -> None:
    courses, whole, _ = curves
    numbers = [each.number for each in courses if each.state in ("complete", "pruned")]
    found = audited(courses, whole, 1.0, seed=0)["correlation"]
    assert [each["epoch"] for each in found] == list(range(1, EPOCHS))
    for each in found:
        then = [whole[number][each["epoch"] - 1] for number in numbers]
        assert each["rho"] == pytest.approx(spearmanr(then, [whole[number][-1] for number in numbers]).statistic)
        assert each["trials"] == len(numbers)
    assert found[0]["rho"] < found[-1]["rho"]
    assert {each["epoch"] for each in found if each["pruned"]} == {
        len(each.curve) for each in courses if each.state == "pruned"
    }


def test_smaller_audits_are_right_on_average_and_their_intervals_hold(curves: Any) -> None:
    courses, whole, _ = curves
    truth = audited(courses, whole, 1.0, seed=0)
    small = [audited(courses, whole, 0.25, seed) for seed in range(300)]
    shares = [each["share_better"] for each in small]
    error = statistics.stdev(shares) / math.sqrt(len(shares))
    assert statistics.fmean(shares) == pytest.approx(truth["share_better"], abs=4 * error)
    covered = [each["interval"][0] <= truth["share_better"] <= each["interval"][1] for each in small]
    assert statistics.fmean(covered) >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / len(small))
    for place, exact in enumerate(truth["correlation"]):
        guesses = [each["correlation"][place]["rho"] for each in small]
        # A correlation from a sample is a little biased, and much less than it varies.
        assert abs(statistics.fmean(guesses) - exact["rho"]) < statistics.stdev(guesses)


@settings(max_examples=60, **SETTINGS)
@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size), st.integers(0, size))))
def test_the_interval_covers_in_every_population_and_sample(sizes: tuple[int, int, int]) -> None:
    population, sample, total = sizes
    counts = numpy.arange(max(0, sample - (population - total)), min(sample, total) + 1)
    chances = hypergeom.pmf(counts, population, total, sample)
    intervals = [share_interval(int(count), sample, population) for count in counts]
    covered = sum(
        chance
        for chance, (low, high) in zip(chances, intervals, strict=True)
        if low - 1e-12 <= total / population <= high + 1e-12
    )
    assert covered >= 0.95
    assert all(low <= count / sample <= high for count, (low, high) in zip(counts, intervals, strict=True))


PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5)), min_size=2, max_size=12)


@settings(max_examples=100, **SETTINGS)
@given(PAIRS)
def test_a_weight_counts_as_repeating_the_pair(pairs: list[tuple[int, int, int]]) -> None:
    first, second, weights = (list(each) for each in zip(*pairs, strict=True))
    found = rank_correlation(first, second, weights)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        repeated = [(one, other) for one, other, weight in pairs for _ in range(weight)]
        assert found == pytest.approx(spearmanr(*zip(*repeated, strict=True)).statistic, abs=1e-12)


# -- the sample ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, **SETTINGS)
@given(
    st.sets(st.integers(0, 500), min_size=1, max_size=60), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 99)
)
def test_a_larger_fraction_extends_the_sample(numbers: set[int], one: float, other: float, seed: int) -> None:
    small, large = (draw(numbers, fraction, seed) for fraction in sorted((one, other)))
    assert large[: len(small)] == small
    assert len(large) == len(set(large)) >= max(1, max(one, other) * len(numbers) - 1e-6)
    assert draw(numbers, min(one, other), seed, done=large) == large
    assert sorted(draw(numbers, 1.0, seed)) == sorted(numbers)


def test_every_pruned_trial_has_the_same_chance() -> None:
    drawn = Counter(number for seed in range(2000) for number in draw(range(10), 0.3, seed))
    # 2000 draws of 3 of 10: 600 each, with a standard deviation of 20.
    assert all(abs(drawn[number] - 600) < 80 for number in range(10))


def test_what_is_new_in_an_extended_study_does_not_change_the_order_of_the_rest() -> None:
    before, after = drawing_order(range(20), 0), drawing_order(range(40), 0)
    assert [number for number in after if number < 20] == before


@pytest.mark.parametrize(("fraction", "count"), [(0.07, 7), (0.071, 8), (1e-9, 1), (1.0, 100)])
def test_the_sample_is_the_fraction_rounded_up(fraction: float, count: int) -> None:
    assert len(draw(range(100), fraction, 0)) == count


# -- corner cases and words ----------------------------------------------------------------------------------------


def course(number: int, state: str, *curve: float, epochs: int = 3) -> Course:
    return Course(number=number, state=state, epochs=epochs, curve=curve, seconds=2.0 * len(curve), epoch_seconds=2.0)


COURSES = [
    course(0, "complete", 0.1, 0.4, 0.8),
    course(1, "pruned", 0.05),
    course(2, "complete", 0.2, 0.5, 0.7),
    course(3, "pruned", 0.3, 0.3),
    course(4, "diverged", 0.1),
]


def test_only_the_front_of_the_order_counts() -> None:
    first, second = drawing_order([1, 3], 0)
    with pytest.raises(ValueError, match="audited one"):
        record(COURSES, {str(second): {"curve": [0.1, 0.2, 0.9], **LAW}}, 1, 0)
    found = record(COURSES, {str(first): {"curve": [0.1, 0.2, 0.8], **LAW}}, 2, 0)
    assert (found["audited"], found["better"], found["tied"]) == (1, 0, 1)
    assert found["better_is_lower_bound"]
    assert found["interval"] == [0.0, 0.5]


def test_one_that_diverges_is_below_all_others() -> None:
    results = {"1": {"curve": [0.05], **LAW, "state": "diverged"}, "3": {"curve": [0.3, 0.3, 0.9], **LAW}}
    found = record(COURSES, results, 2, 0)
    assert (found["better"], found["tied"], found["diverged"]) == (1, 0, 1)
    assert found["best_audited"] == {"trial": 3, "value": 0.9}
    # Trial 1 is last after each epoch and at the end: 0.05, 0.1, 0.2, 0.3 against -, 0.8, 0.7, 0.9.
    assert found["correlation"][0]["rho"] == pytest.approx(spearmanr([1, 2, 3, 4], [1, 3, 2, 4]).statistic)
    json.dumps(found, allow_nan=False)


def test_the_sentences_of_a_partial_audit() -> None:
    number = drawing_order([1, 3], 0)[0]
    results = {str(number): {"curve": [0.05, 0.1, 0.2], **LAW}}
    assert audit_sentences(record(COURSES, results, 2, 0), "accuracy") == [
        "Of 5 trials 2 were pruned; 1 of them, drawn at random, was trained to the end. 1 more was requested; run the "
        "same command again.",
        "Pruning saved 6.0 s, 23.08 % of what the search would have taken without it.",
        "0 of the 1 would have beaten the winner, trial 0 with a validation accuracy of 80.00 %: 0.00 % of the pruned "
        "trials, 95 % interval 0.00 % to 50.00 % (hypergeometric, exact). That is a lower bound: the winner's "
        "value was selected as the highest, so it is biased upwards.",
        f"The best of them, trial {number}, reached 20.00 %.",
        "At pruning epochs, the rank correlation with final values (Spearman) is 0.78 after epoch 1, "
        "0.78 after epoch 2. That is a hint only, from 3 trials.",
        "It repeated its recorded epochs to the last bit.",
    ]


def test_the_sentences_of_a_whole_audit_name_what_was_not_repeated() -> None:
    moved = {"curve": [0.3, 0.2, 0.9], "state": "complete", "same": False, "explanation": "Different from then: x."}
    results = {"1": {"curve": [0.05], **LAW, "state": "diverged"}, "3": moved}
    said = audit_sentences(record(COURSES, results, 2, 0), "accuracy")
    assert said[0] == "Of 5 trials 2 were pruned; all of them were trained to the end."
    assert ": 50.00 % of the pruned trials. That is a lower bound: " in said[2]
    assert said[3] == "The best of them, trial 3, reached 90.00 %; 1 diverged."
    assert said[-1].endswith("were used: trial 3 (Different from then: x).")


# -- the training --------------------------------------------------------------------------------------------------


def pruning_study(cache: Path | str, checkpoint_seconds: float = 60.0) -> Study:
    """Ten small trials of four epochs that learn a little, of which ASHA prunes some."""
    study = small_study(cache)
    train = dataclasses.replace(
        study.train,
        data=Garden(train_per_class=4, val_per_class=8, test_per_class=2, cache=str(cache)),
        optim=OptimConfig(base_lr=3e-2, depth_lr_mult=1.0),
        epochs=4,
        label_smoothing=0.0,
        checkpoint_seconds=checkpoint_seconds,
    )
    return dataclasses.replace(
        study,
        train=train,
        space=study.space | {"optim.base_lr": Float(3e-3, 1e-1, log=True)},
        pruner=asha(min_epochs=1, reduction=2),
        trials=10,
        final=FinalConfig(seeds=1, compare_base=False),
    )


def place_of(folder: Path, cache: Path) -> Study:
    """Write the study's file into a folder as a user has one."""
    (folder / "studies").mkdir()
    text = f"from tests.final.test_audit import pruning_study\n\nSTUDY = pruning_study({str(cache)!r})\n"
    (folder / "studies" / "tiny.py").write_text(text)
    return pruning_study(cache)


def run_to_the_end(study: Study, folder: Path) -> None:
    """Run a study in `folder`/studies as the command does, without MLflow."""
    content = {"data": prepare(study.train.data, IMAGENET), "weights": study.train.backbone.fingerprint()}
    beside = folder / "studies"
    with open_store(study, f"sqlite:///{beside}/tiny.db", content) as store:
        runtime = decide_runtime(study.train, None)
        store.set_attribute("runtime", runtime.to_dict())
        context = Context(study=study, store=store, runtime=runtime, checkpoints=beside / "tiny.checkpoints")
        for _ in run_study(context, beside / "tiny.model"):
            pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_to_the_end(place_of(folder, image_cache), folder)
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study, as the working directory."""
    return copied(finished, tmp_path, monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command("audit", capsys)


def stored(place: Path) -> tuple[str, dict[str, Any] | None]:
    """The study's digest, and its audit."""
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        return digest(store), store.attributes().get("audit")


def trained(out: str) -> list[int]:
    """The trials that the command trained, in order."""
    return list(dict.fromkeys(int(line.split()[1]) for line in out.splitlines() if line.startswith("trial ")))


@pytest.mark.slow
def test_pruned_trials_are_trained_to_the_end_that_they_would_have_had(
    place: Path, run: Run, image_cache: Path
) -> None:
    before, _ = stored(place)
    code, out, err = run("--fraction", "1")
    assert (code, err) == (0, "")
    after, found = stored(place)
    assert after == before, "the study itself is what it was"
    assert found is not None
    study = pruning_study(image_cache)
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        pruned = {trial.number: trial for trial in store.trials() if trial.state == "pruned"}
        assert wanted_keys(study, store, place / "studies" / "tiny.model") == set()
    assert len(pruned) > 1
    assert sorted(trained(out)) == sorted(pruned)
    assert found["audited"] == len(pruned)
    for number, trial in pruned.items():
        training = assemble(
            study.config(trial.params), decide_runtime(study.train, None), derive_seed(study.seed, "trial", number)
        )
        alone = [result.val.accuracy for result in fit(training) if result.val is not None]
        assert found["results"][str(number)] == {"curve": alone, **LAW}
    report = place / "studies" / "tiny.report" / "report.html"
    assert out.endswith("\n".join([*audit_sentences(found, "accuracy"), f"report    {report}"]) + "\n")
    assert not (place / "studies" / "tiny.checkpoints").exists()


@pytest.mark.slow
def test_show_has_the_audit(place: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--fraction", "0.1")
    assert main(["show", "tiny", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["audit"] == stored(place)[1]
    assert shown["audit"]["audited"] == 1


@pytest.mark.slow
def test_the_report_and_its_copy_in_mlflow_have_the_audit(place: Path, run: Run, mlruns: Path) -> None:
    folder = place / "studies" / "tiny.report"
    with open_store(pruning_study("cache"), f"sqlite:///{place}/studies/tiny.db") as store:
        write_report("tiny", store, "", folder)
        tracker = local_tracker(mlruns)
        tracker.start(pruning_study("cache"), store, {})
        assert tracker.finish({}, [folder], "complete")
    before = (folder / "report.html").read_text(encoding="utf-8")
    assert run("--fraction", "0.1")[0] == 0
    after = (folder / "report.html").read_text(encoding="utf-8")
    sentence = audit_sentences(stored(place)[1] or {}, "accuracy")[0]
    assert sentence in after
    assert sentence not in before
    (copy,) = mlruns.rglob("artifacts/**/report.html")
    assert copy.read_text(encoding="utf-8") == after


@pytest.mark.slow
def test_an_mlflow_that_is_away_or_none_costs_no_audit(place: Path, run: Run) -> None:
    code, out, err = run("--fraction", "0.1", "--tracking-uri", "ftp://nowhere")
    assert (code, out) == (2, "")
    assert "is not an MLflow server" in err
    code, out, _ = run("--fraction", "0.1", "--tracking-uri", "http://127.0.0.1:9")
    assert code == 0
    assert "MLflow at http://127.0.0.1:9 cannot be used" in out.splitlines()[-1]
    assert "run the same command to write it" in out.splitlines()[-1]
    assert (place / "studies" / "tiny.report" / "report.html").is_file()


@pytest.mark.slow
def test_nothing_is_trained_twice(place: Path, run: Run) -> None:
    first = trained(run("--fraction", "0.1")[1])
    assert len(first) == 1
    more = trained(run("--fraction", "1")[1])
    assert not set(first) & set(more)
    _, whole = stored(place)
    for fraction in ("1", "0.1"):
        code, out, _ = run("--fraction", fraction)
        assert (code, trained(out)) == (0, [])
        assert stored(place)[1] == whole
    assert whole is not None
    code, out, _ = run("--fraction", "1", "--seed", "7")
    assert (code, trained(out)) == (0, []), "another order of the same trials"


@pytest.mark.slow
def test_epochs_that_come_out_otherwise_are_named(place: Path, run: Run) -> None:
    numbers = trained(run("--fraction", "1")[1])
    with open_store(pruning_study("cache"), f"sqlite:///{place}/studies/tiny.db") as store:
        store.set_attribute("audit", None)
    change(place, numbers[0], "epochs", lambda epochs: [each | {"lr": 1.0} for each in epochs])
    code, out, _ = run("--fraction", "1")
    assert code == 0
    assert f"trial {numbers[0]}  epoch 1/4" in out
    assert "DIFFERENT from the record" in out
    assert f"trial {numbers[0]} (Versions, device, threads and commit are the same" in out.splitlines()[-2]


@pytest.mark.slow
@pytest.mark.parametrize("fraction", ["0", "-0.1", "1.01", "nan", "ten", ""])
def test_a_fraction_that_is_none_is_refused(place: Path, run: Run, fraction: str) -> None:
    code, out, err = run(f"--fraction={fraction}")
    assert (code, out) == (2, "")
    assert "above 0 and at most 1" in err


@pytest.mark.slow
def test_a_study_without_pruned_trials_is_a_result(tmp_path: Path, image_cache: Path, run: Run) -> None:
    (tmp_path / "studies").mkdir()
    study = small_study(image_cache)
    run_to_the_end(study, tmp_path)
    file = tmp_path / "studies" / "tiny.py"
    file.write_text(f"from tests.small import small_study\n\nSTUDY = small_study({str(image_cache)!r})\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        code, out, err = run()
    assert (code, err) == (0, "")
    assert out == "Study 'tiny' has no pruned trials; there is nothing to audit.\n"


def refused(run: Run, *words: str) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_a_study_that_has_not_begun_is_refused(tmp_path: Path, image_cache: Path, run: Run) -> None:
    place_of(tmp_path, image_cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        refused(run, "has no results yet")


@pytest.mark.slow
@pytest.mark.slow
def test_a_study_under_way_is_refused(place: Path, run: Run, image_cache: Path) -> None:
    with open_store(pruning_study(image_cache), f"sqlite:///{place}/studies/tiny.db") as store:
        refused(run, "is being run by process")
        store.ask(pruning_study(image_cache))
        store.set_attribute("wanted", 11)
    refused(run, "Trial 10 of study 'tiny' is not finished", "run the study to its end first")


@pytest.mark.slow
def test_a_study_whose_final_run_is_missing_is_refused(place: Path, run: Run, image_cache: Path) -> None:
    with open_store(pruning_study(image_cache), f"sqlite:///{place}/studies/tiny.db") as store:
        store.set_attribute("final", None)
        store.set_attribute("ledger", None)
    refused(run, "The final run of study 'tiny' is missing")


@pytest.mark.parametrize(("number", "stops", "code"), [(signal.SIGKILL, (2, 7), -9), (signal.SIGINT, (3,), 130)])
@pytest.mark.slow
def test_an_audit_that_was_stopped_comes_to_the_same_record(
    place: Path, run: Run, number: signal.Signals, stops: tuple[int, ...], code: int
) -> None:
    file = place / "studies" / "tiny.py"
    file.write_text(file.read_text().replace("')", "', checkpoint_seconds=0.0)"))  # a checkpoint after each batch

    def child(lines: int) -> int:
        """Run the command and send it the signal after so many epochs; returns the exit code."""
        process = Process(["-m", "harness", "audit", "tiny", "--fraction", "1"], cwd=place, stderr=subprocess.PIPE)
        read = 0
        for line in process.stdout:
            read += line.startswith("trial ")
            if read == lines:
                process.send_signal(number)
                break
        again = "-m harness audit tiny --fraction 1\n"
        assert process.stdout.read().endswith(again) == (number == signal.SIGINT)
        return process.wait()

    before, _ = stored(place)
    assert [child(lines) for lines in stops] == [code] * len(stops)
    assert list((place / "studies").glob("tiny.checkpoints/*")) != [], "it was stopped in the middle of a trial"
    assert run("--fraction", "1")[0] == 0
    after, found = stored(place)
    assert after == before
    assert list((place / "studies").glob("tiny.checkpoints/*")) == []
    with open_store(pruning_study("cache"), f"sqlite:///{place}/studies/tiny.db") as store:
        store.set_attribute("audit", None)
    assert run("--fraction", "1")[0] == 0
    assert stored(place)[1] == found


@pytest.mark.slow
def test_checkpoints_of_audits_are_left_alone_until_the_trial_is_recorded(place: Path, image_cache: Path) -> None:
    study = pruning_study(image_cache)
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        pruned = [trial.number for trial in store.trials() if trial.state == "pruned"]
        assert wanted_keys(study, store, place / "studies" / "tiny.model") == {audit_key(number) for number in pruned}
