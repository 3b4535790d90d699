"""What a run is asked for, by the command line or by a program; standard library only."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command `run` takes; `audit` takes some of it."""

    study: str = "flowers102"  # its name, or its file
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

    @staticmethod
    def of(args: argparse.Namespace) -> RunOptions:
        """Those that a command has, of its parsed arguments."""
        given = {field.name: getattr(args, field.name) for field in fields(RunOptions) if hasattr(args, field.name)}
        return RunOptions(**given | {"set": tuple(given.get("set", ()))})
