"""Signals that ask a process to stop. Once: the batch is finished and a checkpoint written; Ctrl-C twice: at once.

SIGTERM, which schedulers send before they kill, is a polite request however often it comes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _State:
    requested = False  # somebody asked this process to stop
    undivided = False  # a batch is being computed; stopping waits for its end


def install() -> None:
    """Handle SIGINT and SIGTERM from now on; both end in KeyboardInterrupt."""
    _State.requested = False
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)


@contextmanager
def undivided() -> Iterator[None]:
    """A request to stop that comes inside takes effect at the end, unless it comes twice."""
    _State.undivided = True
    try:
        yield
    finally:
        _State.undivided = False
    if _State.requested:
        raise KeyboardInterrupt


def _handle(number: int, frame: Any) -> None:
    again, _State.requested = _State.requested, True
    if again and number == signal.SIGTERM:
        return
    if again or not _State.undivided:
        raise KeyboardInterrupt
    print("Stopping: the batch is finished first, then saved. Ctrl-C again stops at once.", file=sys.stderr, flush=True)
