"""Parameter groups by depth, the optimizer over them, the schedule, and the average of the weights.

The rate of a block is base_lr * depth_lr_mult ** distance, the distance counted from the head: layer-wise learning
rate decay (Howard and Ruder, 2018, "discriminative fine-tuning"; Clark et al., 2020), by block or by layer.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.base.errors import InputError
from harness.config.contracts import Backbone, name_of, prefixes
from harness.config.study import Study
from harness.config.train import OptimConfig

# Parameters of these layers do not decay, nor do parameters of other modules with such names.
SPARED_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
SPARED_NAMES = re.compile("bias|pos|token|embed|scale|gamma|table")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """The parameters of one depth that share a learning rate and a weight decay; a rate of 0 means frozen."""

    depth: str  # its first prefix, without the dot
    distance: int  # from the head
    lr: float
    weight_decay: float
    names: tuple[str, ...]
    count: int  # numbers in these parameters

    @property
    def frozen(self) -> bool:
        return self.lr == 0


def parameter_groups(
    model: nn.Module, depths: Sequence[str | tuple[str, ...]], config: OptimConfig, spared: Collection[str] = ()
) -> list[ParameterGroup]:
    """Partition the model's parameters, head first: every parameter in exactly one group.

    The longest matching prefix counts. `spared` parameters do not decay. Raises InputError if a depth matches
    nothing or a parameter has no depth: a bug in the backbone's class.
    """
    found: dict[tuple[Any, bool], list[str]] = {(depth, decays): [] for depth in depths for decays in (True, False)}
    known = {prefix: depth for depth in depths for prefix in prefixes(depth)}
    for name, parameter in model.named_parameters():
        prefix = max(filter(name.startswith, known), key=len, default=None)
        if prefix is None:
            raise InputError(f"The parameter {name} matches none of the depths {list(depths)}; add its prefix to them.")
        found[known[prefix], name not in spared and _decays(model, name, parameter)].append(name)
    for depth in reversed(depths):
        if not (found[depth, True] or found[depth, False]):
            raise InputError(f"The depth {depth} matches no parameter; remove it from the backbone's depths.")
    return [
        ParameterGroup(
            depth=name_of(depth),
            distance=distance,
            lr=config.base_lr * config.depth_lr_mult**distance * (len(depths) - distance > config.frozen_depths),
            weight_decay=config.weight_decay if decays else 0.0,
            names=tuple(names),
            count=sum(model.get_parameter(name).numel() for name in names),
        )
        for distance, depth in enumerate(reversed(depths))
        for decays in (True, False)
        if (names := found[depth, decays])
    ]


def _decays(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Return True for layer weights, False for biases, norms, embeddings, scales, tokens and positions.

    A parameter outside torch's layers is a weight by its shape, unless its name says otherwise.
    """
    owner, _, own = name.rpartition(".")
    if parameter.ndim < 2 or isinstance(model.get_submodule(owner), SPARED_LAYERS):
        return False
    if own == "weight" or own.endswith("_weight"):
        return True
    return min(parameter.shape) > 1 and SPARED_NAMES.search(own) is None


def freeze(model: nn.Module, groups: Sequence[ParameterGroup], head_only: bool = False) -> None:
    """Turn off the gradient of frozen parameters, and with `head_only` of all but the head's."""
    for group in groups:
        for name in group.names:
            model.get_parameter(name).requires_grad_(not group.frozen and not (head_only and group.distance > 0))


def set_training(model: nn.Module, learner: nn.Module | None = None) -> None:
    """Set training mode, except for frozen modules: BatchNorm and stochastic depth stay in evaluation mode.

    `learner` is the part of the model that trains; None: all of it.
    """
    (learner or model).train()
    _rest(model)


