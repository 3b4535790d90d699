"""Options of a run, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from harness.base.errors import InputError
from harness.config.space import check_types

MOST_WORKERS = 10_000  # a larger number is a typo


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the command `run`; `audit` takes some of them."""

    trials: int | None = None  # total of finished trials; None: the study's `trials`
    hours: float | None = None  # as in the study
    patience: int | None = None
    until: float | None = None
    price: float | None = None  # of a device-hour; None: as known to the study
    set: tuple[str, ...] = ()  # PATH=VALUE
    data_root: str | None = None
    device: str | None = None
    workers: int = 0  # 0: one, on Ray as many as fit, with `serve` those that connect
    workers_per_gpu: int = 1
    engine: Literal["processes", "ray"] = "processes"
    ray_address: str | None = None
    serve: str | None = None  # HOST:PORT where workers on other machines connect
    key_file: str | None = None
    reopen_test: str | None = None  # why the test set may be opened again
    fresh: bool = False
    json: bool = False  # print notices instead of text
    on_event: str | None = None  # a command that gets notices
    storage: str | None = None
    tracking_uri: str | None = None
    command: str | None = None  # resumes the run; shown to the user

    @property
    def trains_itself(self) -> bool:
        """Whether the coordinator trains, and has no workers."""
        return self.engine == "processes" and self.workers == 1 and self.serve is None

    @staticmethod
    def of(given: Mapping[str, Any], command: str | None = None) -> RunOptions:
        """Build the options from a mapping. Raises InputError for an unknown option."""
        known = {field.name for field in fields(RunOptions)} - {"command"}
        if unknown := sorted(set(given) - known):
            raise InputError(f"There is no option {unknown[0]!r}; choose from {', '.join(sorted(known))}.")
        settings = given.get("set")
        if isinstance(settings, Mapping):
            settings = ", ".join(repr(f"{path}={value}") for path, value in settings.items())
            raise InputError(f"set takes a list of settings; write set=[{settings}].")
        if isinstance(settings, str):
            raise InputError(f"set takes a list of settings; write set=[{settings!r}].")
        for name, least in (("workers", 0), ("workers_per_gpu", 1)):
            count = given.get(name, least)
            if not isinstance(count, int) or isinstance(count, bool) or not least <= count <= MOST_WORKERS:
                raise InputError(f"{name} is a whole number from {least} to {MOST_WORKERS:,}, not {count!r}.")
        texts = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        options = RunOptions(**texts | {"set": tuple(given.get("set") or ()), "command": command})
        check_types(options)
        return options
