"""How a step runs: devices that exist, settings that are kept, and steps that agree whatever they run with."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.base.errors import Halt, InputError
from harness.config.contracts import Preprocessing
from harness.config.train import AugmentConfig, RuntimeConfig
from harness.data.augment import augment
from harness.data.mixing import mix
from harness.models.maxvit import TinyMaxViT
from harness.training.runtime import find_device, modes_back, resolve
from harness.training.step import (
    Runtime,
    _update,
    accumulate_gradient,
    compute_in_whole_fp32,
    free_memory,
    halving,
    is_device_failure,
    predict,
    train_step,
)
from tests.conftest import PROJECT


def runtime(bf16: bool = False, channels_last: bool = False) -> Runtime:
    return Runtime(device=torch.device("cpu"), bf16=bf16, channels_last=channels_last)


def build() -> nn.Module:
    """The same tiny model at every call, without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyMaxViT(pretrained=False, hidden=(16,), dropout=0.0).build(4, 64)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.arange(4)


# --- devices ---


def test_auto_finds_a_device() -> None:
    assert find_device("auto").type in ("cuda", "mps", "cpu")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cuda:x", "cuda:-1", "xpu", "meta", "nonsense:0"])
def test_a_device_that_makes_no_sense_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match=f"--device {name}"):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_cuda_points_to_the_cpu(name: str) -> None:
    with pytest.raises(InputError, match=f"--device {name}.*--device cpu"):
        find_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_a_cuda_device_that_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError, match="--device cuda:99"):
        find_device("cuda:99")


# --- deciding ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["on", "off"])
def test_explicit_settings_are_kept_and_nothing_is_timed(precision: Any, layout: Any) -> None:
    def refuse() -> nn.Module:
        raise AssertionError("a model was built although nothing is to be measured")

    decided = resolve(RuntimeConfig(device="cpu", precision=precision, channels_last=layout), refuse, 64)
    assert decided == runtime(bf16=precision == "bf16", channels_last=layout == "on")
    expected = {"device": "cpu", "precision": precision, "channels_last": layout == "on", "compile": False}
    assert decided.to_dict() == expected


def test_timing_leaves_torchs_generator_and_what_is_not_asked_alone() -> None:
    state = torch.get_rng_state()
    decided = resolve(RuntimeConfig(device="cpu", precision="fp32", channels_last="tune"), build, 64)
    assert decided in (runtime(), runtime(channels_last=True))
    assert torch.equal(torch.get_rng_state(), state)


# --- a training step ---


def step(model: nn.Module, optimizer: torch.optim.Optimizer, where: Runtime, **settings: Any) -> tuple[Tensor, Tensor]:
    images, labels = batch()
    settings = {"label_smoothing": 0.0, "clip_norm": None, **settings}
    done = train_step(model, where.move(images), labels, optimizer, where, **settings)
    return done.loss, done.correct


@pytest.mark.slow
@pytest.mark.parametrize("where", [runtime(), runtime(bf16=True), runtime(channels_last=True)], ids=str)
def test_twenty_steps_on_one_batch_lower_the_loss(where: Runtime) -> None:
    model = where.place(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [step(model, optimizer, where, clip_norm=1.0)[0].item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_returns_the_batchs_summed_loss_and_its_hits_from_before_the_update() -> None:
    model = build()
    images, labels = batch()
    logits = copy.deepcopy(model)(images)
    loss, hits = step(model, torch.optim.SGD(model.parameters(), lr=0.1), runtime(), label_smoothing=0.1)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    assert hits == (logits.argmax(1) == labels).sum()
    assert not loss.requires_grad


def test_clipping_bounds_the_norm_of_the_update() -> None:
    model = build()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, torch.optim.SGD(model.parameters(), lr=1.0), runtime(), clip_norm=1e-2)
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1e-2, rel=0.05)


def first_loss(where: Runtime) -> float:
    model = where.place(build())
    return step(model, torch.optim.SGD(model.parameters(), lr=0.0), where)[0].item()


def test_bf16_and_fp32_agree_on_the_loss_of_a_step_within_five_percent() -> None:
    assert first_loss(runtime(bf16=True)) == pytest.approx(first_loss(runtime()), rel=0.05)


