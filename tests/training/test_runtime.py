"""What "auto" and "tune" mean; compiling: the plain curve, one set of graphs for all, tried only where it can pay."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from harness.base.errors import InputError
from harness.config.contracts import Backbone
from harness.config.events import EpochResult
from harness.config.study import Study
from harness.config.train import RuntimeConfig
from harness.models.maxvit import MaxViTT, TinyMaxViT
from harness.models.stochastic_depth import StochasticDepth
from harness.models.torchvision import Torchvision
from harness.training import runtime as auto
from harness.training.assemble import assemble, decide_runtime
from harness.training.loop import fit
from harness.training.runtime import Work, pays, resolve
from harness.training.step import Runtime
from tests.conftest import PROJECT
from tests.small import small_study

PLAIN = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)
COMPILED = dataclasses.replace(PLAIN, compiled=True)


class Residual(nn.Module):
    """A branch that stochastic depth leaves out."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU())
        self.depth = StochasticDepth(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.depth(self.branch(x))
        return out


@dataclass(frozen=True, kw_only=True)
class DeepNet(Backbone):
    """A stem, a block with stochastic depth, and a head: compiled in seconds."""

    hidden: tuple[int, ...] = (16,)
    dropout: float = 0.3
    stochastic_depth: float = 0.2

    def check(self, image_size: int) -> None:
        """Takes all."""

    def build(self, classes: int, image_size: int) -> nn.Module:
        head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        width = 4
        for each in self.hidden:
            head += [nn.Linear(width, each), nn.ReLU(), nn.Dropout(self.dropout)]
            width = each
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4))
        return nn.Sequential(stem, Residual(4, self.stochastic_depth), nn.Sequential(*head, nn.Linear(width, classes)))

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        return ["0.", "1.", "2."]

    def fingerprint(self) -> str:
        return "none"


@pytest.fixture
def deep(image_cache: Path) -> Study:
    study = small_study(image_cache)
    runtime = dataclasses.replace(study.train.runtime, compile="tune")
    return dataclasses.replace(study, train=dataclasses.replace(study.train, backbone=DeepNet(), runtime=runtime))


def curve(study: Study, runtime: Runtime, **changes: Any) -> list[EpochResult]:
    config = study.train
    for path, value in changes.items():
        part, _, name = path.partition("__")
        inner = dataclasses.replace(getattr(config, part), **{name: value}) if name else value
        config = dataclasses.replace(config, **{part: inner})
    return list(fit(assemble(config, runtime, 0)))


DEPTHWISE = partial(Torchvision("efficientnet_b0", pretrained=False).build, 102, 224)
CONVOLUTIONS = partial(Torchvision("resnet18", pretrained=False).build, 102, 224)
TINY, LARGE = partial(TinyMaxViT(pretrained=False).build, 16, 64), partial(MaxViTT(pretrained=False).build, 102, 224)


@pytest.mark.parametrize(
    ("device", "instructions", "build", "bf16"),
    [
        ("cpu", True, TINY, False),
        ("cpu", True, LARGE, True),  # as the timing chose on such a processor
        ("cpu", False, LARGE, False),
        ("cpu", True, CONVOLUTIONS, True),
        ("cuda", (9, 0), TINY, True),
        ("cuda", (8, 0), TINY, True),
        ("cuda", (7, 5), LARGE, False),
        ("mps", None, LARGE, False),
    ],
)
def test_auto_goes_by_device_instructions_and_model_and_times_nothing(
    monkeypatch: pytest.MonkeyPatch, device: str, instructions: Any, build: Callable[[], nn.Module], bf16: bool
) -> None:
    monkeypatch.setattr(auto, "find_device", torch.device)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: instructions)
    monkeypatch.setattr(auto, "step_seconds", lambda *args: pytest.fail("timed"))
    state = torch.get_rng_state()
    decided = resolve(RuntimeConfig(device=device), build, 64, Work(batch_size=8, steps=10**9, parts=["stem"]))
    assert decided == Runtime(device=torch.device(device), bf16=bf16, channels_last=bf16, compiled=False)
    assert torch.equal(torch.get_rng_state(), state), "deciding must not move torch's global generator"


