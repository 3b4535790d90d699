"""What a run is asked for, by the command line or by a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from harness.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command `run` takes; `audit` takes some of it."""

    trials: int | None = None  # finished ones in all; None: as many as the study asks for
    set: tuple[str, ...] = ()  # PATH=VALUE
    data_root: str | None = None
    device: str | None = None
    workers: int = 0  # 0: one, or on Ray as many as there is room for
    workers_per_gpu: int = 1
    engine: Literal["processes", "ray"] = "processes"
    ray_address: str | None = None
    reopen_test: str | None = None  # why the test set may be opened again
    fresh: bool = False
    storage: str | None = None
    tracking_uri: str | None = None
    command: str | None = None  # what goes on with it, for people to read

    @staticmethod
    def of(given: Mapping[str, Any], command: str | None = None) -> RunOptions:
        """Those that a command line or a program gives. Raises InputError for one that there is not."""
        known = {field.name for field in fields(RunOptions)} - {"command"}
        if unknown := sorted(set(given) - known):
            raise InputError(f"There is no option {unknown[0]!r}; there are {', '.join(sorted(known))}.")
        if isinstance(given.get("set"), str):
            raise InputError(f"set takes a list of settings; write set=[{given['set']!r}].")
        return RunOptions(**dict(given) | {"set": tuple(given.get("set", ())), "command": command})
