"""Paths into a configuration, and the search space over them.

A configuration is a frozen dataclass of frozen dataclasses. A path such as `optim.base_lr` names one leaf field.
`replace` is the only way to change a field: the sampler, `--set` and the tests all use its checks.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from harness.base.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

ConfigT = TypeVar("ConfigT")

LARGEST = 2**63 - 1  # integer in a configuration; databases cannot store larger ones
MOST_TRIALS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Float:
    """A real number in [low, high]; `log` searches its logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self)
        if self.log and self.low <= 0:
            raise InputError(f"{self} is logarithmic and needs low > 0; write the smallest value you want to try.")

    def contains(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Int:
    """An integer in [low, high], both included."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self)
        if self.log and self.low < 1:
            raise InputError(f"{self} is logarithmic and needs low >= 1; write the smallest value you want to try.")

    def contains(self, value: Any) -> bool:
        return type(value) in (int, float) and self.low <= value <= self.high and value == int(value)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values: numbers, strings, tuples, or configurations such as `Timm("resnet18")`, as `label`s."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.options, tuple | list):
            raise InputError(f"Choice takes its values as one tuple, such as Choice((64, 128)), not {self.options!r}.")
        if len(self.options) == 0:
            raise InputError("Choice(()) is empty; list at least one value.")
        for option in self.options:
            if not is_config(option) and (not is_plain(option) or isinstance(option, list | dict)):
                raise InputError(f"Choice cannot hold {option!r}; use numbers, strings, None, or tuples of them.")
        if len({tuple(paths(each)) if is_config(each) else () for each in self.options}) > 1:
            raise InputError(f"The options of Choice{self.labels} have different fields; give options of one kind.")
        if len(set(self.labels)) != len(self.options):
            raise InputError(f"Choice{self.labels} has the same value twice; list each value once.")

    def __repr__(self) -> str:  # which definitions compare
        if any(map(is_config, self.options)):
            return f"Choice(options=({', '.join(self.labels)}))"
        return f"Choice(options={self.options!r})"

    def contains(self, value: Any) -> bool:
        return value in self.options

    @property
    def labels(self) -> tuple[Any, ...]:
        return tuple(label(option) for option in self.options)

    def option(self, chosen: Any) -> Any:
        """Return the value of a label from the storage."""
        return self.options[self.labels.index(chosen)]


Dimension = Float | Int | Choice
# Bounds of an Int: the storage keeps floats, which are exact for integers up to there. Bounds of a Float: so that
# their difference is finite.
FARTHEST: dict[type, float] = {Int: 2**53, Float: 1e300}
Space = Mapping[str, Dimension]


def _check_range(dimension: Float | Int) -> None:
    for name in ("low", "high"):
        if isinstance(end := getattr(dimension, name), float):
            object.__setattr__(dimension, name, float(end))  # numpy's have another repr, which is stored and compared
    low, high = dimension.low, dimension.high
    kind, wanted = (int, "whole numbers") if isinstance(dimension, Int) else (int | float, "numbers")
    if any(not isinstance(end, kind) or isinstance(end, bool) for end in (low, high)):
        raise InputError(f"{dimension} needs {wanted} as bounds.")
    if not low < high:
        raise InputError(f"{dimension} is an empty range; low must be less than high.")
    if not -FARTHEST[type(dimension)] <= low < high <= FARTHEST[type(dimension)]:
        raise InputError(f"{shortened(dimension)} is too wide or unbounded; use bounds nearer to 0.")


def label(value: Any) -> Any:
    """Format a value for Optuna and MLflow: a tuple as 1024-512, a configuration as its repr without defaults."""
    if is_config(value):
        fields = [each for each in dataclasses.fields(value) if getattr(value, each.name) != each.default]
        first = [repr(getattr(value, each.name)) for each in fields if not each.kw_only]
        given = [*first, *(f"{each.name}={getattr(value, each.name)!r}" for each in fields if each.kw_only)]
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, tuple):
        return "-".join(str(item) for item in value) if value else "none"
    return value


def shortened(value: Any) -> str:
    """Return a value's repr, truncated if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a number with more digits than Python writes
        text = "a number with thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_plain(value: Any) -> bool:
    """Return whether a value's repr is stable: a number, string, None, or a tuple, list or dict of them; not of
    subclasses of these, such as numpy's numbers, whose repr changes with its version."""
    if type(value) in (tuple, list):
        return all(is_plain(each) for each in value)
    if type(value) is dict:
        return all(is_plain(each) for pair in value.items() for each in pair)
    return value is None or type(value) in (bool, int, float, str)


def leaves(config: Any, prefix: str = "", identity_only: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a configuration as (path, value), in the order of the definition.

    A field that holds a dataclass yields its leaves, and its class as a leaf of its own, `data.type` for example.
    `identity_only` skips the fields that say where something lies or runs, not what is computed.
    """
    for field in dataclasses.fields(config):
        if identity_only and not field.metadata.get("identity", True):
            continue
        path, value = prefix + field.name, getattr(config, field.name)
        if is_config(value):
            yield f"{path}.type", type(value).__name__
            yield from leaves(value, f"{path}.", identity_only)
        else:
            yield path, value


def paths(config: Any) -> list[str]:
    """The paths that `replace` accepts."""
    return [path for path, _ in leaves(config) if not path.endswith(".type")]


def holders(config: Any) -> list[str]:
    """The paths of configurations inside `config`, which a Choice may replace as a whole."""
    return [path.removesuffix(".type") for path, _ in leaves(config) if path.endswith(".type")]


def get(config: Any, path: str) -> Any:
    """The value at a path. Raises InputError listing the valid paths if there is none."""
    if path not in holders(config):
        _check_path(config, path)
    for name in path.split("."):
        config = getattr(config, name)
    return config


def replace(config: ConfigT, path: str, value: Any) -> ConfigT:
    """Return a copy of `config` with `path` set to `value`, checked against the field's type and range.

    Raises InputError if the path does not exist (listing the valid ones) or the value is invalid.
    """
    if not is_config(value):
        _check_path(config, path)
    return _replace(config, path.split("."), value, path)


def _replace(config: Any, names: list[str], value: Any, path: str) -> Any:
    name, rest = names[0], names[1:]
    if rest:
        return dataclasses.replace(config, **{name: _replace(getattr(config, name), rest, value, path)})
    if not is_config(getattr(config, name)):
        value = _checked(type(config), name, value, path)
    return dataclasses.replace(config, **{name: value})


def _checked(owner: type, name: str, value: Any, path: str) -> Any:
    from pydantic import PydanticUserError, ValidationError

    try:
        hint, adapter = _adapter(owner, name)
        checked = adapter.validate_python(value)
    except PydanticUserError as error:
        raise InputError(f"{path} cannot be set here; change it in the study file.") from error
    except ValidationError as error:
        raise InputError(f"{path} must be {in_words(hint)}, not {shortened(value)}.") from error
    for each in checked if isinstance(checked, tuple) else (checked,):
        if isinstance(each, int) and abs(each) > LARGEST:
            raise InputError(f"{path} must lie between {-LARGEST:,} and {LARGEST:,}, not {shortened(each)}.")
    return checked


@functools.cache
def _adapter(owner: type, name: str) -> tuple[Any, TypeAdapter[Any]]:
    """Return a field's type and its validator."""
    from pydantic import ConfigDict, TypeAdapter  # takes 0.1 s, which --help avoids

    # This hint alone: others of the class may name types that only the type checker imports.
    owner = next(each for each in owner.__mro__ if name in vars(each).get("__annotations__", {}))
    alone = {"__annotations__": {name: owner.__annotations__[name]}, "__module__": owner.__module__}
    hint = typing.get_type_hints(type(owner.__name__, (), alone))[name]
    return hint, TypeAdapter(hint, config=ConfigDict(strict=True))


def check_types(config: Any, prefix: str = "") -> None:
    """Raise InputError unless each field matches its type; nested configurations check their own."""
    for field in dataclasses.fields(config):
        if PLAIN.fullmatch(str(field.type)):
            _checked(type(config), field.name, getattr(config, field.name), prefix + field.name)


# Annotations of plain fields; aliases such as SplitName do not match.
PLAIN = re.compile(r"(bool|int|float|str|None|Literal|tuple|[\[\]\s,|.]|\"[^\"]*\"|'[^']*')+")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def in_words(hint: Any) -> str:
    """Describe in words what a field accepts."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return " or ".join(str(each) for each in inner)
    if kind is tuple:
        several = WORDS.get(inner[0], str(inner[0])).removeprefix("a ") + "s"
        examples = {int: "512, 256", str: "'daisy', 'rose'"}.get(inner[0], "0.5, " * (len(inner) - 1) + "1.0")
        return f"a tuple of {several if inner[-1] is Ellipsis else f'{len(inner)} {several}'} such as ({examples})"
    if kind in (types.UnionType, typing.Union):
        return " or ".join(in_words(each) for each in inner)
    return WORDS.get(hint) or str(getattr(hint, "__name__", hint))


def parse(config: Any, path: str, text: str) -> Any:
    """Parse the value of `--set PATH=TEXT`: a JSON or Python literal, otherwise the text itself.

    A single value for a tuple field becomes a tuple of one, so that `backbone.hidden=512` works.
    """
    _check_path(config, path)
    value, current = _literal(text), get(config, path)
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(current, tuple) and not isinstance(value, tuple):
        value = (value,)
    return value


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # JSON, or a Python literal such as 1024,512 or None
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # {[]: 1}
            return read(text)
    return text


def _check_path(config: Any, path: str) -> None:
    if path not in (known := paths(config)):
        raise unknown_field(path, known)


def unknown_field(path: str, known: list[str]) -> InputError:
    close = difflib.get_close_matches(path, known, n=1)
    hint = f"did you mean {close[0]}? The" if close else "the"
    return InputError(f"There is no field {path!r} in the configuration; {hint} fields are {', '.join(known)}.")


def check(space: Space, base: Any) -> None:
    """Raise InputError unless every path of the space exists in `base`, the base's own value lies in its range, and the
    bounds of the ranges are valid in the base, alone and in pairs.
    """
    if not isinstance(space, Mapping) or not all(isinstance(path, str) for path in space):
        raise InputError(f"A study's space maps fields to ranges, such as {{'epochs': Int(2, 8)}}, not {space!r}.")
    for path, dimension in space.items():
        if not isinstance(dimension, Float | Int | Choice):
            raise InputError(f"The space of {path} must be Float(...), Int(...) or Choice((...)), not {dimension!r}.")
        value = get(base, path)
        if is_config(value) and any("identity" in each.metadata for each in dataclasses.fields(value)):
            raise InputError(f"{path} says where something lies and cannot be searched as a whole; search its fields.")
        if not dimension.contains(value):
            raise InputError(
                f"The base configuration has {path} = {value!r}, outside of its search range {dimension}; "
                "trial 0 is the base configuration, so widen the range or change the base."
            )
    ends = {path: [replace(base, path, bound) for bound in extremes(dimension)] for path, dimension in space.items()}
    for path, other in itertools.combinations(space, 2):
        for config, bound in itertools.product(ends[path], extremes(space[other])):
            try:
                replace(config, other, bound)
            except InputError as error:
                both = f"{path} = {get(config, path)!r} with {other} = {bound!r}"
                raise InputError(f"The study's space may combine {both}: {error}") from error


def extremes(dimension: Dimension) -> tuple[Any, ...]:
    """Return all options, or both bounds in the sampler's type."""
    if isinstance(dimension, Choice):
        return dimension.options
    kind = float if isinstance(dimension, Float) else int
    return kind(dimension.low), kind(dimension.high)


def encode(space: Space, config: Any) -> dict[str, Any]:
    """Return the configuration's values of the searched fields, as Optuna stores them."""
    found = {path: get(config, path) for path in space}
    for path, value in found.items():
        options = getattr(space[path], "options", ())
        found[path] = label(next((option for option in options if option == value), value))  # 1.0 may be written 1
    return found


def apply(space: Space, base: ConfigT, params: Mapping[str, Any]) -> ConfigT:
    """Apply stored parameters: return `base` with each searched field replaced, a configuration before its fields."""
    whole = holders(base)
    for path, dimension in sorted(space.items(), key=lambda item: item[0] not in whole):
        chosen = params[path]
        base = replace(base, path, dimension.option(chosen) if isinstance(dimension, Choice) else chosen)
    return base
