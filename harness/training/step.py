"""Run a step: device, precision, memory layout, compilation. Independent of what is trained."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harness.base.environment import cores
from harness.base.errors import Halt, InputError, first_line
from harness.data.mixing import Target, mean_loss

# Graphs of one block: for training and for evaluation, for each batch size; blocks of a kind share their code.
# At torch's own limit of 8 it would silently run uncompiled, and a resumed study, which begins without any, would not.
GRAPHS = 2**16

NOT_DETERMINISTIC = "does not have a deterministic implementation"  # in torch's error

ResultT = TypeVar("ResultT")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The runtime of all steps of a study."""

    device: torch.device
    bf16: bool
    channels_last: bool
    compiled: bool = False
    deterministic: bool = True

    def to_dict(self) -> dict[str, Any]:
        found = {
            "device": self.device.type,
            "precision": "bf16" if self.bf16 else "fp32",
            "channels_last": self.channels_last,
            "compile": self.compiled,
        }
        # As studies stored it before there was a choice.
        return found if self.deterministic else found | {"deterministic": False}

    @staticmethod
    def from_dict(kept: Mapping[str, Any], device: torch.device) -> Runtime:
        """Invert `to_dict`, on a device of the same type. Raises InputError if a field is missing."""
        if lacking := [name for name in ("precision", "channels_last", "compile") if name not in kept]:
            named = f"The study's 'runtime' lacks {', '.join(lacking)}"
            raise InputError(f"{named}; restore the storage from a backup.")
        return Runtime(
            device=device,
            bf16=kept["precision"] == "bf16",
            channels_last=kept["channels_last"],
            compiled=kept["compile"],
            deterministic=kept.get("deterministic", True),
        )

    def place(self, model: nn.Module) -> nn.Module:
        if self.compiled or self.device.type == "cuda":
            compute_deterministically(self.deterministic)
        if self.device.type == "cuda":
            compute_in_whole_fp32()
        if self.device.type == "cpu":
            keep_freed_memory()
            if self.bf16:
                strided_depthwise_in_fp32(model)
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def move(self, images: Tensor) -> Tensor:
        channels_last = self.channels_last and images.ndim == 4  # pooled features have no channels
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def compute_deterministically(wanted: bool) -> None:
    """Choose kernels that sum in the same order in every run, or torch's own choice.

    Otherwise cuDNN and cuBLAS may choose others, and compiled code adds the gradients of position tables atomically.
    An operation without such a kernel raises an error, see `train_step`.
    """
    torch.use_deterministic_algorithms(wanted)
    # A debugging aid that costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted:
        torch.backends.cudnn.benchmark = False


def compute_in_whole_fp32() -> None:
    """Compute fp32 products and convolutions on CUDA with all bits, and not with the 10 of TF32's mantissa."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")  # the environment may have chosen another


@cache
def keep_freed_memory() -> None:
    """Make the GNU C library keep freed blocks of any size for the next step; other libraries are unaffected.

    By default it maps and unmaps each large activation, and the system fills every page with zeros first:
    a fifth of a training step of the tiny MaxViT on a CPU, two fifths of its validation. Does nothing if there are
    MALLOC_ variables, or another allocator is preloaded.
    """
    chosen = any(name.startswith(("LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        if not library.mallopt(M_MMAP_THRESHOLD, 2**30):  # up to version 2.34 it takes no more than 32 MB
            library.mallopt(M_MMAP_THRESHOLD, 2**25)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def strided_depthwise_in_fp32(model: nn.Module) -> None:
    """Make strided depthwise convolutions compute in fp32 even under autocast; their outputs keep the dtype.

    On a CPU oneDNN has no fast bf16 gradient for them: MaxViT-T's four took a quarter of a training step.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and max(module.stride) > 1:
            module.forward = partial(_in_fp32, module)  # type: ignore[method-assign]


def _in_fp32(module: nn.Conv2d, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return type(module).forward(module, x.float()).to(x.dtype)  # timm's own class pads first


def compile_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Compile the forward passes of these submodules in place; names and states do not change.

    The graphs take weights and buffers as inputs, so the next trial's model of the same shape reuses them. What differs
    between trials must therefore be a tensor, or lie outside the parts, as the head does. Dropout and stochastic depth
    draw the same numbers as uncompiled.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    modules = dict(model.named_modules())
    for part in parts:
        if part in modules:  # a depth may also be a parameter, such as a class token
            modules[part].compile(dynamic=False, options={"fallback_random": True})


def keep_to_cores() -> None:
    """Limit torch's threads to this process's cores, unless the user set their number.

    torch counts the cores of its affinity; if a container's quota is smaller, its threads wait for each other.
    """
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys() and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())


keep_to_cores()  # once per process, before anything else sets the number


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, and restore their states on exit.

    Weight initialisation, dropout and stochastic depth draw from them and accept no other.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, kw_only=True)
