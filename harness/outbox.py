"""Writing to a service that may be away without waiting for it, and without losing the order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0


class Away(Exception):
    """The service did not answer; what it was told may or may not have arrived."""


class Outbox:
    """Operations in order: each done at once while the service answers, else kept and tried again later.

    An operation raises Away when the service is, and must bear being repeated, for an answer can get lost. Between two
    attempts lie pauses that double from seconds to minutes, so that whoever writes loses little time.
    """

    def __init__(self, say: Callable[[str], None], name: str) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self._say, self._name = say, name
        self._pause = 0.0  # 0 while the service answers
        self._next = 0.0

    def add(self, operation: Callable[[], None]) -> None:
        self.waiting.append(operation)
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> bool:
        """Try what waits, now; whether all of it is done."""
        while self.waiting:
            try:
                self.waiting[0]()
            except Away as error:
                self._wait(error)
                return False
            except Exception:
                self.waiting.popleft()  # a mistake in the operation itself; it must not come again with every other
                raise
            self.waiting.popleft()
            if self._pause:
                self._say(f"{self._name} answers again; what it missed is being written.")
                self._pause = self._next = 0.0
        return True

    def _wait(self, error: Away) -> None:
        if not self._pause:
            self._say(f"{self._name} does not take what it is told ({error}). The study goes on, and it is told later.")
        self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._next = time.monotonic() + self._pause
