"""Parameter groups: a partition by depth, rates that fall with it, freezing, and the schedule over all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import StochasticDepth

from harness.base.errors import InputError
from harness.config.contracts import Backbone, name_of
from harness.config.study import Study
from harness.config.train import OptimConfig
from harness.models.maxvit import MaxViTT, TinyMaxViT
from harness.training.assemble import assemble
from harness.training.loop import Training, fit
from harness.training.optim import (
    _decays,
    build_optimizer,
    freeze,
    group_table,
    lr_factor,
    parameter_groups,
    set_lr,
    set_training,
)
from harness.training.step import Runtime, compile_parts

CPU = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)
BACKBONES = {"MaxViTT": MaxViTT(pretrained=False), "TinyMaxViT": TinyMaxViT(pretrained=False, hidden=(16,))}
BUILT: dict[str, nn.Module] = {}


def built(family: str) -> nn.Module:
    """The models are only looked at here, so each is built once."""
    if family not in BUILT:
        BUILT[family] = BACKBONES[family].build(16, 224 if family == "MaxViTT" else 64)
    return BUILT[family]


def rates(**fields: Any) -> OptimConfig:
    return OptimConfig(**{"base_lr": 1e-3, "depth_lr_mult": 0.5, **fields})


# --- the partition ---


@pytest.mark.parametrize("by", ["block", "layer"])
@pytest.mark.parametrize("family", BACKBONES)
@given(base_lr=st.floats(1e-6, 1), mult=st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_every_parameter_lies_in_one_group_whose_rate_falls_with_the_distance(
    family: str, by: Any, base_lr: float, mult: float
) -> None:
    model, depths = built(family), BACKBONES[family].depths(by)
    groups = parameter_groups(model, depths, rates(base_lr=base_lr, depth_lr_mult=mult, depth_by=by))
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(group.count for group in groups) == sum(parameter.numel() for parameter in model.parameters())
    assert {group.distance for group in groups} == set(range(len(depths)))
    for group in groups:
        assert group.lr == base_lr * mult**group.distance
        assert group.frozen == (group.lr == 0)
        assert name_of(depths[len(depths) - 1 - group.distance]) == group.depth
        assert all(name.startswith(f"{group.depth}.") for name in group.names)
    assert groups[0].depth == "classifier"
    assert groups[0].lr == base_lr


@pytest.mark.parametrize("family", BACKBONES)
def test_biases_norms_and_position_tables_do_not_decay_and_all_else_does(family: str) -> None:
    model = built(family)
    groups = parameter_groups(model, BACKBONES[family].depths("block"), rates(weight_decay=0.07))
    decay = {name: group.weight_decay for group in groups for name in group.names}
    spared = {name for name, _ in model.named_parameters() if name.endswith((".bias", "relative_position_bias_table"))}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            spared |= {f"{name}.{each}" for each, _ in module.named_parameters()}
    assert any(name.endswith("relative_position_bias_table") for name in spared)
    assert {name for name, rate in decay.items() if rate == 0} == spared
    assert {rate for name, rate in decay.items() if name not in spared} == {0.07}


def test_a_depth_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"9\. matches no parameter"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), ["9.", "0."], rates())


def test_a_parameter_without_a_depth_is_an_error() -> None:
    with pytest.raises(InputError, match=r"1\.weight matches none"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0."], rates())


@pytest.mark.parametrize(("mult", "frozen"), [(0.0, True), (0.5, False)])
def test_the_table_names_every_depth_and_says_what_is_frozen(mult: float, frozen: bool) -> None:
    backbone = BACKBONES["TinyMaxViT"]
    table = group_table(parameter_groups(built("TinyMaxViT"), backbone.depths("block"), rates(depth_lr_mult=mult)))
    for depth in backbone.depths("block"):
        assert depth.rstrip(".") in table
    assert ("frozen" in table) == frozen
    assert "1.000e-03" in table


# --- freezing ---


def training_of(study: Study, **optim: Any) -> Training:
    config = dataclasses.replace(study.train, optim=dataclasses.replace(study.train.optim, **optim))
    return assemble(config, CPU, seed=0)


def state(training: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


@pytest.mark.parametrize("by", ["block", "layer"])
def test_a_multiplier_of_zero_trains_the_head_and_leaves_the_backbone_bit_for_bit(study: Study, by: Any) -> None:
    training = training_of(study, depth_lr_mult=0.0, depth_by=by)
    for name, parameter in training.model.named_parameters():
        assert parameter.requires_grad == name.startswith("classifier."), name
    before = state(training)
    assert len(list(fit(training))) == 2
    for name, tensor in training.model.state_dict().items():
        # Running statistics and their counters are in the state too.
        if not name.startswith("classifier."):
            assert torch.equal(tensor, before[name]), name
    changed = {name for name, tensor in training.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in training.model.named_parameters() if name.startswith("classifier.")}


def test_frozen_depths_are_in_evaluation_mode_while_the_head_trains(study: Study) -> None:
    training = training_of(study, depth_lr_mult=0.0)
    set_training(training.model)
    norms = [module for module in training.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert training.model.classifier.training


def test_with_a_multiplier_above_zero_everything_trains(study: Study) -> None:
    training = training_of(study, depth_lr_mult=0.5)
    before = state(training)
    next(fit(training))
    still = {name for name, parameter in training.model.named_parameters() if torch.equal(parameter, before[name])}
    assert not still
    means = {name for name in before if name.endswith("running_mean")}
    assert all(not torch.equal(training.model.state_dict()[name], before[name]) for name in means)


def test_what_was_frozen_thaws_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for mult, trains in ((0.0, False), (1.0, True)):
        freeze(model, parameter_groups(model, ["0.", "1."], rates(depth_lr_mult=mult)))
        assert model[0].weight.requires_grad == trains
        assert model[1].weight.requires_grad


# --- models of other families ---


@dataclass(frozen=True, kw_only=True)
class OtherNet(Backbone):
    """A small model of one of torchvision's families, as a user's backbone may build it."""

    family: str = "vit"

    def check(self, image_size: int) -> None:
        """Takes all."""

    def build(self, classes: int, image_size: int) -> nn.Module:
        if self.family == "vit":
            return VisionTransformer(
                image_size, image_size // 4, 2, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=classes
            )
        if self.family == "convnext":
            return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], 0.5, num_classes=classes)
        block = SwinTransformerBlockV2 if self.family == "swin_v2" else SwinTransformerBlock
        return SwinTransformer([4, 4], 8, [2], [2], [4, 4], stochastic_depth_prob=0.5, num_classes=classes, block=block)

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        layers = [f"encoder.layers.encoder_layer_{number}" for number in range(2)]
        return {
            "vit": ["class_token", "conv_proj.", "encoder.", "encoder.pos_embedding", *layers, "heads."],
            "convnext": ["features.0.", "features.1.", "features.2.", "features.3.", "classifier."],
            "swin": ["features.0.", "features.1.", "norm.", "head."],
            "swin_v2": ["features.", "norm", "head."],
        }[self.family]

    def fingerprint(self) -> str:
        return "none"


SPARED_OF_OTHERS = {
    "vit": {"class_token", "encoder.pos_embedding"},
    "convnext": {"features.1.0.layer_scale", "features.3.0.layer_scale"},
    "swin": {f"features.1.{block}.attn.relative_position_bias_table" for block in range(2)},
    "swin_v2": {f"features.1.{block}.attn.logit_scale" for block in range(2)},
}


@pytest.mark.parametrize("family", SPARED_OF_OTHERS)
def test_tokens_scales_and_positions_of_other_families_do_not_decay(family: str) -> None:
    backbone = OtherNet(family=family)
    model = backbone.build(5, 32)
    groups = parameter_groups(model, backbone.depths("block"), rates(weight_decay=0.07))
    decay = {name: group.weight_decay for group in groups for name in group.names}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert SPARED_OF_OTHERS[family] <= set(decay)
    assert {name for name, rate in decay.items() if rate == 0} == vectors | SPARED_OF_OTHERS[family]


class Odd(nn.Module):
    """Parameters that a shape or a name alone would misjudge."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 1, bias=False)
        self.positions = nn.Embedding(4, 8)
        self.norm = nn.LayerNorm((4, 8))
        self.attend = nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=4, vdim=4)
        self.kernel = nn.Parameter(torch.ones(8, 8))
        self.pos_embed = nn.Parameter(torch.ones(4, 8))
        self.mask_token = nn.Parameter(torch.ones(1, 8))
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False))


