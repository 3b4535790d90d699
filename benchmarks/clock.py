"""Measure a process's time by name: wrap functions and methods, and count each second once."""

from __future__ import annotations

import functools
import gc
import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import _GeneratorContextManager, contextmanager
from typing import Any


class Clock:
    """Seconds by name. Of names inside each other the innermost counts; what other threads do is not counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._names = ["the rest"]
        self._since = time.perf_counter()
        self._thread = threading.get_ident()

    def enter(self, name: str) -> None:
        if threading.get_ident() == self._thread:
            self._book()
            self.calls[name] += name != self._names[-1]
            self._names.append(name)

    def leave(self) -> None:
        if threading.get_ident() == self._thread:
            self._book()
            self._names.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        self.seconds[self._names[-1]] += now - self._since
        self._since = now

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def watch(self, name: str, place: str, *attributes: str) -> None:
        """Count functions of a module, or methods of a class in it, under `name`."""
        owner = _owner(place)
        for attribute in attributes:
            setattr(owner, attribute, self._wrapped(name, getattr(owner, attribute)))

    def _wrapped(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.under(name):
                made = inner(*args, **kwargs)
            if isinstance(made, Generator):
                return self._generated(name, made)
            return self._managed(name, made) if isinstance(made, _GeneratorContextManager) else made

        return outer

    def _generated(self, name: str, made: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The generator's own time, not that of whoever takes what it yields."""
        try:
            while True:
                with self.under(name):
                    try:
                        value = next(made)
                    except StopIteration as end:
                        return end.value
                yield value
        finally:
            made.close()

    @contextmanager
    def _managed(self, name: str, made: _GeneratorContextManager[Any]) -> Iterator[Any]:
        """Entering and leaving, not what lies between."""
        with contextmanager(lambda: self._generated(name, _as_generator(made)))() as value:
            yield value

    def watch_imports(self) -> None:
        """Count modules that are imported for the first time, wherever, as "imports"."""
        self.watch("imports", "importlib._bootstrap", "_find_and_load")

    def watch_collector(self) -> None:
        """Count Python's garbage collections wherever they happen; those that imports cause are theirs."""

        def callback(phase: str, _info: dict[str, int]) -> None:
            if phase == "start":
                self.enter("imports" if self._names[-1] == "imports" else "garbage collection")
            else:
                self.leave()

        gc.callbacks.append(callback)

    def stop(self) -> dict[str, float]:
        """The seconds by name, the most first."""
        self._book()
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))


def _owner(place: str) -> Any:
    """A module, or a class as "module.Class"."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _as_generator(manager: _GeneratorContextManager[Any]) -> Generator[Any, None, None]:
    with manager as value:
        yield value
