"""What a study may maximize: values as the literature defines them, numbers per image whose mean they are."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn import metrics

from harness.base.errors import InputError
from harness.training.assemble import assemble
from harness.training.loop import fit, measure
from harness.training.objective import COLDEST, HOTTEST, class_weights, contributions, temperature
from harness.training.step import accumulate_gradient
from tests.conftest import make_study
from tests.training.test_checkpoint import RUNTIMES

CPU = RUNTIMES["fp32"]
LABELS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=2, max_size=60)


@given(LABELS)
def test_the_mean_over_the_images_is_the_metric_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = (numpy.array(each) for each in zip(*pairs, strict=True))
    losses = numpy.linspace(0.1, 2, len(labels))

    def value(objective: Any) -> float:
        return float(contributions(objective, labels, predicted, losses).mean())

    known = numpy.unique(labels)
    f1 = metrics.f1_score(labels, predicted, labels=known, average="macro", zero_division=0)
    recall = metrics.recall_score(labels, predicted, labels=known, average="macro", zero_division=0)
    assert value("accuracy") == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert value("balanced_accuracy") == pytest.approx(recall)
    assert value("macro_f1") == pytest.approx(f1)
    assert value("loss") == pytest.approx(math.exp(-losses.mean()))


@pytest.mark.parametrize("objective", ["balanced_accuracy", "macro_f1", "loss"])
def test_contributions_vary_as_the_value_does_over_resampled_images(objective: Any) -> None:
    random = numpy.random.default_rng(0)
    labels = random.choice(5, 500, p=(0.4, 0.25, 0.15, 0.1, 0.1))
    predicted = numpy.where(random.random(500) < 0.7, labels, random.integers(0, 5, 500))
    losses = random.exponential(size=500)
    found = contributions(objective, labels, predicted, losses)
    values = []
    for _ in range(400):
        drawn = random.integers(0, 500, 500)
        values.append(contributions(objective, labels[drawn], predicted[drawn], losses[drawn]).mean())
    assert found.std() / math.sqrt(500) == pytest.approx(numpy.std(values), rel=0.15)


def test_measured_values_are_stored_with_the_epoch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 4), torch.arange(40) % 4
    plain, other = measure(logits, labels), measure(logits, labels, "macro_f1")
    assert plain.value == plain.accuracy
    assert (plain.score, plain.contributions) == (None, None)
    assert other.value == pytest.approx(metrics.f1_score(labels, logits.argmax(1), average="macro"))
    assert (other.loss, other.correct, other.hits) == (plain.loss, plain.correct, plain.hits)


# -- class weights -----------------------------------------------------------------------------------------------------


def test_weights_have_mean_1_over_the_images_and_even_out_the_classes() -> None:
    labels = numpy.array([0] * 6 + [1] * 3 + [3])
    for power in (0.0, 0.5, 1.0):
        weights = class_weights(labels, 4, power)
        assert weights[labels].mean() == pytest.approx(1)
        assert weights[2] == 0
        assert weights[3] / weights[0] == pytest.approx(6**power)
    assert class_weights(labels, 4, 1.0)[[0, 1, 3]] * [6, 3, 1] == pytest.approx(numpy.full(3, 10 / 3))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_weights_enter_the_loss_alike_in_parts_and_in_the_whole_batch(size: int) -> None:
    torch.manual_seed(0)
    model, images, labels = torch.nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    weights = torch.tensor([0.5, 1.0, 2.0])
    wanted = F.cross_entropy(model(images), labels, reduction="none", label_smoothing=0.0) * weights[labels]
    loss, _ = accumulate_gradient(model, images, labels, CPU, 0.0, size, weights)
    gradient = model.weight.grad
    model.weight.grad = None
    wanted.mean().backward()
    assert loss.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    torch.testing.assert_close(gradient, model.weight.grad)


def test_a_training_uses_the_weights_of_its_own_images(image_cache: Path) -> None:
    config = dataclasses.replace(make_study(image_cache).train, epochs=1)
    weighted = assemble(dataclasses.replace(config, class_weight=1.0), CPU, 0)
    assert assemble(config, CPU, 0).class_weights() is None
    weights = weighted.class_weights()
    assert weights is not None
    assert weights.tolist() == pytest.approx([1.0] * len(weighted.classes))  # the garden is balanced
    (result,) = fit(weighted)
    assert result.is_finite()
    with pytest.raises(InputError, match="class_weight must lie in"):
        dataclasses.replace(config, class_weight=1.5)


# -- the temperature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_temperature_of_sampled_labels_is_found_again(true: float) -> None:
    random = numpy.random.default_rng(0)
    logits = random.normal(size=(20_000, 5)) * 2
    chances = numpy.exp(logits / true)
    chances /= chances.sum(axis=1, keepdims=True)
    labels = (random.random((len(logits), 1)) > chances.cumsum(axis=1)).sum(axis=1)
    assert temperature(logits, labels) == pytest.approx(true, rel=0.05)


def test_it_is_the_minimum_of_the_cross_entropy() -> None:
    random = numpy.random.default_rng(1)
    logits, labels = random.normal(size=(60, 4)) * 3, random.integers(0, 4, 60)
    logits[numpy.arange(60), labels] += 2.0

    def loss(degree: float) -> float:
        return float((logsumexp(logits / degree, axis=1) - logits[numpy.arange(60), labels] / degree).mean())

    found = temperature(logits, labels)
    assert found == pytest.approx(minimize_scalar(loss, bounds=(0.2, 5.0), method="bounded").x, rel=1e-3)


def test_it_stays_within_bounds_and_knows_no_numbers() -> None:
    labels = numpy.arange(4)
    assert temperature(numpy.eye(4) * 9, labels) == COLDEST  # all right
    assert temperature(numpy.eye(4)[::-1] * 9, labels) == HOTTEST  # all wrong
    assert temperature(numpy.zeros((4, 4)), labels) is not None
    assert temperature(numpy.full((4, 4), numpy.nan), labels) is None
