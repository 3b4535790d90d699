"""The definition of a study: base configuration, search space, sampler and pruner."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import optuna
from optuna.trial import FrozenTrial

from harness.base.errors import InputError
from harness.config import space as spaces
from harness.config.contracts import Backbone, Preprocessing
from harness.config.train import FinalConfig, TrainConfig, identity, is_default, plain, require, require_count, survives

LIMITS = ("hours", "patience", "until")
OWN = ("seed", "objective")  # fields of a study itself that --set may change


class SamplerLike(Protocol):
    """Protocol of samplers. See `harness.search.samplers`."""

    @property
    def name(self) -> str: ...
    def check(self, study: Study) -> None:
        """Raise InputError if the sampler does not fit the study."""
        ...

    def build(self, study: Study, seed: int) -> optuna.samplers.BaseSampler: ...
    def ask(
        self, study: Study, of: optuna.Study, trial_id: int, number: int, history: list[FrozenTrial]
    ) -> dict[str, Any]:
        """Suggest a trial's parameters from `history`, and write them to the storage of `of`."""
        ...


class PrunerLike(Protocol):
    """Protocol of pruners. See `harness.search.pruners`."""

    @property
    def name(self) -> str: ...
    def of(self, study: Study) -> optuna.pruners.BasePruner:
        """Build a study's pruner. If it has a method `rung(epoch)`, it is called only where that is true."""
        ...


