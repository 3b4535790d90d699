"""A model of your own, from a function that builds it."""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal, Self

from harness.base.errors import InputError, first_line
from harness.config.contracts import Preprocessing
from harness.config.space import is_plain, shortened
from harness.config.train import require
from harness.models import pretrained
from harness.models.backbone import PretrainedBackbone, last_linear

if TYPE_CHECKING:
    from torch import nn

    from harness.models.depths import Depths


IMAGENET = Preprocessing()
READS = ("LOAD_GLOBAL", "LOAD_NAME")  # instructions that read a global


class Function(str):
    """The name of a function that builds a model, with a digest of its source, by which definitions compare it."""

    build: Callable[[], nn.Module]

    def __new__(cls, build: Callable[[], nn.Module]) -> Self:
        if not (inspect.isfunction(build) or inspect.isclass(build)):
            what = shortened(build)
            raise InputError(f"build must be a function without arguments, or a class, not {what}; write one.")
        # Variables of an enclosing function and default arguments are as much of it as its source.
        cells = [cell.cell_contents for cell in getattr(build, "__closure__", None) or ()]
        defaults = [getattr(build, "__defaults__", None) or (), getattr(build, "__kwdefaults__", None) or {}]
        cells += [each for each in defaults if each]
        if not is_plain(cells):
            raise InputError(
                f"{build.__qualname__} uses objects of an enclosing function, or as a default; define it at the top "
                "level, without arguments."
            )
        source = "\n".join([*_sources(build, set()), repr(cells) if cells else ""])
        name = super().__new__(cls, f"{build.__qualname__}-{_digest(source)}")
        name.build = build  # type: ignore[assignment]
        return name

    def __getnewargs__(self) -> tuple[Any]:
        return (self.build,)

    def model(self) -> nn.Module:
        """Build the model. Raises InputError if it is none."""
        from torch import nn

        model = self.build()
        if not isinstance(model, nn.Module):
            raise InputError(f"{self.plain} returned {type(model).__name__}; return a torch.nn.Module.")
        return model

    @property
    def plain(self) -> str:
        """The name without the digest."""
        return self.rpartition("-")[0]


def code_of(backbone: Any) -> str:
    """Return what stands for a backbone's code beyond torch's and torchvision's versions."""
    if isinstance(backbone, OwnModule):
        return str(backbone.function)
    code, kind = "", type(backbone)
    if any(each.__module__ == "harness.models.timm" for each in kind.__mro__):
        code = metadata.version("timm")
    if not kind.__module__.startswith("harness."):
        with suppress(InputError):  # of what was typed in, there is no source
            code += _digest("\n".join(_sources(kind, set())))
    return code


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def _sources(of: Any, known: set[Any]) -> Iterator[str]:
    """Yield the source of a function or class, and of those of its module that it uses."""
    made = bool(known) and inspect.isclass(of)
    known.add(of)
    try:
        yield inspect.getsource(of)
    except OSError as error:
        if not made:
            raise InputError(f"The source of {of.__qualname__} cannot be read; define it in a file.") from error
        yield of.__qualname__  # of a function such as namedtuple, with the constants below
    around = vars(sys.modules[of.__module__])
    functions = list(filter(inspect.isfunction, (*map(_plain, vars(of).values()), of)))
    codes = [code for each in functions for code in _codes(each.__code__)]
    names = [name for code in codes for name in code.co_names]
    reads = (each.argval for code in codes for each in dis.get_instructions(code) if each.opname in READS)
    yield from _constants({name: around[name] for name in sorted(around.keys() & set(reads))})
    yield from _constants(vars(of) if inspect.isclass(of) else {})
    for each in functions:
        yield from _constants({"defaults": each.__defaults__ or None, "keywords": each.__kwdefaults__ or None})
    bases = of.__bases__ if inspect.isclass(of) else ()
    for used in (*bases, *(around.get(name) for name in names)):
        mine = (inspect.isfunction(used) or inspect.isclass(used)) and used.__module__ == of.__module__
        if mine and used not in known:
            yield from _sources(used, known)


def _constants(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the numbers and texts among values; not what Python sets, such as the path of the file."""
    for name, value in values.items():
        if value is not None and not name.startswith("__") and is_plain(value):
            yield f"{name} = {value!r}"


def _plain(member: Any) -> Any:
    """Return the function of a static method, a class method or a property; anything else unchanged."""
    return getattr(member, "__func__", None) or (member.fget if isinstance(member, property) else member)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of its comprehensions and lambdas."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


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
    """What `Module` returns.

    Its source, and what it uses of its file, are part of the definition: after a change, resuming is refused.
    """

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
        import torch

        from harness.models.depths import check_size

        try:
            with torch.random.fork_rng(devices=[]):
                model = self.function.model()
        except InputError:
            raise
        except Exception as error:  # it is the user's code
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(
                f"{self.function.plain}() failed ({why}); it must build a model without arguments."
            ) from error
        if set(map(id, model.parameters())) & set(map(id, _skeleton(self.function).parameters())):
            raise InputError(
                f"{self.function.plain}() returns the same model each time, so that trials would share its weights; "
                "make a new one in it."
            )
        _check_parameters(self.function)
        check_size(self.function.plain, lambda: model, image_size)  # its forward need not work without memory
        depths, empty = self.depths("block"), _skeleton(self.function)
        names, head = [name for name, _ in empty.named_parameters()], last_linear(empty)
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

    def origin(self) -> str:
        return super().origin() if self.pretrained and self.weights else f"{self.published()} ({self.licence()})"

    def published(self) -> str:
        return str(self.function)

    def licence(self) -> str:
        return "as its function builds it"


def _check_parameters(function: Function) -> None:
    """Raise InputError for parameters that the harness cannot train as they are."""
    import torch
    from torch.nn.parameter import is_lazy

    for name, each in _skeleton(function).named_parameters():
        what = f"{function.plain}: {name}"
        if is_lazy(each):
            raise InputError(f"{what} is of a lazy layer; give the layer its size.")
        if each.dtype != torch.float32:
            raise InputError(f"{what} is {str(each.dtype).removeprefix('torch.')}; return a model in float32.")
        if not each.requires_grad:
            raise InputError(
                f"{what} is frozen, but the harness would train it; leave it trainable, and freeze the backbone with "
                "optim.depth_lr_mult=0."
            )


@lru_cache
def _skeleton(function: Function) -> nn.Module:
    from harness.models.depths import skeleton

    return skeleton(function.model)


@lru_cache
def _depths(function: Function, by: Literal["block", "layer"]) -> Depths:
    from harness.models.depths import depths_of

    model = _skeleton(function)
    return depths_of(model, last_linear(model), by)