def test_weights_and_optimizer_state_stay_in_fp32_under_bf16() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss, _ = step(model, optimizer, runtime(bf16=True))
    assert loss.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_channels_last_and_contiguous_agree() -> None:
    assert first_loss(runtime(channels_last=True)) == pytest.approx(first_loss(runtime()), rel=1e-4)
    images, _ = batch()
    plain, last = (predict(where.place(build()).eval(), images, where) for where in (runtime(), runtime(False, True)))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def test_channels_last_reaches_weights_and_images() -> None:
    where = runtime(channels_last=True)
    weight = where.place(build()).stem[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert where.move(batch()[0]).is_contiguous(memory_format=torch.channels_last)


# --- prediction ---


def test_predictions_repeat_and_equal_the_plain_model() -> None:
    model, (images, _) = build().eval(), batch()
    first, again = predict(model, images, runtime()), predict(model, images, runtime())
    assert torch.equal(first, again)
    assert not first.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(first, model(images), rtol=1e-5, atol=1e-5)


def test_predictions_are_fp32_under_bf16_too() -> None:
    assert predict(build().eval(), batch()[0], runtime(bf16=True)).dtype == torch.float32


@pytest.mark.slow
def test_training_goes_on_after_a_prediction() -> None:
    """Tensors of inference mode, cached by autocast, would break the next backward pass."""
    for where in (runtime(), runtime(bf16=True)):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, optimizer, where)
        predict(model.eval(), batch()[0], where)
        loss, _ = step(model.train(), optimizer, where)
        assert torch.isfinite(loss)


# --- what makes a CPU fast ---


def test_a_strided_depthwise_convolution_computes_in_fp32_under_bf16_and_keeps_the_type() -> None:
    conv = nn.Conv2d(4, 4, 3, stride=2, groups=4)
    images = torch.randn(2, 4, 9, 9).bfloat16()
    expected = conv(images.float())
    placed = runtime(bf16=True).place(nn.Sequential(conv))
    with runtime(bf16=True).autocast():
        found = placed(images)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert list(placed.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of the GNU C library")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    code = (
        "import resource, torch\n"
        "from harness.training.step import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "def faults():\n"
        "    torch.ones(30_000_000)\n"  # freed at once
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        # 80 MB, 19,500 pages; it fits where the last one was also if a small block lies behind that by now.
        "    torch.ones(20_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        # The first one maps the memory in any case; later the system may take some of it back.
        "print(min(faults() for _ in range(6)))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", code], env=each, cwd=PROJECT))
        for each in (environment, {**environment, "MALLOC_TRIM_THRESHOLD_": "131072"})
    )
    assert kept < given_back / 2


# --- the same kernels in every run ---

GENERATED = """
import sys
import torch
from torch._inductor.utils import run_and_get_code
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from harness.training.step import Runtime, compile_parts

torch.set_num_threads(2)
chosen = {"compiled": True, "deterministic": sys.argv[1] == "True"}
runtime = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False, **chosen)
model = runtime.place(torch.nn.Sequential(RelativePositionalMultiHeadAttention(24, 24, 16)))
compile_parts(model, ["0"])
images = torch.randn(16, 16, 16, 24)
_, codes = run_and_get_code(lambda: (model(images) ** 2).sum().backward())
print("atomic_add" in "".join(codes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_compiled_gradients_of_position_tables_are_summed_in_one_order(deterministic: bool) -> None:
    """Also on CUDA, where the same code adds them atomically."""
    command = [sys.executable, "-c", GENERATED, str(deterministic)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == str(not deterministic), done.stderr


class Put(nn.Module):
    """An operation whose result depends on the order of its writes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.linear(images)
        return found + torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    model = Put()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"label_smoothing": 0.0, "clip_norm": None}
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(Halt, match=r"uses put_.* on cpu; .*--set runtime\.deterministic=false"):
            train_step(model, torch.ones(2, 3), torch.tensor([0, 1]), optimizer, runtime(), **options)  # type: ignore[arg-type]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_runtime_comes_back_from_its_record(deterministic: bool) -> None:
    chosen = dataclasses.replace(runtime(), deterministic=deterministic)
    assert Runtime.from_dict(chosen.to_dict(), chosen.device) == chosen
    assert ("deterministic" in chosen.to_dict()) is not deterministic  # as older studies have it
    config = RuntimeConfig(device="cpu", precision="fp32", channels_last="off", deterministic=deterministic)
    assert resolve(config, build, 64) == chosen


# --- memory ---