def test_a_weight_decays_whatever_its_shape_and_a_table_does_not_whatever_its_shape() -> None:
    model = Odd()
    decaying = {name for name, each in model.named_parameters() if _decays(model, name, each)}
    attention = {f"attend.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")}
    assert decaying == {"gate.weight", "kernel", "normed.parametrizations.weight.original1", *attention}


@pytest.mark.parametrize("family", SPARED_OF_OTHERS)
@pytest.mark.parametrize("mult", [0.0, 0.5])
def test_other_families_train_and_a_frozen_part_stays_bit_for_bit(study: Study, family: str, mult: float) -> None:
    config = dataclasses.replace(study.train, backbone=OtherNet(family=family), batch_size=32, epochs=2)
    config = dataclasses.replace(config, optim=rates(depth_lr_mult=mult))
    training = assemble(config, CPU, seed=0)
    before = state(training)
    head = OtherNet(family=family).depths("block")[-1]
    for _ in fit(training):
        # Between two epochs the model is in evaluation mode, so this is what an epoch begins with.
        set_training(training.model)
        dropping = [each for each in training.model.modules() if isinstance(each, nn.Dropout | StochasticDepth)]
        assert any(each.training for each in dropping) == (mult > 0 and bool(dropping))
    changed = {name for name, tensor in training.model.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in training.model.named_parameters()}
    assert changed == ({name for name in parameters if name.startswith(head)} if mult == 0 else parameters)


