"""Too little memory, injected where a pass begins and had for real in a process at its limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config.events import Event, TrialEnded
from harness.config.study import Study
from harness.report.display import Display
from harness.search.loop import TooManyFailures
from harness.store.store import Store, TrialRecord
from harness.training import loop as trainer
from harness.training import step as engine
from harness.training.assemble import assemble
from harness.training.loop import logits_of, measure
from harness.training.step import Runtime, accumulate_gradient, train_step
from tests.conftest import PROJECT
from tests.faulty import CommandLine, Died, Pebble, complete, images, one_sentence, small_study
from tests.tracking.test_tracker import runs_of

CPU = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)


@pytest.fixture
def study(image_cache: Path) -> Study:
    return small_study(image_cache)


def trials_of(store: Store) -> list[TrialRecord]:
    return store.trials()


def room_for(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let memory run out when more than `most` images pass at once; returns the sizes that were tried, in order."""
    sizes: list[int] = []

    def limited(model: Any, batch: Tensor, labels: Any, runtime: Any, smooth: float, size: int, *rest: Any) -> Any:
        sizes.append(size)
        if size > most:
            accumulate_gradient(model, batch[:1], labels[:1], runtime, smooth, 1)  # the attempt leaves a part
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return accumulate_gradient(model, batch, labels, runtime, smooth, size, *rest)

    monkeypatch.setattr("harness.training.step.accumulate_gradient", limited)
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


@pytest.mark.slow
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
    assert "Out of memory: using 4 images at a time, accumulated to the same batch." in capsys.readouterr().err


@pytest.mark.slow
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

        patch.setattr("harness.training.step.accumulate_gradient", dies)
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


@pytest.mark.slow
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
    wanted = measure(logits_of(training.model, training.val, CPU), training.val.labels)
    passed, predict = [], trainer.predict

    def limited(model: nn.Module, batch: Tensor, runtime: Runtime) -> Tensor:
        passed.append(len(batch))
        if len(batch) > 5:
            raise error
        return predict(model, batch, runtime)

    monkeypatch.setattr("harness.training.loop.predict", limited)
    found = measure(logits_of(training.model, training.val, CPU), training.val.labels)
    assert (found.correct, found.total) == (wanted.correct, wanted.total)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert max(passed[-8:]) == 4
    assert sum(passed[-8:]) == 32


def test_evaluation_without_memory_for_one_image_says_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    training = assemble(study.train, CPU, seed=0)
    assert training.val is not None
    monkeypatch.setattr("harness.training.loop.predict", none)
    with pytest.raises(MemoryError, match=r"out of memory with one image at a time \(CUDA out of memory\)"):
        logits_of(training.model, training.val, CPU)


@pytest.mark.slow
def test_no_memory_for_the_final_run_is_one_sentence_and_the_same_command_goes_on(
    line: CommandLine, mlruns: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = False

    def at(event: Event) -> None:
        nonlocal limited
        if isinstance(event, TrialEnded) and event.number == 2 and not limited:
            limited = True
            room_for(monkeypatch, 0)

    with monkeypatch.context() as patch:
        show = Display.show
        patch.setattr("harness.report.display.Display.show", lambda self, event: (show(self, event), at(event)))
        ended = line.run()
    assert ended.code == 1, ended
    assert one_sentence(ended.err), ended.err
    assert "error: out of memory with one image at a time" in ended.err
    assert runs_of(mlruns)["study"].info.status == "KILLED"
    assert "RUNNING" not in [run.info.status for run in runs_of(mlruns).values()]
    monkeypatch.setattr("harness.training.step.accumulate_gradient", accumulate_gradient)
    assert line.run().code == 0
    assert line.stored() == (3, undisturbed)


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "MPS backend out of memory (MPS allocated: 1.0 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
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
from harness.data.augment import IMAGENET
from harness.data.splits import load_test
from harness.report.display import Display
from harness.training.step import Runtime, train_step
from harness.training.loop import logits_of
from harness.data.augment import IMAGENET
from harness.data.splits import ImageSet

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
logits = logits_of(model, ImageSet(images=pixels, labels=torch.zeros(128), preprocessing=IMAGENET), cpu)
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
