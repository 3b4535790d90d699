"""Checkpoints: what is written is what is read, and a training goes on from any batch to the same bits."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.base import files
from harness.base.errors import Halt
from harness.base.files import TORCH_TYPES, Damaged, check_tensors
from harness.config.events import EpochResult
from harness.config.study import Study
from harness.config.train import TrainConfig
from harness.garden.dataset import Garden
from harness.store.leases import LeaseLost
from harness.training import checkpoint
from harness.training.assemble import assemble
from harness.training.checkpoint import (
    Checkpoint,
    differences,
    fingerprint,
    identity_of,
    read_tensors,
    remove,
    stale,
    write_tensors,
)
from harness.training.loop import Training, fit
from harness.training.step import Runtime
from tests.small import SmallNet
from tests.training.test_loop import equal, state, timeless

HERE = {"torch": "2", "device": "this one", "threads": "1"}
IDENTITY = {"study": "u", "key": "trial-0", "seed": 0}
RUNTIMES = {
    "fp32": Runtime(device=torch.device("cpu"), bf16=False, channels_last=False),
    "channels_last": Runtime(device=torch.device("cpu"), bf16=False, channels_last=True),
    "bf16": Runtime(device=torch.device("cpu"), bf16=True, channels_last=False),
}
EPOCHS, BATCHES = 3, 2
# Where a training stops: after batch b of epoch e, or after the end of epoch e ("end").
STOPS = [(epoch, batch) for epoch in range(1, EPOCHS + 1) for batch in (1, 2, "end")]


@pytest.fixture
def config(study: Study) -> TrainConfig:
    """Three epochs of two batches."""
    return dataclasses.replace(study.train, backbone=SmallNet(), epochs=EPOCHS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.checkpoints" / "trial-0.safetensors"


def fresh(path: Path, config: TrainConfig, runtime: Runtime = RUNTIMES["fp32"], **changes: Any) -> Checkpoint:
    """A training that has not begun, and its checkpoint."""
    given = {"identity": IDENTITY, "environment": HERE} | changes
    return Checkpoint(path, given["identity"], assemble(config, runtime, 0), given["environment"])


def run_until(checkpoint: Checkpoint, stop: tuple[int, Any] | None = None) -> None:
    """Train to the end, or to the point where somebody asks to stop."""
    progress = checkpoint.training.progress

    def after_batch() -> None:
        if stop == (progress.epoch, progress.step):
            raise KeyboardInterrupt

    try:
        with checkpoint.saved_when_stopped():
            for result in fit(checkpoint.training, after_batch):
                if stop == (result.epoch, "end"):
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert stop is not None


def uninterrupted(config: TrainConfig, runtime: Runtime) -> tuple[list[EpochResult], dict[str, Tensor]]:
    training = assemble(config, runtime, 0)
    return timeless(list(fit(training))), state(training)


def check_every_stop(folder: Path, config: TrainConfig, runtime: Runtime, stops: list[tuple[int, Any]] = STOPS) -> None:
    """The law: stopped anywhere and restored elsewhere, a training ends as the one that was not stopped."""
    results, weights = uninterrupted(config, runtime)
    for stop in stops:
        path = folder / f"{stop}.safetensors"
        run_until(fresh(path, config, runtime), stop)
        again = fresh(path, config, runtime)
        assert again.restore(), stop
        run_until(again)
        assert timeless(again.training.progress.epochs) == results, stop
        assert equal(state(again.training), weights), stop


# --- files of tensors ---


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
RECORDS = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any shape that occurs, empty and 0-d ones included, in any memory layout."""
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (2, 3, 1, 1), (4, 2, 3, 3)]))
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    content = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    if dtype is torch.bool:
        content = content % 2
    tensor = content.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    if len(shape) == 4 and draw(st.booleans()):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Everything but the memory layout; not the values, for NaN is unequal to itself."""
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).tolist()) if len(flat) else b""


@pytest.mark.slow
@given(named=st.dictionaries(NAMES, tensors(), max_size=4), record=RECORDS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_what_is_read(tmp_path: Path, named: dict[str, Tensor], record: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, named, record)
    read, told = read_tensors(path)
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(each) for name, each in named.items()}
    assert told == record
    check_tensors(path)
    assert read_tensors(path)[1] == record
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_tied_weights_are_written_for_each_of_their_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    write_tensors(tmp_path / "a.safetensors", model.state_dict(), {})
    kept, _ = read_tensors(tmp_path / "a.safetensors")
    assert kept.keys() == model.state_dict().keys()
    assert torch.equal(kept["1.weight"], model[0].weight)


@pytest.mark.parametrize("dtype", TORCH_TYPES.values())
def test_every_type_of_tensor_is_checked_without_torch_as_with_it(tmp_path: Path, dtype: str) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3).to(getattr(torch, dtype))}, {"step": 3})
    check_tensors(tmp_path / "a.safetensors")
    read_tensors(tmp_path / "a.safetensors")


@given(tensor=tensors(), data=st.data())
@settings(deadline=None)
def test_a_flipped_byte_changes_the_fingerprint(tensor: Tensor, data: st.DataObject) -> None:
    before = fingerprint({"a": tensor})
    flat = tensor.contiguous().clone().reshape(-1)
    if len(flat) == 0:
        return
    content = flat.view(torch.uint8)
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 if tensor.dtype is torch.bool else data.draw(st.integers(1, 255))
    assert fingerprint({"a": flat.reshape(tensor.shape)}) != before


def test_name_type_shape_and_record_are_part_of_the_fingerprint() -> None:
    base = {"a": torch.zeros(4, dtype=torch.uint8), "b": torch.zeros(2, dtype=torch.uint8)}
    others = [
        {"a": base["a"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["b"], "b": base["a"]},
        base | {"a": base["a"].reshape(2, 2)},
        base | {"a": base["a"].reshape(4, 1)},
        base | {"a": base["a"].view(torch.float32)},
        base | {"a": base["a"].view(torch.bool)},
        base | {"c": torch.zeros(0)},
    ]
    prints = [fingerprint(each) for each in (base, *others)] + [fingerprint(base, "{}"), fingerprint(base, '{"a": 1}')]
    assert len(set(prints)) == len(prints)


@given(named=st.dictionaries(NAMES, tensors(), min_size=2, max_size=4))
@settings(deadline=None)
def test_order_and_memory_layout_are_no_part_of_the_fingerprint(named: dict[str, Tensor]) -> None:
    turned = {name: _strided(named[name]) for name in reversed(named)}
    assert fingerprint(turned) == fingerprint(named)


def _strided(tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_damaged_byte_in_the_tensors_is_found(tmp_path: Path, place: str) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(64.0)}, {"step": 3})
    content = bytearray(path.read_bytes())
    offset = {"first": len(content) - 256, "middle": len(content) - 100, "last": len(content) - 1}[place]
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match="checksum"):
        read_tensors(path)


def test_every_damage_is_named_as_one(tmp_path: Path) -> None:
    """Cut anywhere or flipped anywhere, header included: Damaged, and no other exception."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(8.0), "b": torch.tensor(True)}, {"step": 3})
    whole = path.read_bytes()
    broken = [whole[:length] for length in range(0, len(whole), 7)]
    broken += [whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :] for place in range(len(whole))]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(Damaged):
            read_tensors(path)
        with pytest.raises(Damaged):
            check_tensors(path)