@pytest.mark.parametrize(("build", "bf16"), [(DEPTHWISE, False), (CONVOLUTIONS, True)])
@pytest.mark.parametrize("instructions", [False, True])
def test_large_models_of_convolutions_are_channels_last_and_depthwise_ones_fp32(
    monkeypatch: pytest.MonkeyPatch, build: Any, bf16: bool, instructions: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    decided = resolve(RuntimeConfig(device="cpu"), build, 64)
    assert (decided.bf16, decided.channels_last) == (bf16 and instructions, True)


def test_a_chosen_fp32_keeps_the_layout_that_maxvit_has_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert not resolve(RuntimeConfig(device="cpu", precision="fp32"), LARGE, 64).channels_last
    assert resolve(RuntimeConfig(device="cpu", precision="bf16"), LARGE, 64).channels_last


@pytest.mark.parametrize(
    ("precision", "layout", "tried"),
    [
        ("tune", "tune", [(False, False), (False, True), (True, False), (True, True)]),
        ("tune", "auto", [(False, False), (True, True)]),
        ("fp32", "tune", [(False, False), (False, True)]),
        ("tune", "off", [(False, False), (True, False)]),
    ],
)
def test_tune_times_what_is_left_open_and_takes_the_clearly_fastest(
    monkeypatch: pytest.MonkeyPatch, precision: Any, layout: Any, tried: list[tuple[bool, bool]]
) -> None:
    seen = []

    def seconds(runtime: Runtime, *args: Any) -> list[float]:
        seen.append((runtime.bf16, runtime.channels_last))
        return [9.0, 1.0 / len(seen), 1.0]

    monkeypatch.setattr(auto, "step_seconds", seconds)
    decided = resolve(RuntimeConfig(device="cpu", precision=precision, channels_last=layout), TINY, 64)
    assert seen == tried
    assert (decided.bf16, decided.channels_last) == tried[-1]


@pytest.mark.slow
def test_the_compiled_curve_is_the_plain_one_and_all_trials_share_its_graphs(deep: Study) -> None:
    from torch._dynamo.utils import counters

    curve(deep, COMPILED)  # trial 1 compiles
    counters.clear()
    trials: list[dict[str, Any]] = [
        {},
        {"backbone__dropout": 0.5, "backbone__stochastic_depth": 0.4},
        {"backbone__hidden": (16, 8), "optim__base_lr": 3e-3},
        {"optim__depth_lr_mult": 0.0},
        {"optim__depth_lr_mult": 1.0, "label_smoothing": 0.2},
        {"optim__depth_by": "layer"},
    ]
    for changes in trials:
        plain, compiled = curve(deep, PLAIN, **changes), curve(deep, COMPILED, **changes)
        for one, other in zip(plain, compiled, strict=True):
            assert other.train.loss == pytest.approx(one.train.loss, rel=1e-4), changes
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3), changes
            assert one.val is not None
            assert other.val is not None
            assert other.val.loss == pytest.approx(one.val.loss, rel=1e-3), changes
    assert counters["stats"]["unique_graphs"] == 0, "a trial after the first was compiled anew"


@pytest.mark.slow
def test_a_frozen_backbone_stays_frozen_in_a_compiled_study(deep: Study) -> None:
    config = dataclasses.replace(deep.train, optim=dataclasses.replace(deep.train.optim, depth_lr_mult=0.0))
    curve(deep, COMPILED)
    training = assemble(config, COMPILED, 0)
    before = {name: each.clone() for name, each in training.model.state_dict().items()}
    list(fit(training))
    after = training.model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2"}


def test_a_short_study_is_not_compiled_and_nothing_is_tried(deep: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        assert not any(args[1:2]), "a study of seconds was compiled on trial"

    monkeypatch.setattr(auto, "compile_parts", lambda model, parts: refuse(model, list(parts)))
    assert not decide_runtime(deep.train, None, trials=3).compiled


@pytest.mark.parametrize(
    ("plain", "compiled", "cost", "steps", "wanted"),
    [
        (1.0, 0.5, 100.0, 1000, True),
        (1.0, 0.5, 100.0, 100, False),  # 50 s are not won back
        (1.0, 0.95, 1.0, 1000, False),  # within the noise
        (1.0, 2.0, 1.0, 1000, False),
    ],
)
def test_compiling_must_be_clearly_faster_and_win_back_its_cost(
    plain: float, compiled: float, cost: float, steps: int, wanted: bool
) -> None:
    assert pays(plain, compiled, cost, steps) is wanted


@pytest.mark.slow
def test_a_long_study_is_compiled_on_trial_and_says_so(
    deep: Study, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto, "LONG_ENOUGH_SECONDS", 0.0)
    work = Work(batch_size=8, steps=1, parts=["0", "1"])  # one step wins nothing back
    engine = RuntimeConfig(device="cpu", precision="fp32", channels_last="off", compile="tune")
    assert resolve(engine, lambda: DeepNet().build(4, 64), 64, work) == PLAIN
    assert "Measuring whether compiling" in capfd.readouterr().err


def test_what_was_decided_is_kept(deep: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "resolve", lambda *args: pytest.fail("decided anew"))
    kept = PLAIN.to_dict()
    assert decide_runtime(deep.train, kept, trials=1) == PLAIN
    del kept["compile"]
    with pytest.raises(InputError, match="'runtime' lacks compile; restore the storage from a backup"):
        decide_runtime(deep.train, kept, trials=1)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
def test_compiling_without_a_compiler_is_an_input_error(tmp_path: Path, image_cache: Path, begun: bool) -> None:
    code = (
        "import dataclasses, sys\n"
        "from harness.base.errors import InputError\n"
        "from harness.training.assemble import decide_runtime\n"
        "from tests.small import small_study\n"
        f"train = small_study({str(image_cache)!r}).train\n"
        "kept = {'device': 'cpu', 'precision': 'fp32', 'channels_last': False, 'compile': True}\n"
        "asked = dataclasses.replace(train, runtime=dataclasses.replace(train.runtime, compile='on'))\n"
        "try:\n"
        f"    decide_runtime(asked, kept if {begun} else None, 3)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert "runtime.compile is on" in done.stdout, done.stdout + done.stderr
    assert "--set runtime.compile=off" in done.stdout


def test_a_frozen_backbone_is_never_compiled_on_trial(deep: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "LONG_ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(auto, "compile_parts", lambda model, parts: pytest.fail("compiled"))
    frozen = dataclasses.replace(deep.train, optim=dataclasses.replace(deep.train.optim, depth_lr_mult=0.0))
    assert not decide_runtime(frozen, None, trials=3).compiled