def test_of_two_prefixes_the_longer_one_counts() -> None:
    backbone = OtherNet(family="vit")
    groups = parameter_groups(backbone.build(5, 32), backbone.depths("block"), rates())
    of = {name: group.depth for group in groups for name in group.names}
    assert of["encoder.pos_embedding"] == "encoder.pos_embedding"
    assert of["encoder.ln.weight"] == "encoder"
    assert of["encoder.layers.encoder_layer_1.mlp.0.weight"] == "encoder.layers.encoder_layer_1"


def test_a_depth_that_is_a_parameter_is_nothing_to_compile() -> None:
    compile_parts(OtherNet().build(5, 32), ["class_token", "encoder.pos_embedding"])


# --- the optimizer ---


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_both_train(name: Any, kind: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    config = rates(name=name, base_lr=0.02, weight_decay=0.0)
    groups = parameter_groups(model, ["0.", "2."], config)
    optimizer = build_optimizer(model, groups, config)
    assert type(optimizer) is kind
    inputs = torch.randn(32, 8)
    losses = []
    for _ in range(100):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_optimizer_holds_every_training_group_and_no_frozen_one() -> None:
    model, depths = built("TinyMaxViT"), BACKBONES["TinyMaxViT"].depths("block")
    for mult in (0.0, 0.3):
        config = rates(depth_lr_mult=mult, weight_decay=0.05)
        groups = parameter_groups(model, depths, config)
        held = build_optimizer(model, groups, config).param_groups
        wanted = [(group.lr, group.weight_decay, len(group.names)) for group in groups if not group.frozen]
        assert [(each["lr"], each["weight_decay"], len(each["params"])) for each in held] == wanted


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0])
def test_set_lr_scales_every_group_from_its_own_peak(factor: float) -> None:
    model, config = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), rates(base_lr=0.1, depth_lr_mult=0.5)
    optimizer = build_optimizer(model, parameter_groups(model, ["0.", "1."], config), config)
    for _ in range(2):  # it does not accumulate
        set_lr(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [rate * factor for rate in (0.1, 0.1, 0.05, 0.05)]


# --- the schedule ---


@given(steps=st.integers(1, 300), warmup=st.floats(0, 400), schedule=st.sampled_from(["cosine", "constant"]))
@settings(deadline=None, max_examples=100)
def test_the_factor_lies_above_zero_and_never_above_one(steps: int, warmup: float, schedule: str) -> None:
    factors = [lr_factor(step, steps, warmup, schedule) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


@given(steps=st.integers(2, 300), warmup=st.floats(0, 400))
@settings(deadline=None, max_examples=100)
def test_it_rises_in_the_warmup_and_falls_afterwards(steps: int, warmup: float) -> None:
    factors = [lr_factor(step, steps, warmup, "cosine") for step in range(steps)]
    for step in range(1, steps):
        if step < warmup:
            assert factors[step] > factors[step - 1]
        elif step - 1 >= warmup:
            assert factors[step] < factors[step - 1]


def test_the_cosine_starts_at_its_peak_and_ends_small() -> None:
    assert lr_factor(0, 100, 0, "cosine") == 1
    assert lr_factor(50, 100, 0, "cosine") == pytest.approx(0.5)
    assert 0 < lr_factor(99, 100, 0, "cosine") < 0.001


def test_a_constant_schedule_stays_at_its_peak_after_the_warmup() -> None:
    assert [lr_factor(step, 6, 2, "constant") for step in range(6)] == [1 / 3, 2 / 3, 1, 1, 1, 1]