def _rest(module: nn.Module) -> None:
    """Set a frozen module, or its frozen parts, to evaluation mode."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if any(trains):
        for part in module.children():
            _rest(part)
    elif trains and module.training:
        module.eval()


def build_optimizer(model: nn.Module, groups: Sequence[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the groups that train; each keeps its rate as "peak_lr" for the schedule."""
    training = [
        {
            "params": [model.get_parameter(name) for name in group.names],
            "lr": group.lr,
            "peak_lr": group.lr,
            "weight_decay": group.weight_decay,
            "distance": group.distance,
        }
        for group in groups
        if not group.frozen
    ]
    kind = next(each for name, each in vars(torch.optim).items() if name.lower() == config.name)
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if "momentum" in known:
        options["momentum"] = config.momentum
    elif "betas" in known:
        options["betas"] = (config.momentum, known["betas"].default[1])
    if "decoupled_weight_decay" in known and config.name != "adam":
        options["decoupled_weight_decay"] = True
    device = next(model.parameters()).device.type
    if "fused" in known:
        options["fused"] = device in ("cpu", "cuda")
    elif config.name == "asgd":  # otherwise it reads its step from the device for every parameter
        options["capturable"] = device == "cuda"
    return kind(training, lr=config.base_lr, **options)


def lr_factor(step: int, steps: int, warmup_steps: float, schedule: str, floor: float = 0.0) -> float:
    """Return the factor of all peak rates at `step` (from 0 to steps - 1): linear warm-up, then half a cosine.

    SGDR without restarts (Loshchilov and Hutter, 2017). The last step is small but not zero.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, factor: float, body: float = 1.0) -> None:
    """Set the rates to `factor` times their peaks, and those of all groups but the head's to `body` times that."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor * (body if group["distance"] else 1.0)


class Average:
    """Moving average of a model's weights (Polyak and Juditsky, 1992), and of its statistics, e.g. of BatchNorm.

    The decay of a step is exp(-1 / (share * steps)), but less in the first ones: (1 + step) / (10 + step), as
    TensorFlow has it. `share` is that of all `steps` over which a weight's influence falls to 1 / e.
    """

    def __init__(self, model: nn.Module, learner: nn.Module, groups: Sequence[ParameterGroup]) -> None:
        names = [name for group in groups if not group.frozen for name in group.names]
        buffers = {name: each for name, each in learner.named_buffers() if each.is_floating_point()}
        buffers = {name: each for name, each in buffers.items() if each.isfinite().all()}  # not masks of -inf
        self._current = {**{name: model.get_parameter(name).detach() for name in names}, **buffers}
        self.tensors = {name: each.clone() for name, each in self._current.items()}

    def update(self, step: int, steps: int, share: float) -> None:
        """Include the weights after `step` (from 0) of all `steps`."""
        decay = min(math.exp(-1 / (share * steps)), (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._current.values()), 1 - decay)

    def swap(self) -> None:
        """Exchange the model's weights and the average."""
        for name, current in self._current.items():
            kept = current.clone()
            current.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)


def group_table(groups: Sequence[ParameterGroup]) -> str:
    """Format the groups: one line each, the head first."""
    width = max(len(group.depth) for group in groups)
    lines = [f"{'depth':<{width}}  distance  learning rate  weight decay  tensors  parameters"]
    for group in groups:
        rate = "frozen" if group.frozen else f"{group.lr:.3e}"
        lines.append(
            f"{group.depth:<{width}}  {group.distance:>8}  {rate:>13}  {group.weight_decay:>12g}  "
            f"{len(group.names):>7}  {group.count:>10,}"
        )
    return "\n".join(lines) + "\n"


def groups_of(study: Study) -> str:
    """Return the table of the base configuration's parameter groups, without loading weights."""
    config: Any = study.train
    backbone = without_weights(config.backbone)
    try:
        classes = len(config.data.classes())
    except InputError:
        classes = 102  # the data are missing; only the last layer's count depends on them
    model = backbone.build(classes, config.data.image_size)
    return group_table(groups_for(model, backbone, config.optim))


def without_weights(backbone: Any) -> Any:
    """Return a backbone that builds the same model without pretrained weights, if it has such a field."""
    if "pretrained" in getattr(backbone, "__dataclass_fields__", {}) and backbone.pretrained is True:
        return dataclasses.replace(backbone, pretrained=False)
    return backbone


def groups_for(model: nn.Module, backbone: Backbone, config: OptimConfig) -> list[ParameterGroup]:
    """Return the parameter groups of a backbone's model."""
    return parameter_groups(model, backbone.depths(config.depth_by), config, backbone.no_decay())
