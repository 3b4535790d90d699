"""A model of your own, from a function that builds it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

from harness.base.errors import InputError
from harness.config.contracts import Preprocessing
from harness.config.space import is_plain
from harness.config.train import require
from harness.models import pretrained
from harness.models.backbone import PretrainedBackbone, last_linear

if TYPE_CHECKING:
    from torch import nn

    from harness.models.depths import Depths


IMAGENET = Preprocessing()


class Function(str):
    """The name of a function that builds a model, with a digest of its source, by which definitions compare it."""

    build: Callable[[], nn.Module]

    def __new__(cls, build: Callable[[], nn.Module]) -> Self:
        if not (inspect.isfunction(build) or inspect.isclass(build)):
            raise InputError(f"build must be a function or a class that returns a torch.nn.Module, not {build!r}.")
        try:
            source = inspect.getsource(build)
        except OSError as error:
            raise InputError(f"The source of {build.__qualname__} cannot be read; define it in a file.") from error
        # Variables of an enclosing function are as much of it as its source.
        cells = [cell.cell_contents for cell in getattr(build, "__closure__", None) or ()]
        if not is_plain(cells):
            raise InputError(f"{build.__qualname__} uses objects of an enclosing function; define it at the top level.")
        source += repr(cells) if cells else ""
        name = super().__new__(cls, f"{build.__qualname__}-{hashlib.sha256(source.encode()).hexdigest()[:8]}")
        name.build = build  # type: ignore[assignment]
        return name

    def __getnewargs__(self) -> tuple[Any]:
        return (self.build,)

    def model(self) -> nn.Module:
        """Build the model. Raises InputError if it is none."""
        from torch import nn

        model = self.build()
        if not isinstance(model, nn.Module):
            raise InputError(f"build {self} returned {type(model).__name__}; return a torch.nn.Module.")
        return model


def Module(
    build: Callable[[], nn.Module],
    *,
    depths: Sequence[str | Sequence[str]] = (),
    preprocessing: Preprocessing = IMAGENET,
    **fields: Any,
) -> OwnModule:
    """Return a backbone of your own: Module(build=function), whose last linear layer is replaced by the head.

    `build()` returns a `torch.nn.Module` from images float32 [B, 3, S, S] to logits, whose weights may be pretrained.
    `depths` are prefixes of parameter names, one or several per depth, from the first to the last; the last is the
    module of the last linear layer; found by the modules' order if omitted. `fields` are those of every backbone:
    `weights` (a file), `hidden`, `dropout` and `bn_momentum`.
    """
    parts = tuple((each,) if isinstance(each, str) else tuple(each) for each in depths)
    return OwnModule(function=Function(build), parts=parts, images=preprocessing, **fields)


@dataclass(frozen=True, kw_only=True)
class OwnModule(PretrainedBackbone):
    """What `Module` returns. A changed source of the function is another definition: resuming is refused."""

    function: Function
    parts: tuple[tuple[str, ...], ...] = ()
    images: Preprocessing = IMAGENET

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stochastic_depth is not None:
            raise InputError("backbone.stochastic_depth cannot be set for a module of your own; set it in build().")
        if self.weights is not None and not pretrained.is_file(self.weights):
            raise InputError(f"backbone.weights must be a file of weights, not {self.weights!r}.")

    def check_size(self, image_size: int) -> None:
        from harness.models.depths import check_size

        check_size(self.function, self.function.model, image_size)
        depths, names, head = self.depths("block"), _parameters(self.function), _head(self.function)
        for name in names:
            fits = any(name.startswith(depth) for depth in depths)
            require(fits, f"depths of Module: the parameter {name} matches none of them; add its prefix.")
        for depth in depths:
            fits = any(name.startswith(depth) for name in names)
            require(fits, f"depths of Module: {depth} matches no parameter; remove it, or correct the prefix.")
        fits = head.startswith(tuple(each.rstrip(".") for each in depths[-1]))
        require(fits, f"depths of Module: the last one must be the module of the last linear layer, {head}.")

    def load(self, image_size: int) -> nn.Module:
        model = self.function.model()
        if self.pretrained and self.weights is not None:
            pretrained.load(model, pretrained.read(self.weights), last_linear(model), self.weights)
        return model

    def depths(self, by: Literal["block", "layer"]) -> Depths:
        return list(self.parts) or _depths(self.function, by)

    def preprocessing(self) -> Preprocessing:
        return self.images

    def published(self) -> str:
        return str(self.function)

    def licence(self) -> str:
        return "as its function builds it"


def _skeleton(function: Function) -> nn.Module:
    from harness.models.depths import skeleton

    return skeleton(function.model)


@lru_cache
def _head(function: Function) -> str:
    return last_linear(_skeleton(function))


@lru_cache
def _parameters(function: Function) -> list[str]:
    return [name for name, _ in _skeleton(function).named_parameters()]


@lru_cache
def _depths(function: Function, by: Literal["block", "layer"]) -> Depths:
    from harness.models.depths import depths_of

    model = _skeleton(function)
    return depths_of(model, last_linear(model), by)
