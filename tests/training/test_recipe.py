"""The recipe: each of its parts resumes to the same bits, changes the training, and does what it says."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
from harness.base.errors import InputError
from harness.config import space
from harness.config.study import Study
from harness.config.train import OptimConfig, TrainConfig
from harness.data.augment import normalise
from harness.data.mixing import Target
from harness.data.splits import load_test
from harness.models.maxvit import TinyMaxViT
from harness.training import interrupt
from harness.training.assemble import assemble, check_early_size
from harness.training.loop import _in_epoch, fit
from harness.training.optim import Average, lr_factor
from harness.training.step import predict, train_step
from tests.conftest import PROJECT
from tests.small import SmallNet
from tests.training.test_checkpoint import RUNTIMES, check_every_stop, fresh, run_until, uninterrupted
from tests.training.test_loop import equal, state, timeless

CPU = RUNTIMES["fp32"]
EPOCHS = 3
RECIPES: dict[str, dict[str, Any]] = {
    "mixup": {"augment.mixup": 0.4, "augment.tail": 0.0},
    "cutmix, with a tail": {"augment.cutmix": 1.0, "augment.tail": 0.4},
    "class weights": {"augment.mixup": 0.4, "augment.cutmix": 1.0, "class_weight": 1.0},
    "TrivialAugment": {"augment.trivial_augment": True},
    "random erasing": {"augment.random_erasing": 0.5},
    "smaller images first": {"augment.early_size": 48, "augment.tail": 0.4},
    "average": {"ema": 0.2},
    "head first": {"optim.head_epochs": 1},
    "frozen depths": {"optim.frozen_depths": 1, "ema": 0.2},
    "floor": {"optim.lr_floor": 0.1},
    "SGD": {"optim.name": "sgd", "optim.base_lr": 0.1},
    "all": {
        "augment.mixup": 0.4,
        "augment.cutmix": 1.0,
        "augment.trivial_augment": True,
        "augment.random_erasing": 0.3,
        "augment.early_size": 48,
        "augment.tail": 0.4,
        "ema": 0.2,
        "optim.head_epochs": 1,
        "optim.lr_floor": 0.05,
    },
}


@pytest.fixture
def plain(study: Study) -> TrainConfig:
    """Three epochs of two batches."""
    return dataclasses.replace(study.train, backbone=SmallNet(), epochs=EPOCHS)


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    for path, value in changes.items():
        config = space.replace(config, path, value)
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_it_goes_on_from_any_batch_to_the_same_bits(plain: TrainConfig, tmp_path: Path, name: str) -> None:
    config = changed(plain, RECIPES[name])
    stops: list[tuple[int, Any]] = [(1, 1), (2, 2), (2, "end"), (3, 1)]
    check_every_stop(tmp_path, config, CPU, stops)
    results, others = (timeless(list(fit(assemble(each, CPU, 0)))) for each in (config, plain))
    assert results != others


@pytest.mark.parametrize("name", get_args(get_type_hints(OptimConfig)["name"]))
def test_every_optimizer_goes_on_to_the_same_bits(plain: TrainConfig, tmp_path: Path, name: str) -> None:
    coupled = name in ("adam", "adamax", "rmsprop", "adagrad", "adadelta")
    optim = dataclasses.replace(plain.optim, name=name, weight_decay=0.0 if coupled else 0.02)  # type: ignore[arg-type]
    check_every_stop(tmp_path, dataclasses.replace(plain, optim=optim), CPU, [(2, 1)])


def test_momentum_and_decay_reach_the_optimizer(plain: TrainConfig) -> None:
    def built(**changes: Any) -> dict[str, Any]:
        optim = dataclasses.replace(plain.optim, momentum=0.8, **changes)
        return assemble(dataclasses.replace(plain, optim=optim), CPU, 0).optimizer.param_groups[0]

    assert built(name="sgd")["momentum"] == built(name="rmsprop", weight_decay=0.0)["momentum"] == 0.8
    assert built(name="adamw")["betas"] == built(name="nadam")["betas"] == (0.8, 0.999)
    assert built(name="nadam")["decoupled_weight_decay"]
    assert built(name="radam")["decoupled_weight_decay"]


# --- the average of the weights ---


@pytest.mark.parametrize("at", [1, 2])  # before the validation of the first epoch, and after it
def test_a_stop_inside_a_swap_leaves_no_mixture(
    at: int, plain: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = dataclasses.replace(plain, ema=0.5), tmp_path / "a.safetensors"
    swaps = itertools.count(1)
    results, weights = uninterrupted(config, CPU)

    def stopped(average: Average) -> None:
        stops = next(swaps) == at
        for name, current in average._current.items():
            kept = current.clone()
            current.copy_(average.tensors[name])
            average.tensors[name].copy_(kept)
            if stops:
                os.kill(os.getpid(), signal.SIGTERM)
                stops = False

    with interrupt.handled(), monkeypatch.context() as patch:
        patch.setattr(Average, "swap", stopped)
        run_until(fresh(path, config), (9, 9))
    again = fresh(path, config)
    assert again.restore()
    run_until(again)
    assert timeless(again.training.progress.epochs) == results
    assert equal(state(again.training), weights)


def test_the_average_is_validated_and_remains(plain: TrainConfig) -> None:
    config = dataclasses.replace(plain, ema=0.5)
    training, other = assemble(config, CPU, 0), assemble(plain, CPU, 0)
    average = {name: each.clone() for name, each in other.model.state_dict().items()}
    steps = EPOCHS * 2

    def after_batch() -> None:
        number = len(seen)
        if number < steps and other.progress.step:  # not after a validation
            seen.append(number)
            decay = min(math.exp(-1 / (0.5 * steps)), (1 + number) / (10 + number))
            for name, each in other.model.state_dict().items():
                if each.is_floating_point():
                    average[name].mul_(decay).add_(each, alpha=1 - decay)

    seen: list[int] = []
    last = list(fit(other, after_batch))[-1]
    averaged = list(fit(training))[-1]
    assert averaged.train == last.train  # it trains as without
    assert averaged.val != last.val
    for name, each in training.model.state_dict().items():
        if each.is_floating_point():
            torch.testing.assert_close(each, average[name], rtol=1e-4, atol=1e-5)
            assert name.endswith("running_var") or not torch.equal(each, other.model.state_dict()[name])


def test_frozen_weights_have_no_average(plain: TrainConfig) -> None:
    config = changed(plain, {"ema": 0.2, "optim.depth_lr_mult": 0.0})
    training = assemble(config, CPU, 0)
    before = state(training)
    assert training.average is not None
    assert not any(name.endswith(("0.weight", "0.bias")) and name[0] in "01" for name in training.average.tensors)
    list(fit(training))
    assert equal(*({n: t for n, t in each.items() if n[0] in "01"} for each in (before, state(training))))


# --- the head first ---


def test_only_the_head_trains_in_its_epochs_and_then_all_warms_up(plain: TrainConfig) -> None:
    config = changed(plain, {"optim.head_epochs": 1, "optim.warmup_epochs": 1.0})
    training = assemble(config, CPU, 0)
    states, rates = [state(training)], []
    results = fit(training, lambda: rates.append([group["lr"] for group in training.optimizer.param_groups]))
    states += [state(training) for _ in results]
    moved = [{name[0] for name in one if not torch.equal(one[name], two[name])} for one, two in pairwise(states)]
    assert moved == [{"2"}, {"0", "1", "2"}, {"0", "1", "2"}]
    head, body = (
        [each[place] / training.optimizer.param_groups[place]["peak_lr"] for each in rates] for place in (0, -1)
    )
    cosine = [lr_factor(step, 6, 2, "cosine") for step in range(6)]
    steps = [0, 1, 3, 4, 6, 7]  # the others are validations
    assert [head[step] for step in steps] == pytest.approx(cosine)
    assert [body[step] for step in steps[2:]] == pytest.approx([cosine[2] / 3, cosine[3] * 2 / 3, *cosine[4:]])


# --- frozen depths ---


@pytest.mark.parametrize(("frozen", "moved"), [(0, "012"), (1, "12"), (2, "2")])
def test_the_first_depths_are_frozen_with_their_statistics(plain: TrainConfig, frozen: int, moved: str) -> None:
    training = assemble(changed(plain, {"optim.frozen_depths": frozen}), CPU, 0)
    before = state(training)
    list(fit(training))
    after = state(training)
    assert {name[0] for name in after if not torch.equal(before[name], after[name])} == set(moved)
    trained = {each for group in training.optimizer.param_groups for each in group["params"]}
    assert {name[0] for name, each in training.model.named_parameters() if each in trained} == set(moved)


def test_not_all_depths_can_be_frozen(study: Study) -> None:
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, backbone=SmallNet()))
    study.with_settings(["optim.frozen_depths=2"]).check_frozen_depths()
    with pytest.raises(InputError, match=r"frozen_depths is or may become 3, and .* has 3 depths.*choose at most 2"):
        study.with_settings(["optim.frozen_depths=3"]).check_frozen_depths()
    searched = dataclasses.replace(study, space={"optim.frozen_depths": space.Int(0, 3)})
    with pytest.raises(InputError, match="choose at most 2"):
        harness.run(searched, progress=False)


# --- the tail, and smaller images before it ---


def test_the_last_epochs_are_in_full_size_and_not_mixed(plain: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(plain, {"augment.early_size": 48, "augment.mixup": 1.0, "augment.tail": 0.4})
    seen = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor | Target, *others: Any, **options: Any) -> Any:
        seen.append((images.shape[-1], isinstance(labels, Target)))
        return train_step(model, images, labels, *others, **options)

    monkeypatch.setattr("harness.training.loop.train_step", watched)
    list(fit(assemble(config, CPU, 0)))
    assert seen == [(48, True)] * 2 + [(64, False)] * 4


def test_a_model_of_one_size_refuses_smaller_images_first() -> None:
    check_early_size(SmallNet(), 64, 32)
    check_early_size(TinyMaxViT(), 64, 64)
    with pytest.raises(
        InputError, match=r"augment\.early_size: the model for images of 64 x 64 pixels does not take 48"
    ):
        check_early_size(TinyMaxViT(), 64, 48)


# --- the loss of mixed images ---


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_that_of_mixed_labels(micro_batch: int | None, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images, share = torch.randn(8, 5, generator=generator), torch.rand(8, generator=generator)
    labels, others = torch.randint(4, (2, 8), generator=generator)
    weights = torch.tensor([0.5, 1.0, 1.5, 1.0]) if weighted else None
    model = nn.Linear(5, 4)
    both = share.unsqueeze(1) * F.one_hot(labels, 4) + (1 - share.unsqueeze(1)) * F.one_hot(others, 4)
    expected = F.cross_entropy(model(images), both, weights, label_smoothing=0.1)
    gradient = torch.autograd.grad(expected, model.weight)[0]
    correct = (model(images).argmax(1) == both.argmax(1)).sum()
    target = Target(labels=labels, others=others, share=share)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"label_smoothing": 0.1, "clip_norm": None, "micro_batch": micro_batch, "class_weights": weights}
    done = train_step(model, images, target, optimizer, CPU, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(done.loss / 8, expected.detach())
    torch.testing.assert_close(model.weight.grad, gradient)
    assert done.correct == correct


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augment.mixup": -1.0}, r"augment\.mixup must lie between 0\.01 and 100, or be 0"),
        ({"augment.cutmix": 1e9}, r"augment\.cutmix must lie between"),
        ({"augment.random_erasing": 2.0}, r"augment\.random_erasing is a probability"),
        ({"augment.tail": 1.5}, r"augment\.tail is a share of the epochs"),
        ({"augment.early_size": 0}, r"augment\.early_size must be at least 1 pixel"),
        ({"augment.early_size": 65}, r"augment\.early_size \(65\) must not be greater than data\.image_size \(64\)"),
        ({"ema": 1.5}, r"ema must lie in 0\.\.1"),
        ({"optim.momentum": 1.0}, r"optim\.momentum must lie in 0\.\.1, 1 excluded"),
        ({"optim.lr_floor": -0.1}, r"optim\.lr_floor must lie in 0\.\.1"),
        ({"optim.head_epochs": -1}, r"optim\.head_epochs must be 0 or more"),
        ({"optim.frozen_depths": -1}, r"optim\.frozen_depths must be 0 or more"),
        (
            {"optim.head_epochs": 3},
            r"optim\.head_epochs is or may become 3, and epochs is or may become 3; choose fewer",
        ),
        ({"optim.name": "rmsprop"}, r"optim\.name rmsprop has no decoupled weight decay"),
        ({"optim.name": "adagrad", "optim.momentum": 0.5}, r"adagrad has no"),
        ({"optim.depth_lr_mult": 0.0, "feature_views": 2, "augment.cutmix": 1.0}, "feature_views has no images to cut"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_makes_no_sense_is_one_sentence(plain: TrainConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        changed(plain, changes)


# --- the mirror image at test time ---


@pytest.mark.usefixtures("mlruns")
def test_a_study_reports_images_and_mirror_images_beside_its_result(study: Study, tmp_path: Path) -> None:
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, backbone=SmallNet()))
    plain = harness.run(dataclasses.replace(study, name="plain"), home=tmp_path, progress=False)
    result = harness.run(study.with_settings(["final.flip=true"]), home=tmp_path, progress=False)
    assert result.final is not None
    assert plain.final is not None
    assert plain.final.flipped is None
    assert result.final.value == plain.final.value  # the mirror image changes only its own line
    model = result.model.predictor._model
    test = load_test(study.train.data, SmallNet().preprocessing())
    inputs = normalise(test.images)
    logits = [predict(model, each, CPU) for each in (inputs, inputs.flip(3))]
    mean = sum(torch.softmax(each, 1) for each in logits)
    assert isinstance(mean, Tensor)
    assert result.final.flipped == pytest.approx((mean.argmax(1) == test.labels).float().mean().item())
    assert f"Averaged over each image and its mirror image: {100 * result.final.flipped:.2f} %." in result.summary()
    with pytest.raises(InputError, match=r"final\.flip needs images, but feature_views trains on features"):
        study.with_settings(["final.flip=true", "optim.depth_lr_mult=0", "feature_views=1"])


@pytest.mark.parametrize("epochs", [1, 5, 10, 15, 60])
def test_the_tail_has_its_share_of_the_epochs(plain: TrainConfig, epochs: int) -> None:
    for twentieths in range(21):
        config = changed(plain, {"epochs": epochs, "augment.mixup": 0.2, "augment.tail": twentieths / 20})
        mixed = sum(_in_epoch(config, epoch).augment.mixup > 0 for epoch in range(1, epochs + 1))
        assert mixed == epochs * (20 - twentieths) // 20


def test_nothing_is_asked_of_mps_that_it_cannot_do() -> None:
    """It has no doubles, and an asynchronous copy to it reads memory that was freed meanwhile (pytorch 189690)."""
    source = {each.name: each.read_text(encoding="utf-8") for each in (PROJECT / "harness").rglob("*.py")}
    assert not any(".double().cpu()" in text for text in source.values())
    assert [name for name, text in source.items() if "non_blocking=True" in text] == ["splits.py"]  # a CUDA device's


def test_a_mask_of_infinities_is_not_averaged() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    model.register_buffer("mean", torch.zeros(2))
    average = Average(model, model, [])
    average.update(0, 10, 0.1)
    average.swap()
    assert torch.equal(model.mask, torch.full((2, 2), -torch.inf))  # type: ignore[arg-type]
