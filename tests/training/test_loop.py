"""The training loop: the same seed gives the same bits, every image counts once an epoch, and closing it stops it."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.config.events import EpochResult, Metrics
from harness.config.study import Study
from harness.data.augment import IMAGENET, normalise
from harness.data.splits import ImageSet, Reader
from harness.training.assemble import assemble, with_validation_images
from harness.training.loop import EVALUATION_BATCH, Training, _batches, fit, logits_of, measure
from harness.training.optim import lr_factor
from harness.training.step import Runtime, predict

CPU = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)


def training_of(study: Study, seed: int = 0, **changes: Any) -> Training:
    return assemble(dataclasses.replace(study.train, **changes), CPU, seed)


def state(training: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(results: list[EpochResult]) -> list[EpochResult]:
    return [dataclasses.replace(result, seconds=0.0) for result in results]


# --- the same seed, the same curve ---


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results_and_weights_bit_for_bit(study: Study) -> None:
    first, again = training_of(study), training_of(study)
    results = timeless(list(fit(first)))
    torch.rand(17)  # whatever else draws from the global generators
    random.random()
    np.random.rand(3)
    assert timeless(list(fit(again))) == results
    assert equal(state(first), state(again))


@pytest.mark.slow
def test_images_read_beside_the_step_before_give_the_same_bits(study: Study) -> None:
    usual, beside = training_of(study), training_of(study)
    assert isinstance(beside.train, ImageSet)
    reading = dataclasses.replace(beside.train, reader=Reader(beside.train.images, CPU.device))
    beside = dataclasses.replace(beside, train=reading)
    assert timeless(list(fit(usual))) == timeless(list(fit(beside)))
    assert equal(state(usual), state(beside))


@pytest.mark.slow
def test_another_seed_gives_another_curve(study: Study) -> None:
    first, other = (next(fit(training_of(study, seed))) for seed in (0, 1))
    assert first.train != other.train
    assert first.val != other.val


@pytest.mark.slow
def test_torchs_global_generator_is_left_alone_in_every_epoch(study: Study) -> None:
    before = torch.get_rng_state()
    for _ in fit(training_of(study)):
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_an_epoch_taken_up_from_its_state_equals_the_uninterrupted_one(study: Study) -> None:
    """Model and optimizer are all that epoch 2 needs of epoch 1; its draws follow from its number."""
    whole = training_of(study)
    epochs = fit(whole)
    next(epochs)
    taken_up = training_of(study)
    taken_up.model.load_state_dict(state(whole))
    taken_up.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    taken_up.progress.epochs = list(whole.progress.epochs)
    assert timeless(list(fit(taken_up))) == timeless([next(epochs)])
    assert equal(state(taken_up), state(whole))


@pytest.mark.slow
def test_epochs_draw_different_numbers(study: Study) -> None:
    first, second = training_of(study), training_of(study)
    second.progress.epochs = [next(fit(training_of(study)))]  # as if one had gone before, with the same weights
    assert next(fit(first)).train != next(fit(second)).train


# --- what an epoch reports ---


@pytest.mark.slow
def test_every_epoch_is_reported_with_counts_over_whole_splits(study: Study) -> None:
    results = list(fit(training_of(study)))
    assert [result.epoch for result in results] == [1, 2]
    for result in results:
        assert result.val is not None
        for metrics in (result.train, result.val):
            assert metrics.total == 32
            assert 0 <= metrics.correct <= 32
            assert metrics.accuracy == metrics.correct / metrics.total
            assert math.isfinite(metrics.loss)
        assert result.seconds > 0


def test_evaluation_counts_what_the_logits_say(study: Study) -> None:
    training = training_of(study)
    assert training.val is not None
    logits, labels = logits_of(training.model, training.val, CPU), training.val.labels
    expected = Metrics(
        loss=F.cross_entropy(logits, labels).item(), correct=int((logits.argmax(1) == labels).sum()), total=32
    )
    assert measure(logits, labels) == expected


def test_logits_come_in_the_order_of_the_images_over_several_batches(study: Study) -> None:
    model = training_of(study).model
    count = EVALUATION_BATCH + 3
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator)
    logits = logits_of(
        model, ImageSet(images=images, labels=torch.zeros(count, dtype=torch.int64), preprocessing=IMAGENET), CPU
    )
    assert logits.shape == (count, 16)
    for index in (0, EVALUATION_BATCH - 1, EVALUATION_BATCH, count - 1):
        alone = predict(model, normalise(images[index : index + 1]), CPU)[0]
        torch.testing.assert_close(logits[index], alone, rtol=1e-4, atol=1e-4)


def test_evaluation_changes_neither_weights_nor_statistics(study: Study) -> None:
    training = training_of(study)
    assert training.val is not None
    before = state(training)
    first, again = (logits_of(training.model, training.val, CPU) for _ in range(2))
    assert torch.equal(first, again)
    assert equal(state(training), before)


def test_training_leaves_the_images_as_they_are(study: Study) -> None:
    training = training_of(study)
    before = training.train.images.clone()
    next(fit(training))
    assert torch.equal(training.train.images, before)


@pytest.mark.slow
def test_the_last_rate_of_a_cosine_is_small(study: Study) -> None:
    results = list(fit(training_of(study, epochs=3)))
    peak, steps = study.train.optim.base_lr, 2
    for result in results:
        factor = lr_factor(result.epoch * steps - 1, 3 * steps, study.train.optim.warmup_epochs * steps, "cosine")
        assert result.lr == pytest.approx(peak * factor)
    assert 0 < results[-1].lr < 0.2 * peak


def test_without_validation_images_there_is_no_validation_and_more_to_train_on(study: Study) -> None:
    training = with_validation_images(training_of(study))
    result = next(fit(training))
    assert training.val is None
    assert result.val is None
    assert result.train.total == 64
    assert "val_accuracy" not in result.metrics()


# --- stopping and going wrong ---


def test_closing_after_an_epoch_stops_the_training(study: Study) -> None:
    training = training_of(study)
    with closing(fit(training)) as epochs:
        next(epochs)
    after_one = state(training)
    assert next(epochs, None) is None
    assert equal(state(training), after_one)
    assert len(training.progress.epochs) == 1


@pytest.mark.slow
def test_progress_tells_epoch_and_steps(study: Study) -> None:
    training = training_of(study)
    told = []
    list(fit(training, lambda: told.append((training.progress.epoch, training.progress.step))))
    assert told == [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0)]  # once more after each validation
    assert training.progress.steps == 2


@pytest.mark.slow
def test_pixels_that_are_no_numbers_give_a_loss_that_is_none_not_an_exception(study: Study) -> None:
    training = training_of(study)
    images = torch.full((32, 72, 72, 3), math.nan)
    broken = dataclasses.replace(
        training, train=ImageSet(images=images, labels=training.train.labels, preprocessing=IMAGENET)
    )
    results = list(fit(broken))
    assert len(results) == 2
    assert not math.isfinite(results[0].train.loss)
    assert results[0].train.total == 32


def test_an_absurd_learning_rate_gives_a_result_not_an_exception(study: Study) -> None:
    optim = dataclasses.replace(study.train.optim, base_lr=1e30, depth_lr_mult=1.0, warmup_epochs=0.0)
    assert not math.isfinite(next(fit(training_of(study, optim=optim))).train.loss)


# --- batches ---


@given(st.integers(1, 400), st.integers(1, 100), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_every_image_is_in_one_batch_and_batches_are_even(count: int, batch_size: int, seed: int) -> None:
    batches = _batches(count, batch_size, torch.Generator().manual_seed(seed))
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == math.ceil(count / batch_size)


def test_images_come_in_another_order_with_another_seed() -> None:
    orders = {tuple(torch.cat(_batches(50, 7, torch.Generator().manual_seed(seed))).tolist()) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("batch_size", [5, 31, 32, 100])
def test_an_uneven_batch_size_still_counts_every_image(study: Study, batch_size: int) -> None:
    assert next(fit(training_of(study, batch_size=batch_size))).train.total == 32
