"""Faults inside a training, injected for real: no memory, no numbers, damaged files, exceptions."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from harness import engine, trainer
from harness.checkpoint import Damaged, read_tensors, write_tensors
from harness.config import OptimConfig, Study
from harness.data.tensors import load_test
from harness.engine import Runtime, accumulate_gradient, train_step
from harness.errors import Halt
from harness.experiment import assemble
from harness.mlflow_places import local_tracker
from harness.results import EpochEnded, Event, TrialEnded, TrialStarted
from harness.space import Float
from harness.storage import Store, TrialRecord
from harness.study import TooManyFailures
from harness.trainer import evaluate
from tests.conftest import PROJECT
from tests.faulty import Died, Pebble, complete, images, small_study
from tests.test_tracking import runs_of

CPU = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)


@pytest.fixture
def study(image_cache: Path) -> Study:
    return small_study(image_cache)


@pytest.fixture(scope="module")
def undisturbed(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The study that nothing happened to."""
    return complete(small_study(image_cache), tmp_path_factory.mktemp("undisturbed"))


def trials_of(store: Store) -> list[TrialRecord]:
    return store.trials()


# -- out of memory -------------------------------------------------------------------------------------------------


def room_for(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let memory run out when more than `most` images pass at once; returns the sizes that were tried, in order."""
    sizes: list[int] = []

    def limited(model: Any, batch: Tensor, labels: Any, runtime: Any, smoothing: float, size: int) -> Any:
        sizes.append(size)
        if size > most:
            accumulate_gradient(model, batch[:1], labels[:1], runtime, smoothing, 1)  # the attempt leaves a part
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return accumulate_gradient(model, batch, labels, runtime, smoothing, size)

    monkeypatch.setattr("harness.engine.accumulate_gradient", limited)
    return sizes


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize("most", [1, 3, 5, 10])
def test_micro_batches_give_the_gradient_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    torch.manual_seed(0)
    model = Pebble().build(16, 16)
    batch, labels = images(10)
    whole = F.cross_entropy(model(batch), labels, label_smoothing=0.1)
    whole.backward()
    wanted = gradient_of(model)
    room_for(monkeypatch, most)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    done = train_step(model, batch, labels, optimizer, CPU, label_smoothing=0.1, clip_norm=None)
    assert done.micro_batch == {1: 1, 3: 3, 5: 5, 10: 10}[most]
    assert torch.allclose(gradient_of(model), wanted, rtol=1e-4, atol=1e-7)
    assert done.loss.item() == pytest.approx(10 * whole.item(), rel=1e-6)
    assert done.grad_norm.item() == pytest.approx(wanted.norm().item(), rel=1e-5)


def test_a_smaller_batch_draws_the_same_dropout_again(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, labels = images(8)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 16))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = []
    for most, size in ((8, 4), (4, None)):  # told to take parts of 4, and driven to it
        model.load_state_dict(start)
        with monkeypatch.context() as patch, engine.seeded(1, CPU.device):
            room_for(patch, most)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            train_step(model, batch, labels, optimizer, CPU, label_smoothing=0.0, clip_norm=None, micro_batch=size)
            gradients.append(gradient_of(model))
    assert torch.equal(*gradients)


def test_a_trial_without_memory_goes_on_with_smaller_parts_of_the_same_batch(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = complete(study, tmp_path, look=trials_of)
    (tmp_path / "parts").mkdir()
    sizes = room_for(monkeypatch, 5)
    parts = complete(study, tmp_path / "parts", look=trials_of)
    assert {each.micro_batch for trial in whole for each in trial.epochs} == {16}
    assert {each.micro_batch for trial in parts for each in trial.epochs} == {4}
    assert [trial.state for trial in parts] == ["complete"] * 3
    assert parts[0].epochs[-1].train.loss == pytest.approx(whole[0].epochs[-1].train.loss, rel=1e-4)
    assert sizes[:5] == [16, 8, 4, 4, 4]  # found out once in a training
    assert "Out of memory: going on with 4 images at a time, accumulated to the same batch." in capsys.readouterr().err


def test_the_size_that_fits_survives_a_kill(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small_study(study.train.data.cache, checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        room_for(patch, 5)
        wanted = complete(study, tmp_path)
    killed = tmp_path / "killed"
    killed.mkdir()
    with monkeypatch.context() as patch:
        sizes = room_for(patch, 5)
        limited = engine.accumulate_gradient

        def dies(*arguments: Any) -> Any:
            if len(sizes) == 5:  # in the second epoch
                raise Died
            return limited(*arguments)

        patch.setattr("harness.engine.accumulate_gradient", dies)
        with pytest.raises(Died):
            complete(study, killed)
    with monkeypatch.context() as patch:
        sizes = room_for(patch, 5)
        assert complete(study, killed) == wanted
    assert sizes[0] == 4


def test_no_memory_for_one_image_fails_the_trial_and_three_in_a_row_the_study(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Event] = []
    with monkeypatch.context() as patch:
        sizes = room_for(patch, 0)
        with pytest.raises(TooManyFailures, match="3 trials in a row failed, the last one with MemoryError: out"):
            complete(study, tmp_path, at=ended.append)
    assert sizes == [16, 8, 4, 2, 1] * 3
    trials = complete(study, tmp_path, look=trials_of)
    assert [trial.state for trial in trials] == ["failed"] * 3
    assert "out of memory with one image at a time" in str(trials[0].reason)
    assert "Tried to allocate" in str(trials[0].reason)


def test_a_trial_without_memory_does_not_keep_the_next_one_from_training(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_fails(event: Event) -> None:
        if isinstance(event, TrialEnded):
            monkeypatch.undo()

    room_for(monkeypatch, 0)
    trials = complete(study, tmp_path, at=first_fails, look=trials_of)
    assert [trial.state for trial in trials] == ["failed", "complete", "complete"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_evaluation_without_memory_halves_its_batches_and_gives_the_same(
    study: Study, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    training = assemble(study.train, CPU, seed=0)
    assert training.val is not None
    wanted = evaluate(training.model, training.val, CPU)
    passed, predict = [], trainer.predict

    def limited(model: nn.Module, batch: Tensor, runtime: Runtime) -> Tensor:
        passed.append(len(batch))
        if len(batch) > 5:
            raise error
        return predict(model, batch, runtime)

    monkeypatch.setattr("harness.trainer.predict", limited)
    found = evaluate(training.model, training.val, CPU)
    assert (found.correct, found.total) == (wanted.correct, wanted.total)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert max(passed[-8:]) == 4
    assert sum(passed[-8:]) == 32


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "MPS backend out of memory (MPS allocated: 1.0 GB)",
    ],
)
def test_words_of_torch_without_memory_are_understood(text: str) -> None:
    assert engine.is_out_of_memory(RuntimeError(text))
    assert not engine.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not engine.is_out_of_memory(OSError(text))


SHORT_OF_MEMORY = """
import resource, sys
import torch
from torch import nn
from harness.data.tensors import load_test
from harness.engine import Runtime, train_step
from harness.trainer import logits_of
from harness.data.tensors import ImageSet

torch.set_num_threads(1)
layers = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)
model = nn.Sequential(*layers)
images, labels = torch.randn(64, 3, 128, 128), torch.arange(64) % 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
cpu = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)
train_step(model, images[:4], labels[:4], optimizer, cpu, label_smoothing=0.0, clip_norm=None)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 220_000_000, resource.RLIM_INFINITY))
done = train_step(model, images, labels, optimizer, cpu, label_smoothing=0.0, clip_norm=None)
pixels = torch.zeros(128, 128, 128, 3, dtype=torch.uint8)
logits = logits_of(model, ImageSet(images=pixels, labels=torch.zeros(128)), cpu)
print(done.micro_batch, bool(done.loss.isfinite()), len(logits))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
def test_a_process_at_its_limit_of_memory_trains_and_evaluates_in_parts() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, finite, evaluated = done.stdout.split()
    assert 1 <= int(size) < 64
    assert (finite, evaluated) == ("True", "128")


