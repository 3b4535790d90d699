"""The structure of any model: its depths, from the first layers to the head, and the image sizes that it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal
from warnings import catch_warnings, filterwarnings

import torch
from torch import nn
from torchvision.ops.misc import ConvNormActivation

from harness.base.errors import InputError, first_line
from harness.models.backbone import last_linear, with_head

Depths = list[tuple[str, ...]]  # per depth, the prefixes of its parameters' names; the longest matching prefix counts

LARGE = 1000.0  # a logit that no softmax, sigmoid or hyperbolic tangent leaves as it is
SHARE = 0.9  # of the parameters: a part that holds more is only a container of the blocks
ALL = 0.99  # of the parameters: a part that holds more and the head only wraps the model
Unit = tuple[str, nn.Module | None]  # a prefix and its module; None for a parameter


def depths_of(model: nn.Module, head: str, by: Literal["block", "layer"]) -> Depths:
    """Return the depths of a model whose last linear layer is at `head`.

    Blocks are the parts of the innermost module that holds most of the parameters; layers are the repeated parts of
    these. Norms and parameters outside layers (a class token) belong to the depth before them, the first ones to the
    stem. The last depth is the top-level module that holds the head, inside what only wraps the model.
    """
    top = _top(model, head)
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(top))
    units = list(_blocks(model, "", SHARE * total, top))
    if by == "layer":
        units = [layer for block in units for layer in _layers(*block)]
    found: Depths = []
    stem = False  # whether a layer was found
    for prefix, module in units:
        begins = module is not None and any(parameter.ndim > 1 for parameter in module.parameters())
        if found and not (begins and stem):
            found[-1] += (prefix,)
        else:
            found.append((prefix,))
        stem |= begins
    names = [name for name, _ in model.named_parameters()]  # without a tied layer's own
    kept = [tuple(each for each in depth if any(name.startswith(each) for name in names)) for depth in found]
    return [*filter(None, kept), (top,)]


def _top(model: nn.Module, head: str) -> str:
    """Return the prefix of the outermost module that holds the head and not the whole model."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parts = head.split(".")
    prefixes = [".".join(parts[: place + 1]) + "." for place in range(len(parts))]
    most = ALL * sum(sizes.values())
    inside = (each for each in prefixes if sum(size for name, size in sizes.items() if name.startswith(each)) <= most)
    return next(inside, prefixes[-1])


def _blocks(module: nn.Module, prefix: str, most: float, top: str) -> Iterator[Unit]:
    yield from ((prefix + name, None) for name, _ in module.named_parameters(recurse=False))
    for name, part in module.named_children():
        if f"{prefix}{name}." == top:
            continue
        size = sum(parameter.numel() for parameter in part.parameters())
        if size > most and list(part.children()):
            yield from _blocks(part, f"{prefix}{name}.", most, top)
        elif size:
            yield f"{prefix}{name}.", part


def _layers(prefix: str, module: nn.Module | None) -> list[Unit]:
    """Return the repeated parts of a block, or the block if it has none."""
    inner, parts = prefix, list(module.named_children()) if module is not None else []
    own = [(prefix + name, None) for name, _ in module.named_parameters(recurse=False)] if module is not None else []
    if len(parts) == 1 and isinstance(parts[0][1], nn.ModuleList):
        inner, parts = f"{prefix}{parts[0][0]}.", list(parts[0][1].named_children())
    elif not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return [(prefix, module)]
    kinds = {type(part) for _, part in parts}
    if len(kinds) != 1 or issubclass(kinds.pop(), ConvNormActivation):
        return [(prefix, module)]
    return [*own, *((f"{inner}{name}.", part) for name, part in parts)]


def whole_modules(module: nn.Module, names: Collection[str], prefix: str = "") -> Iterator[str]:
    """Yield prefixes that cover these parameters and no others: modules where all of theirs are among them."""
    yield from (prefix + name for name, _ in module.named_parameters(recurse=False) if prefix + name in names)
    for name, part in module.named_children():
        inner = {f"{prefix}{name}.{each}" for each, _ in part.named_parameters()}
        if inner and inner <= set(names):
            yield f"{prefix}{name}."
        elif inner & set(names):
            yield from whole_modules(part, names, f"{prefix}{name}.")


# -- models without memory ---------------------------------------------------------------------------------------------


def skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without memory for its parameters, and without a draw from torch's global generator."""
    with torch.random.fork_rng(devices=[]), catch_warnings():
        filterwarnings("ignore", ".*copying from a non-meta parameter")  # own modules may load their weights
        try:
            with torch.device("meta"):
                return build()
        except (RuntimeError, TypeError):  # regnets and others compute their widths with tensors
            return build().to("meta")


def _check_head(name: str, model: nn.Module, last: str, image: torch.Tensor) -> None:
    """Raise InputError unless a new head in place of the layer `last` gives the logits."""
    with image.device, torch.random.fork_rng(devices=[]):
        model = with_head(model, (), 0.0, 2)
    head: Any = model.get_submodule(last_linear(model))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([LARGE, -LARGE]))
            logits = model(image)
    # A layer after it takes another width, or the forward uses the layer's own fields.
    except Exception as error:
        raise InputError(
            f"The forward of {name} fails with a new head in place of {last}, its last linear layer "
            f"({first_line(error)}); define the layer that gives the logits last, and do not use its weights."
        ) from error
    if logits.shape != (1, 2):
        raise InputError(
            f"{last}, the last linear layer of {name}, does not give the logits; define the layer that does last."
        )
    if not logits.is_meta and logits.abs().max() <= 1:
        raise InputError(f"{name} returns probabilities, such as a softmax's; return the logits.")


def check_size(name: str, build: Callable[[], nn.Module], image_size: int) -> None:
    """Pass an image through a model's skeleton, or through the model if that is what `build` returns.

    Raises InputError if the model refuses it, or has no head to replace.
    """
    try:
        model = skeleton(build).eval()
        device = next(model.parameters()).device
        last, image = last_linear(model, name), torch.zeros(1, 3, image_size, image_size, device=device)
        with torch.no_grad():
            logits = model(image)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            raise InputError(f"The forward of {name} returns {type(logits).__name__}; return logits [B, classes].")
        _check_head(name, model, last, image)
    except InputError:
        raise
    # Models refuse a size in many ways.
    except Exception as error:
        raise InputError(
            f"{name} does not take images of {image_size} x {image_size} pixels ({first_line(error)}); change "
            "data.image_size, or the model."
        ) from error
