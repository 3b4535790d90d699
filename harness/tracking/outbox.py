"""Writing to a service that may be away without waiting for it, and without losing the order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0
GATHERING_SECONDS = 0.5  # what is told meanwhile is written together; a reader sees it that much later


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
        self.attempt()

    def attempt(self) -> None:
        """Try what waits, unless that would be too soon after the last time."""
        if not self.pause():
            self.flush()

    def pause(self) -> float:
        """Seconds until the next attempt; 0 while the service answers."""
        return max(0.0, self._next - time.monotonic())

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
                self.reset()
        return True

    def reset(self) -> None:
        """Take the service for one that answers."""
        self._pause = self._next = 0.0

    def _wait(self, error: Away) -> None:
        if not self._pause:
            self._say(f"{self._name} does not take what it is told ({error}). The study goes on, and it is told later.")
        self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._next = time.monotonic() + self._pause


class WriterThread:
    """An outbox that is emptied by a thread, so that whoever writes does not wait for the service at all.

    The thread lives as long as something waits, and dies with the process: what it has not written by then is lost
    here, and must be known elsewhere. One operation runs at a time, in the thread or in `flush`. How much may wait has
    no bound, for entries are small: all epochs of a study are a few megabytes.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._running = threading.Lock()  # held while operations run
        self._starting = threading.Lock()  # held to decide whether there is a thread
        self._thread: threading.Thread | None = None
        self._mistake: Exception | None = None

    def add(self, operation: Callable[[], None]) -> None:
        """Have it done soon, after everything that was added before."""
        with self._starting:
            self._outbox.waiting.append(operation)
            if self._thread is None or not self._thread.is_alive():  # not alive: the process was forked
                self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
                self._thread.start()

    def check(self) -> None:
        """Raise the mistake that an operation made in the thread, once."""
        mistake, self._mistake = self._mistake, None
        if mistake is not None:
            raise mistake

    def flush(self) -> bool:
        """Try what waits, now; whether all of it is done. Raises what `check` does."""
        with self._running:
            done = self._outbox.flush()
        self.check()
        return done

    def forget(self) -> None:
        """Drop what waits: it will be told anew, from the beginning."""
        with self._running:
            self._outbox.waiting.clear()
            self._outbox.reset()

    def stop(self) -> None:
        """Leave what waits where it is; the next `add` or `flush` goes on."""
        with self._starting:
            self._thread = None

    def _work(self) -> None:
        while True:
            time.sleep(max(GATHERING_SECONDS, self._outbox.pause()))
            with self._running:
                if threading.current_thread() is not self._thread:
                    return  # stopped
                try:
                    self._outbox.attempt()
                except Exception as error:  # noqa: BLE001  it is raised where somebody can hear it: in `check`
                    self._mistake = self._mistake or error
            with self._starting:
                if not self._outbox.waiting and threading.current_thread() is self._thread:
                    self._thread = None
                    return