# -- no numbers ----------------------------------------------------------------------------------------------------


def poison_weights(model: nn.Module, step: int) -> None:
    if step == 3:
        next(model.parameters()).data.fill_(math.nan)


def explode_gradient(model: nn.Module, step: int) -> None:
    """An infinite gradient beside a loss that is a finite number."""
    if step == 3:
        parameter = next(model.parameters())
        parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


@pytest.mark.parametrize("harm", [poison_weights, explode_gradient])
def test_a_trial_ends_with_the_epoch_in_which_its_numbers_ended(
    harm: Callable[[nn.Module, int], None], image_cache: Path, tmp_path: Path, mlruns: Path, monkeypatch: Any
) -> None:
    study, steps = small_study(image_cache, epochs=4), 0

    def harmed(model: nn.Module, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        harm(model, steps)
        return accumulate_gradient(model, *arguments)

    monkeypatch.setattr("harness.engine.accumulate_gradient", harmed)
    seen: list[Event] = []
    trials = complete(study, tmp_path, local_tracker(mlruns), at=seen.append, look=trials_of)
    assert [trial.state for trial in trials] == ["diverged", "complete", "complete"]
    assert [event.result.epoch for event in seen if isinstance(event, EpochEnded) and event.number == 0][:1] == [1]
    assert len(trials[0].epochs) == 1  # the second epoch, of two steps, had no numbers any more
    told = trials[0]
    described = told_of(tmp_path)
    assert (described["epoch"], described["step"]) == (2, 1)
    assert described["lr"] == pytest.approx(study.train.optim.base_lr)  # the schedule's first step after the warm-up
    assert described["grad_norm"] is None  # no step of the epoch came before
    assert told.reason == "loss or gradient not finite at step 1 of epoch 2, learning rate 0.001"
    run = runs_of(mlruns)["trial-0"]
    assert (run.info.status, run.data.tags["harness.state"]) == ("FAILED", "diverged")


def told_of(place: Path, number: int = 0) -> dict[str, Any]:
    """What the storage keeps of a trial's end."""
    import optuna

    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{place}/tiny.db")
    outcome: dict[str, Any] = study.trials[number].user_attrs["outcome"]
    return outcome


def test_pixels_without_numbers_end_the_trial_in_its_first_epoch(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = trainer.augment
    monkeypatch.setattr("harness.trainer.augment", lambda *arguments: augment(*arguments) * math.nan)
    trials = complete(study, tmp_path, look=trials_of)
    assert [(trial.state, len(trial.epochs), trial.value) for trial in trials] == [("diverged", 0, None)] * 3
    assert (told_of(tmp_path)["epoch"], told_of(tmp_path)["step"]) == (1, 1)


def test_an_absurd_learning_rate_ends_the_trial_and_says_where(image_cache: Path, tmp_path: Path) -> None:
    optim = OptimConfig(base_lr=1e25, depth_lr_mult=0.5, warmup_epochs=0.0)
    study = small_study(image_cache)
    train = dataclasses.replace(study.train, optim=optim)
    study = dataclasses.replace(study, train=train, space={"optim.base_lr": Float(1e20, 1e30, log=True)})
    trials = complete(study, tmp_path, look=trials_of)
    assert trials[0].state == "diverged"
    told = told_of(tmp_path)
    assert (told["epoch"], told["step"]) == (1, 2)  # the first step is what the rate ruins
    assert told["lr"] == pytest.approx(1e25, rel=0.5)
    assert math.isfinite(told["grad_norm"])
    assert f"at step {told['step']} of epoch 1, learning rate" in str(trials[0].reason)
    assert "gradient norm up to" in str(trials[0].reason)


# -- damage --------------------------------------------------------------------------------------------------------


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x41
    path.write_bytes(content)


def test_a_damaged_image_cache_is_named_and_made_again(
    tmp_path: Path, undisturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small_study(tmp_path / "cache")
    complete(study, tmp_path)
    arrays = sorted((tmp_path / "cache").glob("*.npy"))
    for array in arrays:
        flipped(array, 200 + len(array.name))
    (tmp_path / "again").mkdir()
    capsys.readouterr()
    assert complete(study, tmp_path / "again") == undisturbed
    said = capsys.readouterr().err
    # A split that the search never reads at a size may stay damaged until it is asked for.
    assert said.count("is damaged (its checksum is wrong) and is made again.") >= 3
    assert "Traceback" not in said


def text_file(path: Path) -> None:
    path.write_text("not a checkpoint\n" * 100)


def pickle_file(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": [1, 2, 3]}))


def foreign_tensors(path: Path) -> None:
    save_file({"model/stem.weight": torch.zeros(3)}, path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit in the header's length": lambda path: flipped(path, 3),
    "a flipped bit in the header": lambda path: flipped(path, 12),
    "a flipped bit in the record": lambda path: flipped(path, path.read_bytes().index(b"seed") + 8),
    "a flipped bit in the body": lambda path: flipped(path, path.stat().st_size - 100),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "all but a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "seven bytes": lambda path: path.write_bytes(path.read_bytes()[:7]),
    "an empty file": lambda path: path.write_bytes(b""),
    "zeros, as after a power cut": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a text file": text_file,
    "a pickle of torch": pickle_file,
    "a pickle": plain_pickle,
    "tensors of somebody else": foreign_tensors,
}


def stopped_in_trial_1(study: Study, place: Path) -> Path:
    """A study whose process died in trial 1 with a checkpoint; returns its path."""

    def dies(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.number == 1:
            raise Died

    with pytest.raises(Died):
        complete(study, place, at=dies)
    path = place / "tiny.checkpoints" / "trial-1.safetensors"
    assert path.is_file()
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_its_training_starts_again(
    damage: str, image_cache: Path, tmp_path: Path, undisturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small_study(image_cache, checkpoint_seconds=0.0)
    path = stopped_in_trial_1(study, tmp_path)
    DAMAGES[damage](path)
    started: list[Event] = []
    capsys.readouterr()
    assert complete(study, tmp_path, at=started.append) == undisturbed
    said = capsys.readouterr().err
    assert f"{path} is damaged (" in said
    assert said.endswith("it is not used, and the training starts again.\n")
    assert len(said.splitlines()) == 1
    first = started[0]
    assert isinstance(first, TrialStarted)
    assert (first.number, first.resumed) == (1, True)
    assert not path.exists()


def test_any_flipped_or_missing_byte_of_a_file_of_tensors_is_noticed(tmp_path: Path) -> None:
    path, chance = tmp_path / "x.safetensors", random.Random(0)
    written = {
        "model/weight": torch.randn(3, 2),
        "random/cpu": torch.arange(5, dtype=torch.uint8),
        "step": torch.ones(()),
    }
    record = {"identity": {"seed": 1}, "epochs": [{"epoch": 1, "loss": 0.5}]}
    write_tensors(path, written, record)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=r"x\.safetensors is damaged"):
            read_tensors(path)
        path.write_bytes(content[:place])
        with pytest.raises(Damaged):
            read_tensors(path)
    path.write_bytes(content)
    tensors, found = read_tensors(path)
    assert found == record
    assert all(torch.equal(tensors[name], value) for name, value in written.items())


def test_trained_weights_damaged_before_the_test_set_is_opened_are_trained_again(
    image_cache: Path, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small_study(image_cache)

    def damage_then_open(*arguments: Any) -> Any:
        flipped(next((tmp_path / "tiny.checkpoints").glob("final-*")), -100)
        return load_test(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("harness.final.load_test", damage_then_open)
        with pytest.raises(Halt, match="are gone or damaged; the same command trains them again"):
            complete(study, tmp_path)
    assert complete(study, tmp_path, look=lambda store: store.attribute("final")["test_openings"]) == 1
    assert complete(study, tmp_path) == undisturbed


def alter(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["identity"][key] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        alter("study", "another study's uid"),
        alter("key", "trial-7"),
        alter("seed", 1),
        alter("configuration", {"epochs": "99"}),
    ],
    ids=["study", "trial", "seed", "configuration"],
)
def test_a_whole_checkpoint_of_another_training_is_refused(
    change: Callable[[dict[str, Any]], None],
    image_cache: Path,
    tmp_path: Path,
    undisturbed: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = small_study(image_cache, checkpoint_seconds=0.0)
    path = stopped_in_trial_1(study, tmp_path)
    tensors, record = read_tensors(path)
    change(record)
    write_tensors(path, tensors, record)
    capsys.readouterr()
    assert complete(study, tmp_path) == undisturbed
    assert capsys.readouterr().err == f"{path} belongs to another training; it is not used.\n"


# -- exceptions ----------------------------------------------------------------------------------------------------


def test_an_exception_fails_the_trial_and_its_traceback_is_kept_twice(
    study: Study, tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise ValueError("this cannot\nbe trained")

    def first_fails(event: Event) -> None:
        if isinstance(event, TrialEnded):
            monkeypatch.undo()

    monkeypatch.setattr("harness.engine.accumulate_gradient", breaks)
    tracker = local_tracker(mlruns)
    trials = complete(study, tmp_path, tracker, at=first_fails, look=trials_of)
    assert [trial.state for trial in trials] == ["failed", "complete", "complete"]
    assert trials[0].reason == "ValueError: this cannot"
    assert "in breaks" in str(trials[0].traceback)
    run = runs_of(mlruns)["trial-0"]
    assert (run.info.status, run.data.tags["harness.state"]) == ("FAILED", "failed")
    artifact = Path(run.info.artifact_uri.removeprefix("file://")) / "traceback.txt"
    assert artifact.read_text() == trials[0].traceback


def test_three_failures_in_a_row_stop_the_study(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*arguments: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr("harness.engine.accumulate_gradient", breaks)
    with pytest.raises(TooManyFailures, match="ValueError: broken"):
        complete(study, tmp_path)