@dataclass(frozen=True, kw_only=True)
class Study:
    """A search: base configuration, search space, sampler and pruner. The base is trial 0."""

    name: str
    train: TrainConfig
    space: spaces.Space
    sampler: SamplerLike
    pruner: PrunerLike
    trials: int = 50
    # Limits of the search; a study goes on when they grow.
    hours: float | None = None  # of training, over all workers and restarts, the final run included
    patience: int | None = None  # finished trials without a new best
    until: float | None = None  # value of the objective, as a share
    seed: int = 0
    # On the validation images; decides pruning, the choice, and the champion.
    objective: Literal["accuracy", "balanced_accuracy", "macro_f1", "loss"] = "accuracy"
    final: FinalConfig = FinalConfig()
    first: Sequence[Mapping[str, Any]] = ()  # configurations to try after the base: values of searched fields
    after: str | None = None  # name of an earlier study, whose trials the sampler gets as history

    def __post_init__(self) -> None:
        spaces.check_types(self)
        fits = self.name.replace("_", "").replace("-", "").isalnum()
        require(fits, f"A study's name has letters, digits, - and _ only, not {self.name!r}.")
        require(isinstance(self.train, TrainConfig), f"train must be TrainConfig(...), not {self.train!r}.")
        require(isinstance(self.final, FinalConfig), f"final must be FinalConfig(...), not {self.final!r}.")
        fits = not self.final.flip or self.train.feature_views is None
        require(fits, "final.flip needs images, but feature_views trains on features; leave one of them out.")
        require(self.space != {}, "A study's space is empty; name at least one field to search.")
        require_count("trials", self.trials, spaces.MOST_TRIALS)
        require(
            self.hours is None or 0 < self.hours <= 1e6, f"hours must lie between 0 and 1,000,000, not {self.hours}."
        )
        if self.patience is not None:
            require_count("patience", self.patience, spaces.MOST_TRIALS)
        require(self.until is None or 0 < self.until <= 1, f"until is a share between 0 and 1, not {self.until}.")
        spaces.check(self.space, self.train)
        computed = {path for path, _ in spaces.leaves(self.train, identity_only=True)}
        for path in self.space:
            fits = path in computed.union(spaces.holders(self.train)) and not path.startswith("runtime.")
            require(fits, f"{path} is decided once per study and cannot be searched; remove it from the space.")
            require(path != "data.limit", "data.limit cannot be searched: trials would be measured on other images.")
        require(
            hasattr(self.sampler, "check"),
            f'sampler must be gp(), tpe(), grid() or Sampler("NAME"), not {self.sampler!r}.',
        )
        wanted = 'asha(), no_pruning() or Pruner("NAME")'
        require(hasattr(self.pruner, "of"), f"pruner must be {wanted}, not {self.pruner!r}.")
        self._check_first()
        fits = self.after is None or (self.after.strip() != "" and self.after != self.name)
        require(fits, f"after is the name of an earlier study, not {self.after!r}.")
        require(self.after is None or self.sampler.name != "grid", "A grid has its own order; remove after.")
        for path, value in self.definition().items():
            require(not isinstance(value, type), f"{path} is a class; write {getattr(value, '__name__', '')}(...).")
            require(
                survives(value),
                f"{path} is {spaces.shortened(value)}, which a study cannot store and compare on resume; use numbers, "
                "strings, true, false, null, or tuples of them.",
            )
        self.sampler.check(self)

    def limits(self) -> dict[str, Any]:
        """Return the limits of the search besides `trials`."""
        return {name: getattr(self, name) for name in LIMITS}

    def _check_first(self) -> None:
        fits = isinstance(self.first, tuple | list) and all(isinstance(each, Mapping) for each in self.first)
        require(fits, f"first lists configurations such as ({{'optim.base_lr': 3e-4}},), not {self.first!r}.")
        require(not self.first or self.sampler.name != "grid", "A grid has its own order; remove first.")
        known = [spaces.encode(self.space, self.train)]
        for number, each in enumerate(self.first, 1):
            try:
                params = self.params(each)
            except InputError as error:
                raise InputError(f"first, configuration {number}: {error}") from error
            require(params not in known, f"first, configuration {number}: it is the base or an earlier one; remove it.")
            known.append(params)

    def params(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the stored parameters of the base with some searched fields changed.

        Raises InputError if a field is not searched, or a value does not fit it or lies outside of its range.
        """
        config, params = self.train, spaces.encode(self.space, self.train)
        for path, value in changes.items():
            if path not in self.space:
                raise InputError(f"{path} is not searched; choose from {', '.join(self.space)}.")
            config = spaces.replace(config, path, value)
            if not self.space[path].contains(spaces.get(config, path)):
                raise InputError(f"{path} = {value!r} is outside of {self.space[path]}; choose a value within.")
            params |= spaces.encode({path: self.space[path]}, config)  # of a searched backbone only what was given
        self.config(params)  # raises
        return params

    def params_of(self, params: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return another study's stored parameters as this study's; its `definition` has what it did not search.

        None if one is missing, or outside of its dimension.
        """
        known = {**definition, **params}
        found: dict[str, Any] = {}
        for path, dimension in self.space.items():
            if path not in known:
                return None
            value = known[path]
            if isinstance(dimension, spaces.Choice):
                options = zip(dimension.labels, map(plain, dimension.options), strict=True)
                fitting = [stored for stored, option in options if value in (stored, option)]
            else:
                fitting = [value] if dimension.contains(value) else []
            if not fitting:
                return None
            found[path] = fitting[0]
        return found

    def given_params(self, number: int) -> dict[str, Any] | None:
        """Return the parameters of trial `number` if `first` has them; None if the sampler suggests them."""
        return self.params(self.first[number - 1]) if 0 < number <= len(self.first) else None

    def image_sizes(self) -> set[int]:
        """Return all image sizes that the model may get, but for those of training images before the tail."""
        return self._possible("data.image_size")

    def early_sizes(self) -> set[int]:
        """Return all sizes of training images before the tail (`augment.early_size`)."""
        return self._possible("augment.early_size") - {None}

    def check_frozen_depths(self) -> None:
        """Raise InputError if a trial may freeze as many depths as its model has."""
        most = max(self._possible("optim.frozen_depths"))
        for backbone, by in itertools.product(self.backbones() if most else (), self._possible("optim.depth_by")):
            known = len(backbone.depths(by))
            require(
                most < known,
                f"optim.frozen_depths is or may become {most}, and {spaces.label(backbone)} has {known} depths "
                f"with its head; choose at most {known - 1}.",
            )

    def _possible(self, path: str) -> set[Any]:
        """Return a field's value and the extremes of its dimension."""
        searched = self.space.get(path)
        return {spaces.get(self.train, path), *(spaces.extremes(searched) if searched is not None else ())}

    def backbones(self) -> Sequence[Backbone]:
        """Return all backbones that trials may have."""
        searched = self.space.get("backbone")
        return spaces.extremes(searched) if searched is not None else (self.train.backbone,)

    def preprocessings(self) -> list[Preprocessing]:
        return [each.preprocessing() for each in self.backbones()]

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The training configuration of stored parameters."""
        return spaces.apply(self.space, self.train, params)

    def branch(self, name: str, *settings: str) -> Study:
        """Return this study under another name, changed by "PATH=VALUE" settings, with its trials as history."""
        return dataclasses.replace(self.with_settings(settings), name=name, after=self.name)

    def with_settings(self, settings: Sequence[str]) -> Study:
        """Apply each "PATH=VALUE" to the study's base configuration, `final.*`, or OWN fields."""
        return _in_any_order(self, settings, Study._with_setting)

    def _with_setting(self, setting: str) -> Study:
        path, equals, text = setting.partition("=")
        require(bool(equals), f"--set {spaces.shortened(setting)} has no value; write --set PATH=VALUE.")
        known = [*spaces.paths(self.train), *(f"final.{name}" for name in spaces.paths(self.final)), *OWN]
        try:
            if path not in known:
                raise spaces.unknown_field(path, known)
            return self._with(path, spaces.parse(*self._owner(path), text))
        except InputError as error:
            raise InputError(f"--set {spaces.shortened(setting)[1:-1]}: {error}") from error

    def with_definition(self, stored: Mapping[str, Any]) -> Study:
        """Apply the base configuration, the final step and the seed of a stored definition."""
        return _in_any_order(self, list(stored.items()), lambda study, field: study._with_stored(*field))

    def _with_stored(self, path: str, value: Any) -> Study:
        owner, inner = self._owner(path)
        if inner not in spaces.paths(owner) or plain(spaces.get(owner, inner)) == value:
            return self
        return self._with(path, tuple(value) if isinstance(value, list) else value)

    def _with(self, path: str, value: Any) -> Study:
        owner, inner = self._owner(path)
        changed: Any = spaces.replace(owner, inner, value)
        if owner is self:
            return changed
        return dataclasses.replace(self, **{"final" if owner is self.final else "train": changed})

    def _owner(self, path: str) -> tuple[Any, str]:
        """Return the part of the study that a path belongs to, and the path inside it."""
        if path.startswith("final."):
            return self.final, path.removeprefix("final.")
        return (self if path in OWN else self.train), path

    def located(self, home: Path, data_root: str | None, device: str | None) -> Study:
        """Make the study's folders absolute: relative to `home`, `data_root` relative to the current folder."""
        data: Any = self.train.data
        changes = {"cache": str(home / data.cache)}
        if hasattr(data, "root"):
            changes["root"] = str(Path(data_root).resolve() if data_root else home / data.root)
        elif data_root is not None:
            raise InputError(f"--data-root: {type(data).__name__} reads no folder; leave the option out.")
        train = dataclasses.replace(self.train, data=dataclasses.replace(data, **changes))
        if device is not None:
            train = dataclasses.replace(train, runtime=dataclasses.replace(train.runtime, device=device))
        return dataclasses.replace(self, train=train)

    def has_default(self, path: str) -> bool:
        """Return whether a field has its class's default, which is the value in older studies without the field."""
        if path not in {*identity(self.train), *identity(self.final, "final."), *OWN}:
            return False
        return is_default(*self._owner(path))

    def definition(self) -> dict[str, Any]:
        """Return everything that decides the results, flat, for JSON; without `trials`, which may grow."""
        searched = {f"space.{path}": repr(dimension) for path, dimension in self.space.items()}
        others: dict[str, Any] = {"sampler": repr(self.sampler), "pruner": repr(self.pruner)}
        others |= {name: getattr(self, name) for name in OWN}
        if self.first:
            others["first"] = [self.params(each) for each in self.first]
        if self.after is not None:
            others["after"] = self.after
        return identity(self.train) | searched | identity(self.final, "final.") | others


ChangeT = TypeVar("ChangeT")


def _in_any_order(study: Study, changes: Sequence[ChangeT], change: Callable[[Study, ChangeT], Study]) -> Study:
    """Apply all changes in an order that works: a larger image needs a larger stored image first."""
    while changes:
        refused = []
        for each in changes:
            try:
                study = change(study, each)
            except InputError as error:
                refused.append((each, error))
        if len(refused) == len(changes):
            raise refused[0][1]
        changes = [each for each, _ in refused]
    return study