def test_a_file_of_tensors_without_our_record_is_damaged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(Damaged):
        read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(Damaged):
        check_tensors(tmp_path / "a.safetensors")


def test_a_disk_without_room_halts_and_leaves_the_older_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Halt, match="make room"):
        write_tensors(path, {"a": torch.ones(1)}, {"step": 2})
    assert read_tensors(path)[1] == {"step": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_file_is_safetensors_and_no_pickle_is_read(
    config: TrainConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(fresh(path, config), (2, 1))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert {"record", "sha256"} == set(json.loads(header["__metadata__"]["harness"]))
    last = max(each["data_offsets"][1] for name, each in header.items() if name != "__metadata__")
    assert len(content) == 8 + length + last

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle is read")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    assert fresh(path, config).restore()


def test_who_has_lost_the_trial_leaves_its_checkpoint_to_the_one_who_has_it(config: TrainConfig, path: Path) -> None:
    late = fresh(path, config)
    run_until(late, (1, 1))
    right = path.read_bytes()

    def check() -> None:
        raise LeaseLost("trial-0")

    late = Checkpoint(path, IDENTITY, late.training, HERE, check)
    with pytest.raises(LeaseLost):
        late.save()
    assert path.read_bytes() == right
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# --- the same bits from any batch ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "multiplier", "optimizer", "schedule"),
    [
        pytest.param(runtime, multiplier, *others, marks=() if "adamw" in others else pytest.mark.slow)
        for runtime, multiplier, others in itertools.product(
            RUNTIMES, (0.5, 0.0), (("adamw", "cosine"), ("adam", "constant"))
        )
    ],
)
def test_a_training_goes_on_from_any_batch_to_the_same_bits(
    config: TrainConfig, tmp_path: Path, runtime: str, multiplier: float, optimizer: Any, schedule: Any
) -> None:
    decay = 0.02 if optimizer == "adamw" else 0.0
    optim = dataclasses.replace(
        config.optim, name=optimizer, weight_decay=decay, depth_lr_mult=multiplier, schedule=schedule
    )
    check_every_stop(tmp_path, dataclasses.replace(config, optim=optim), RUNTIMES[runtime])


@pytest.mark.slow
@pytest.mark.parametrize("runtime", list(RUNTIMES))
@pytest.mark.parametrize("multiplier", [0.5, 0.0])
def test_a_maxvit_goes_on_from_any_batch_to_the_same_bits(
    study: Study, tmp_path: Path, runtime: str, multiplier: float
) -> None:
    backbone = dataclasses.replace(study.train.backbone, stochastic_depth=0.3, dropout=0.3)  # type: ignore[type-var]
    data = Garden(train_per_class=1, val_per_class=1, test_per_class=1, cache=study.train.data.cache)
    optim = dataclasses.replace(study.train.optim, depth_lr_mult=multiplier)
    config = dataclasses.replace(study.train, data=data, backbone=backbone, optim=optim, batch_size=8, epochs=EPOCHS)
    check_every_stop(tmp_path, config, RUNTIMES[runtime], [(1, 1), (2, "end"), (3, 1)])


def test_it_goes_on_after_several_stops_too(config: TrainConfig, path: Path) -> None:
    results, weights = uninterrupted(config, RUNTIMES["fp32"])
    for stop in [*STOPS, None]:
        checkpoint = fresh(path, config)
        assert checkpoint.restore() is (stop != (1, 1))
        run_until(checkpoint, stop)
    assert timeless(checkpoint.training.progress.epochs) == results
    assert equal(state(checkpoint.training), weights)


def test_a_smaller_part_after_running_out_of_memory_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    results = {}
    for stop in (None, (1, 2), (2, 1)):
        path = tmp_path / f"{stop}.safetensors"
        checkpoint = fresh(path, config)
        checkpoint.training.progress.micro_batch = 5
        run_until(checkpoint, stop)
        if stop is not None:
            checkpoint = fresh(path, config)
            assert checkpoint.restore()
            assert checkpoint.training.progress.micro_batch == 5
            run_until(checkpoint)
        results[stop] = timeless(checkpoint.training.progress.epochs)
    assert results[(1, 2)] == results[(2, 1)] == results[None]
    assert {each.micro_batch for each in results[None]} == {5}


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_the_optimizers_state_comes_back_in_the_parameters_layout(
    config: TrainConfig, path: Path, runtime: str
) -> None:
    run_until(fresh(path, config, RUNTIMES[runtime]), (1, 2))
    whole, restored = (fresh(path, config, RUNTIMES[runtime]) for _ in range(2))
    run_until(whole, (1, 2))
    assert restored.restore()
    kinds = set()
    for there, here in zip(parameters(whole.training), parameters(restored.training), strict=True):
        wanted, found = whole.training.optimizer.state[there], restored.training.optimizer.state[here]
        assert found.keys() == wanted.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in found.items():
            assert (tensor.stride(), tensor.dtype) == (wanted[name].stride(), wanted[name].dtype)
            assert torch.equal(tensor, wanted[name])
        assert found["exp_avg"].stride() == here.stride()
        kinds.add(here.is_contiguous())
    assert kinds == ({True, False} if runtime == "channels_last" else {True})


def parameters(training: Training) -> list[nn.Parameter]:
    return [each for group in training.optimizer.param_groups for each in group["params"]]


def test_the_time_of_all_processes_adds_up(config: TrainConfig, path: Path) -> None:
    first = fresh(path, config)
    first.seconds_before = 100.0
    first.training.progress.seconds = 40.0
    run_until(first, (1, 1))
    second = fresh(path, config)
    assert second.restore()
    assert 100.0 <= second.seconds_before <= second.seconds() < 160.0
    run_until(second, (1, "end"))
    assert 40.0 < second.training.progress.epochs[0].seconds < 100.0
    assert second.training.progress.seconds == 0.0


# --- when it is written ---


def test_nothing_is_written_before_the_first_batch(config: TrainConfig, path: Path) -> None:
    checkpoint = fresh(path, config)
    checkpoint.save()
    with pytest.raises(KeyboardInterrupt), checkpoint.saved_when_stopped():
        raise KeyboardInterrupt
    assert not path.parent.exists()


def test_nothing_is_written_inside_a_batch(config: TrainConfig, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = fresh(path, config)
    optimizer, step = checkpoint.training.optimizer, checkpoint.training.optimizer.step
    seen = []

    def stopped_at_once(*args: Any) -> None:
        step()
        seen.append(checkpoint.training.progress.whole)
        checkpoint.save()
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "step", stopped_at_once)
    with pytest.raises(KeyboardInterrupt), checkpoint.saved_when_stopped():
        list(fit(checkpoint.training))
    assert seen == [False] * 3
    assert not path.exists()


def test_the_older_checkpoint_stays_when_a_batch_is_cut_off(
    config: TrainConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, checkpoint_seconds=0.0)
    checkpoint = fresh(path, config)
    step, steps = checkpoint.training.optimizer.step, []

    def cut_off(*args: Any) -> None:
        steps.append(step())
        if len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.training.optimizer, "step", cut_off)
    with pytest.raises(KeyboardInterrupt), checkpoint.saved_when_stopped():
        list(fit(checkpoint.training, checkpoint.after_batch))
    record = read_tensors(path)[1]
    assert (len(record["epochs"]), record["step"]) == (1, 1)
    again = fresh(path, config)
    assert again.restore()
    run_until(again)
    assert timeless(again.training.progress.epochs) == uninterrupted(config, RUNTIMES["fp32"])[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that checkpoints see; it stands still until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    return now


def test_one_is_written_when_the_seconds_are_over_and_not_before(
    config: TrainConfig, path: Path, clock: list[float]
) -> None:
    config = dataclasses.replace(config, checkpoint_seconds=60.0)
    checkpoint = fresh(path, config)
    told = []

    def after_batch() -> None:
        clock[0] += 25.0
        before = path.stat().st_mtime_ns if path.exists() else None
        checkpoint.after_batch()
        told.append(path.exists() and path.stat().st_mtime_ns != before)

    list(fit(checkpoint.training, after_batch))
    # After two batches and the validation of each epoch: 25, 50, 75: written; 100, 125: not yet; 150: written; ...
    assert told == [False, False, True] * EPOCHS


def test_a_restored_training_waits_its_full_time_again(config: TrainConfig, path: Path, clock: list[float]) -> None:
    config = dataclasses.replace(config, checkpoint_seconds=60.0)
    run_until(fresh(path, config), (1, 1))
    clock[0] += 1e6  # the machine was off
    again = fresh(path, config)
    assert again.restore()
    before = path.stat().st_mtime_ns
    clock[0] += 59.0
    again.after_batch()
    assert path.stat().st_mtime_ns == before
    clock[0] += 1.0
    again.after_batch()
    assert path.stat().st_mtime_ns != before


def test_a_finished_trainings_checkpoint_holds_the_model_and_no_optimizer(config: TrainConfig, path: Path) -> None:
    checkpoint = fresh(path, config)
    run_until(checkpoint, (EPOCHS, 1))
    assert any(name.startswith("optimizer/") for name in read_tensors(path)[0])
    run_until(checkpoint)
    checkpoint.save()
    named, record = read_tensors(path)
    assert not [name for name in named if name.startswith("optimizer/")]
    assert len(record["epochs"]) == EPOCHS
    again = fresh(path, config)
    assert again.restore()
    assert equal(state(again.training), state(checkpoint.training))
    assert list(fit(again.training)) == []


# --- which one is used ---


def test_without_a_file_the_training_starts_at_the_beginning(config: TrainConfig, path: Path) -> None:
    checkpoint = fresh(path, config)
    assert not checkpoint.restore()
    assert checkpoint.training.progress.epoch == 1
    assert checkpoint.environments == [HERE]


@pytest.mark.parametrize("changes", [{"study": "v"}, {"key": "trial-1"}, {"seed": 1}, {"fit_on": "train"}])
def test_a_checkpoint_of_another_training_is_not_used(
    config: TrainConfig, path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    run_until(fresh(path, config), (1, 1))
    other = fresh(path, config, identity=IDENTITY | changes)
    before = state(other.training)
    assert not other.restore()
    assert "belongs to another training" in capsys.readouterr().err
    assert equal(state(other.training), before)
    assert other.training.progress.step == 0


def test_another_file_of_ours_in_its_place_is_not_used(
    config: TrainConfig, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved model, say: whole, and with a record of its own."""
    write_tensors(path, {"a": torch.zeros(1)}, {"trial": 0, "seed": 0})
    assert not fresh(path, config).restore()
    assert "belongs to another training" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_said_and_not_used(
    config: TrainConfig, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_until(fresh(path, config), (1, 1))
    path.write_bytes(path.read_bytes()[:-1])
    checkpoint = fresh(path, config)
    before = state(checkpoint.training)
    assert not checkpoint.restore()
    message = capsys.readouterr().err
    assert str(path) in message
    assert "the training starts again" in message
    assert equal(state(checkpoint.training), before)


def test_the_identity_is_what_decides_the_numbers(config: TrainConfig) -> None:
    base = identity_of("u", "trial-0", 1, config)
    assert json.loads(json.dumps(base)) == base
    same = [
        dataclasses.replace(config, checkpoint_seconds=1.0),
        dataclasses.replace(config, data=dataclasses.replace(config.data, cache="elsewhere")),  # type: ignore[type-var]
        dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, device="auto")),
    ]
    assert all(identity_of("u", "trial-0", 1, each) == base for each in same)
    other = [
        identity_of("v", "trial-0", 1, config),
        identity_of("u", "trial-1", 1, config),
        identity_of("u", "trial-0", 2, config),
        identity_of("u", "trial-0", 1, dataclasses.replace(config, epochs=4)),
        identity_of("u", "trial-0", 1, dataclasses.replace(config, backbone=SmallNet(dropout=0.1))),
    ]
    assert base not in other


def test_another_environment_is_said_and_kept(
    config: TrainConfig, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_until(fresh(path, config), (1, 1))
    there = HERE | {"threads": "8"}
    second = fresh(path, config, environment=there)
    assert second.restore()
    message = capsys.readouterr().err
    assert "threads was 1, is 8" in message
    assert "last bits may differ" in message
    assert second.environments == [HERE, there]
    run_until(second, (1, 2))
    third = fresh(path, config, environment=there)
    assert third.restore()
    assert capsys.readouterr().err == ""
    assert third.environments == [HERE, there]
    back = fresh(path, config)
    assert back.restore()
    assert "threads was 8, is 1" in capsys.readouterr().err


def test_the_same_environment_is_not_worth_a_word(
    config: TrainConfig, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_until(fresh(path, config), (1, 1))
    assert fresh(path, config).restore()
    assert capsys.readouterr().err == ""


def test_differences_name_what_was_added_and_taken_away_too() -> None:
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    assert (
        differences({"a": "1", "b": "2"}, {"a": "3", "c": "4"}) == "a was 1, is 3; b was 2, is None; c was None, is 4"
    )


def test_a_checkpoint_of_a_version_with_fewer_fields_is_used_while_they_have_their_defaults(
    tmp_path: Path, config: TrainConfig
) -> None:
    training = assemble(config, RUNTIMES["fp32"], 0)
    older = identity_of("uid", "trial-0", 0, config)
    del older["configuration"]["optim.frozen_depths"]
    checkpoint = Checkpoint(tmp_path / "a.safetensors", older, training, {})
    next(fit(training, checkpoint.after_batch))
    checkpoint.save()
    now = identity_of("uid", "trial-0", 0, config)
    assert Checkpoint(tmp_path / "a.safetensors", now, assemble(config, RUNTIMES["fp32"], 0), {}).restore()
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, frozen_depths=1))
    now = identity_of("uid", "trial-0", 0, other)
    assert not Checkpoint(tmp_path / "a.safetensors", now, assemble(other, RUNTIMES["fp32"], 0), {}).restore()


# --- tidying ---


def test_removing_takes_the_partial_file_and_the_empty_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "tiny.checkpoints"
    folder.mkdir()
    for name in ("trial-0.safetensors", "trial-0.safetensors.partial", "trial-1.safetensors"):
        (folder / name).touch()
    remove(folder / "trial-0.safetensors")
    assert [each.name for each in folder.iterdir()] == ["trial-1.safetensors"]
    remove(folder / "trial-1.safetensors")
    assert not folder.exists()
    remove(folder / "trial-1.safetensors")


def test_stale_are_all_files_that_no_wanted_training_reads(tmp_path: Path) -> None:
    assert stale(tmp_path / "nowhere", {"trial-1"}, "uid") == []
    for name in ("trial-0.safetensors", "trial-1.safetensors", "trial-1.safetensors.partial", "notes.txt"):
        (tmp_path / name).touch()
    write_tensors(tmp_path / "trial-2.safetensors", {}, {"identity": {"study": "another"}})
    write_tensors(tmp_path / "trial-3.safetensors", {}, {"identity": {"study": "uid"}})
    names = [each.name for each in stale(tmp_path, {"trial-1"}, "uid")]
    assert names == ["notes.txt", "trial-0.safetensors", "trial-1.safetensors.partial", "trial-3.safetensors"]
