"""The main job in processes of its own, killed for real: SQLite, MLflow and the command line as a user has them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from harness.store.opening import read_store
from tests.conftest import PROJECT
from tests.forked import Process

pytestmark = pytest.mark.slow

STUDY_FILE = """
from harness.config.train import RuntimeConfig, FinalConfig, OptimConfig, TrainConfig
from harness.config.study import Study
from harness.garden.dataset import Garden
from harness.models.maxvit import TinyMaxViT
from harness.search.pruners import asha
from harness.search.samplers import gp, tpe
from harness.config.space import Choice, Float
from tests.faulty import Unhurried

STUDY = Study(
    name="small",
    train=TrainConfig(
        data=Garden(train_per_class=2, val_per_class=2, test_per_class=2),
        backbone={backbone},
        optim=OptimConfig(base_lr=1e-3, depth_lr_mult=0.5),
        runtime=RuntimeConfig(precision="fp32", channels_last="on", compile="off"),
        epochs=3,
    ),
    space={{
        "backbone.dropout": Float(0.0, 0.6),
        "backbone.hidden": Choice(((16,), (16, 8))),
        "optim.base_lr": Float(1e-4, 1e-2, log=True),
        "optim.depth_lr_mult": Float(0.0, 1.0),
    }},
    sampler={sampler},
    pruner=asha(min_epochs=1, reduction=2),
    trials=6,
    final=FinalConfig(seeds=2, publish=False),
)
"""


BACKBONES = {"small": "Unhurried(hidden=(16,))", "MaxViT": "TinyMaxViT(hidden=(16,))"}


def write_study(place: Path, backbone: str, sampler: str = "tpe(n_startup_trials=3)") -> None:
    (place / "studies").mkdir()
    (place / "studies" / "small.py").write_text(STUDY_FILE.format(backbone=BACKBONES[backbone], sampler=sampler))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_study(tmp_path, "small")
    return tmp_path


def start(place: Path, *arguments: str) -> Process:
    return Process([str(PROJECT / "run_study.py"), "--study", "small", *arguments], cwd=place)


def run(place: Path, *arguments: str) -> str:
    process = start(place, *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def outcome(place: Path) -> dict[str, Any]:
    """All that two equal studies must agree on."""
    with read_store("small", f"sqlite:///{place}/studies/small.db") as store:
        assert [t for t in store.optuna_study.get_trials() if t.state in (TrialState.RUNNING, TrialState.WAITING)] == []
        trials = [(t.number, t.state, t.value, t.params, t.curve) for t in store.trials()]
        losses = [[(each.train, each.val) for each in t.epochs] for t in store.trials()]
        final = store.attributes().get("final")
        # The seeds' epochs carry seconds, and their weights' sha256 says all that the epochs do.
        for result in filter(None, (final, final["base"])):
            result["per_seed"] = [{k: v for k, v in seed.items() if k != "epochs"} for seed in result["per_seed"]]
        assert final.pop("ledger") == store.ledger()[-1]["hash"]  # there the time is kept, too
        return {"trials": trials, "losses": losses, "final": final}


def check_mlflow(place: Path, trials: int, seeds: int) -> None:
    """One run a trial and seed, none open, no step twice."""
    client = MlflowClient(f"sqlite:///{place}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert [run.info.run_name for run in runs if run.info.status == "RUNNING"] == []
    kinds = [run.data.tags.get("harness.kind") for run in runs]
    assert (kinds.count("trial"), kinds.count(None)) == (trials, 1)
    assert kinds.count("final") % seeds == 0
    for each in runs:
        for name in ("train_loss", "val_accuracy"):
            steps = [metric.step for metric in client.get_metric_history(each.info.run_id, name)]
            assert steps == sorted(set(steps)), f"{each.info.run_name} has a step of {name} twice"


def uninterrupted_in(place: Path, backbone: str) -> dict[str, Any]:
    write_study(place, backbone)
    run(place)
    check_mlflow(place, trials=6, seeds=2)
    return outcome(place)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return uninterrupted_in(tmp_path_factory.mktemp("uninterrupted"), "small")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_study_killed_again_and_again_ends_as_one_that_was_not(
    tmp_path: Path, backbone: str, request: pytest.FixtureRequest
) -> None:
    if backbone == "small":
        uninterrupted = request.getfixturevalue("uninterrupted")
    else:
        (tmp_path / "uninterrupted").mkdir()
        uninterrupted = uninterrupted_in(tmp_path / "uninterrupted", backbone)
    place = tmp_path / "killed"
    place.mkdir()
    write_study(place, backbone)
    chance = random.Random(1)
    kills = 0
    # One kill at a random moment of each process's life, from its imports to the final run, then a last one in peace.
    for words in ("trial 0", "trial 2", "trial 4", "final seed", "final seed 1"):
        process = start(place)
        for line in process.stdout:
            if line.startswith(words):
                time.sleep(chance.uniform(0, 0.6))
                break
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    run(place)
    assert outcome(place) == uninterrupted
    check_mlflow(place, trials=6, seeds=2)


def test_killed_before_anything_is_written_and_while_databases_are_made(
    place: Path, uninterrupted: dict[str, Any]
) -> None:
    command = [sys.executable, str(PROJECT / "run_study.py"), "--study", "small"]
    for seconds in (1.0, 5.0, 7.0):
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        time.sleep(seconds)
        process.kill()
        process.wait()
    run(place)
    assert outcome(place) == uninterrupted
    check_mlflow(place, trials=6, seeds=2)


def test_the_same_command_again_is_a_no_op_and_a_larger_total_extends(
    place: Path, uninterrupted: dict[str, Any]
) -> None:
    run(place, "--trials", "3")
    with read_store("small", f"sqlite:///{place}/studies/small.db") as store:
        first = store.attributes().get("final")
    assert "Nothing is missing: 3 trials are finished" in run(place, "--trials", "3")
    run(place, "--trials", "6")
    extended = outcome(place)
    assert extended["trials"] == uninterrupted["trials"]
    openings = 1 if first["trial"] == uninterrupted["final"]["trial"] else 2
    if openings == 2:
        assert extended["final"]["trial"] == first["trial"], "the test set stays closed"
        run(place, "--trials", "6", "--reopen-test", "a longer search")
        extended = outcome(place)
        again = run(place, "--trials", "6", "--reopen-test", "a longer search")
        assert "Nothing is missing" in again, "as after a stop, whose command says it again"
    expected = uninterrupted["final"] | {"test_openings": openings}
    if openings == 1:  # what the choice adds is known of the trials that it was made among
        expected["selection"] = first["selection"]
    assert extended["final"] == expected
    check_mlflow(place, trials=6, seeds=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_with_130_and_the_command_that_goes_on(
    place: Path, uninterrupted: dict[str, Any], number: signal.Signals
) -> None:
    process = start(place)
    for line in process.stdout:
        if line.startswith("trial 1"):
            break
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 130, rest
    assert "run_study.py --study small" in rest.strip().splitlines()[-1]
    assert "Traceback" not in rest
    client = MlflowClient(f"sqlite:///{place}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert {each.info.status for each in runs} <= {"FINISHED", "KILLED"}
    run(place)
    assert outcome(place) == uninterrupted


def test_when_its_reader_leaves_a_study_goes_on_and_still_says_how_after_an_interrupt(place: Path) -> None:
    command = [str(PROJECT / "run_study.py"), "--study", "small", "--trials", "40"]
    process = Process(command, cwd=place, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stdout:
        if line.startswith("trial 0"):
            break
    process.stdout.close()  # `| head`
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130, said
    assert said.splitlines()[-2] == "Resume with:", said
    assert "Traceback" not in said


def test_a_second_process_is_refused_and_told_the_first_ones_pid(place: Path) -> None:
    first = start(place)
    for line in first.stdout:
        if line.startswith("Study small"):
            break
    second = start(place)
    output, _ = second.communicate()
    first.kill()
    first.wait()
    assert second.returncode == 2, output
    assert f"is being run by process {first.pid}" in output


def test_fresh_moves_the_old_study_aside(place: Path) -> None:
    run(place, "--trials", "1", "--set", "epochs=1")
    old = outcome(place)
    run(place, "--trials", "1", "--fresh")
    kept = list((place / "studies").glob("small.2*.db"))
    assert len(kept) == 1
    with read_store("small", f"sqlite:///{kept[0]}") as store:
        assert store.attributes()["final"]["per_seed"][0]["weights"] == old["final"]["per_seed"][0]["weights"]
    assert kept[0].with_suffix(".model").is_dir()


def test_two_studies_started_at_once_in_an_empty_folder_do_not_harm_each_other(place: Path) -> None:
    other = (place / "studies" / "small.py").read_text().replace('name="small"', 'name="other"')
    (place / "studies" / "other.py").write_text(other)
    quick = ("--trials", "1", "--set", "epochs=1", "--set", "final.seeds=1")
    processes = [start(place, *quick), start(place, *quick), start(place, *quick, "--study", "other")]
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes[:2]) == [0, 2], outputs
    assert codes[2] == 0, outputs[2]
    assert "Traceback" not in "".join(outputs)


def test_a_lost_model_is_made_again_and_the_test_set_stays_closed(place: Path) -> None:
    run(place, "--trials", "1")
    before, weights = outcome(place), (place / "studies" / "small.model" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "studies" / "small.model")
    run(place, "--trials", "1")
    assert (place / "studies" / "small.model" / "model.safetensors").read_bytes() == weights
    assert outcome(place) == before
    check_mlflow(place, trials=1, seeds=2)
    # Another storage has a model of its own.
    run(place, "--trials", "1", "--set", "epochs=1", "--storage", f"sqlite:///{place}/elsewhere.db")
    assert (place / "elsewhere.model" / "model.safetensors").is_file()
    assert (place / "studies" / "small.model" / "model.safetensors").read_bytes() == weights


def test_show_json_and_the_saved_model_agree_with_the_run(place: Path) -> None:
    run(place, "--trials", "1")
    show = Process(["-m", "harness", "show", str(place / "studies" / "small.py"), "--json"], cwd=PROJECT)
    shown = json.loads(show.communicate()[0])
    assert shown["trials"] == {"complete": 1, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}
    assert shown["final"]["accuracy"] == shown["final"]["correct"] / shown["final"]["total"]
    model = json.loads((place / "studies" / "small.model" / "model.json").read_text())
    assert model["test"]["correct"] == shown["final"]["per_seed"][0]["correct"]
    assert len(model["classes"]) == 16
    assert set(model["test"]) == {"seed", "correct", "total", "accuracy"}