def test_an_optimizer_without_memory_for_its_state_says_so() -> None:
    model = nn.Linear(3, 2)

    class Greedy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    options = {"label_smoothing": 0.0, "clip_norm": None}
    with pytest.raises(MemoryError, match=r"out of memory for the optimizer's state .*ALLOC_FAILED"):
        train_step(model, torch.ones(2, 3), torch.tensor([0, 1]), Greedy(model.parameters()), runtime(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("optimizer", "times"), [("SGD", 0), ("AdamW", 1)])
def test_memory_is_freed_once_for_an_optimizers_state(
    optimizer: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, freed = nn.Linear(3, 2), []
    monkeypatch.setattr("harness.training.step.free_memory", freed.append)
    chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        _update(chosen, torch.device("cuda"))
    assert len(freed) == times


def test_freeing_memory_also_collects_cyclic_garbage() -> None:
    model = nn.Linear(3, 2)
    model.forward = partial(nn.Linear.forward, model)  # type: ignore[method-assign]
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is not None
        free_memory(torch.device("cpu"))
        assert alive() is None
    finally:
        gc.enable()


def test_torchs_modes_are_as_before_and_follow_each_study() -> None:
    compiled = dataclasses.replace(runtime(), compiled=True)
    with modes_back():
        compiled.place(nn.Linear(2, 2))
        assert torch.are_deterministic_algorithms_enabled()
        dataclasses.replace(compiled, deterministic=False).place(nn.Linear(2, 2))
        assert not torch.are_deterministic_algorithms_enabled()
        compiled.place(nn.Linear(2, 2))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_on_cuda_is_no_tf32_until_the_program_goes_on(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        with modes_back():
            compute_in_whole_fp32()
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_torchs_newer_names_of_precisions_come_back_too() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with modes_back():
            pass
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        with modes_back():
            compute_in_whole_fp32()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_memory_that_earlier_trials_left_on_a_gpu_halves_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr("harness.training.step.free_memory", lambda device: events.append("freed"))

    def attempt(size: int, fits: int, failures: int) -> int:
        events.append(size)
        if size > fits or events.count(size) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size

    assert halving(partial(attempt, fits=8, failures=1), 8, torch.device("cuda")) == (8, 8)
    assert events == [8, "freed", 8]
    events.clear()
    assert halving(partial(attempt, fits=2, failures=0), 8, torch.device("cuda")) == (2, 2)
    assert events == [8, "freed", 8, "freed", 4, "freed", 2]
    with pytest.raises(MemoryError, match="one image at a time"):
        halving(partial(attempt, fits=0, failures=0), 1, torch.device("cuda"))


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("CUDA driver error: unspecified launch failure", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: out of memory", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_device_that_fails_in_compiled_code_is_no_failure_of_the_trial(text: str, failed: bool) -> None:
    assert is_device_failure(RuntimeError(text)) == failed


class Meta(Runtime):
    """Computes shapes only; torch raises an error for whatever would wait for a device's value."""

    def autocast(self) -> Any:
        return contextlib.nullcontext()


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied to the device."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.total += args[0].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"trivial_augment": True},
        {"random_erasing": 0.5},
        {"mixup": 0.2},
        {"cutmix": 1.0},
        {"mixup": 0.2, "cutmix": 1.0},
        {"contrast": 0.2, "saturation": 0.2},
    ],
)
def test_no_step_waits_for_the_device_or_sends_it_much(fields: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.training.step.free_memory", lambda device: None)
    device, count = torch.device("meta"), 64
    config, generator = AugmentConfig(**fields), torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.zeros(count, 72, 72, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    with Copied() as copied:
        batch, target = mix(augment(images, config, 64, generator, Preprocessing()), labels, config, generator)
        meta = Meta(device=device, bf16=False, channels_last=False)
        train_step(model, batch, target, optimizer, meta, label_smoothing=0.1, clip_norm=1.0)
    assert batch.shape == (count, 3, 64, 64)
    assert copied.total < 2000 * count


@pytest.mark.parametrize(("count", "size"), [(34, 3), (34, 9), (5, 3), (4, 8)])
def test_images_that_do_not_fit_at_once_are_split_evenly(count: int, size: int) -> None:
    """A part of one image would fail in BatchNorm over 1 x 1 pixels."""
    seen: list[int] = []

    class Noting(nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().forward(images)

    model, labels = Noting(3, 2), torch.zeros(count, dtype=torch.int64)
    images = torch.randn(count, 3)
    loss, _ = accumulate_gradient(model, images, labels, runtime(), 0.0, size)
    torch.testing.assert_close(loss, F.cross_entropy(model(images), labels, reduction="sum").detach())
    assert max(seen[:-1]) <= size
    assert max(seen[:-1]) - min(seen[:-1]) <= 1
    assert min(seen) > 1