class Step:
    """Result of an optimizer step; the tensors are scalars, still on the device."""

    loss: Tensor  # summed over the batch
    correct: Tensor
    grad_norm: Tensor  # before clipping
    micro_batch: int  # maximum images per pass; the next step should start with it


def train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | Target,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    *,
    label_smoothing: float,
    clip_norm: float | None,
    micro_batch: int | None = None,
    class_weights: Tensor | None = None,
) -> Step:
    """Run an optimizer step on a batch: float [B, 3, H, W], int64 [B]; `class_weights` of the loss are [classes].

    Mixed images have two labels each, a `Target`; correct is then who predicts the one with the larger share.

    With `micro_batch`, the gradient of the same batch is accumulated over parts of at most that many images. When
    memory runs out, the parts are halved, down to one image. Only dropout and BatchNorm differ: BatchNorm sees smaller
    batches, and those of a failed attempt twice. Raises MemoryError if a single image or the optimizer's state does not
    fit, and Halt if the model has an operation that is not deterministic here.

    As many arguments as a step has parts; they are named at its two calls.
    """
    states = random_states(runtime.device)

    def attempt(size: int) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        set_random_states(states, runtime.device)
        return accumulate_gradient(model, images, labels, runtime, label_smoothing, size, class_weights)

    (loss, correct), size = halving(attempt, min(micro_batch or len(images), len(images)), runtime.device)
    norm = nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
    _update(optimizer, runtime.device)
    return Step(loss=loss, correct=correct, grad_norm=norm, micro_batch=size)


def _update(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Take the optimizer's step; the first one allocates its state, of twice the parameters' size for Adam."""
    has_state = not isinstance(optimizer, torch.optim.SGD) or optimizer.defaults["momentum"]
    if has_state and not optimizer.state and device.type != "cpu":
        free_memory(device)
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Some parameters may have changed, so the step is not repeated with a smaller micro-batch.
        raise MemoryError(f"out of memory for the optimizer's state ({first_line(error)})") from error


def accumulate_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | Target,
    runtime: Runtime,
    label_smoothing: float,
    size: int,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the batch's mean loss to the parameters, at most `size` images at a time: (loss, correct).

    As many arguments as a step has parts.
    """
    losses, hits = [], []
    parts = -(-len(images) // size)  # of even sizes, for BatchNorm cannot take one image
    targets: Sequence[Tensor | Target] = labels.tensor_split(parts)
    for part, wanted in zip(images.tensor_split(parts), targets, strict=True):
        with runtime.autocast():
            logits = model(part)
        loss = mean_loss(logits.float(), wanted, label_smoothing, class_weights)
        (loss * (len(part) / len(images))).backward()
        losses.append(loss.detach() * len(part))
        hits.append((logits.argmax(1) == (wanted.larger() if isinstance(wanted, Target) else wanted)).sum())
    return torch.stack(losses).sum(), torch.stack(hits).sum()


def halving(attempt: Callable[[int], ResultT], size: int, device: torch.device) -> tuple[ResultT, int]:
    """Call `attempt` with a size, halved while memory runs out; return the result and the size.

    On a GPU the first failure frees cached memory and keeps the size, since earlier trials may have left it.
    Raises MemoryError if a single image does not fit.
    """
    freed = device.type == "cpu"
    while True:
        try:
            return attempt(size), size
        except (RuntimeError, MemoryError) as error:
            if NOT_DETERMINISTIC in str(error):
                operation = str(error).partition(NOT_DETERMINISTIC)[0].strip()
                raise Halt(
                    f"The model uses {operation}, whose results differ in each run on {device.type}; choose another "
                    "model, or start the study anew with --set runtime.deterministic=false."
                ) from error
            if not is_out_of_memory(error):
                raise
            if size == 1 and freed:
                raise MemoryError(f"out of memory with one image at a time ({first_line(error)})") from error
        # Outside the except: its traceback keeps the activations.
        size = -(-size // 2) if freed else size
        freed = True
        free_memory(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch ran out of memory; on a CPU and on MPS only the error's text tells.

    cuBLAS and cuDNN have texts of their own, for example if no engine has room for its workspace.
    """
    words = ["can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED"]
    words += ["unable to find an engine", "CUBLAS_STATUS_NOT_INITIALIZED"]
    said = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def is_device_failure(error: BaseException) -> bool:
    """Return whether the device failed: all later calls of this process would fail, too.

    Compiled code launches its kernels without torch's own error.
    """
    launched = isinstance(error, RuntimeError) and str(error).startswith(("CUDA driver error", "Triton Error [CUDA]"))
    return (launched or isinstance(error, torch.AcceleratorError)) and not is_out_of_memory(error)


def free_memory(device: torch.device) -> None:
    """Release cached blocks, to allocate others, and those of compiled models, which are cyclic garbage."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators, uint8, for `set_random_states`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """Logits, float32 [B, classes], of standardised images [B, 3, H, W]. The model must be in evaluation mode."""
    with runtime.autocast():
        logits: Tensor = model(runtime.move(images))
    return logits.float()
