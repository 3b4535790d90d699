"""Write in order to a service that may be unreachable, without waiting for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0
GATHERING_SECONDS = 0.5  # batch the operations of this period; readers see them that much later


class Away(Exception):
    """The service did not answer; the operation may or may not have arrived."""


class Outbox:
    """A queue of operations: run at once while the service answers, else kept and retried later.

    An operation raises Away if the service does not answer, and must be repeatable, because an answer can get lost.
    Retries back off exponentially from seconds to minutes, so that the caller loses little time.
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
        """Run the waiting operations, unless the pause has not ended."""
        if not self.pause():
            self.flush()

    def pause(self) -> float:
        """Return the seconds until the next attempt; 0 while the service answers."""
        return max(0.0, self._next - time.monotonic())

    def flush(self) -> bool:
        """Run the waiting operations now; return whether all are done."""
        while self.waiting:
            try:
                self.waiting[0]()
            except Away as error:
                self._wait(error)
                return False
            except Exception:
                self.waiting.popleft()  # the operation's own error; do not repeat it
                raise
            self.waiting.popleft()
            if self._pause:
                self._say(f"{self._name} answers again; writing the missed entries.")
                self.reset()
        return True

    def reset(self) -> None:
        """Assume that the service answers."""
        self._pause = self._next = 0.0

    def _wait(self, error: Away) -> None:
        if not self._pause:
            self._say(f"{self._name} does not accept entries ({error}). The study goes on, and writes them later.")
        self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._next = time.monotonic() + self._pause


class WriterThread:
    """An outbox that a thread empties, so that the caller never waits for the service.

    The thread lives while operations wait, and dies with the process: unwritten entries are lost here, and must be
    stored elsewhere. One operation runs at a time, in the thread or in `flush`. The queue is unbounded, because entries
    are small: all epochs of a study take a few megabytes.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._running = threading.Lock()  # held while operations run
        self._starting = threading.Lock()  # held to decide whether there is a thread
        self._thread: threading.Thread | None = None
        self._mistake: Exception | None = None

    def add(self, operation: Callable[[], None]) -> None:
        """Queue an operation, to run soon and in order."""
        with self._starting:
            self._outbox.waiting.append(operation)
            if self._thread is None or not self._thread.is_alive():  # not alive: the process was forked
                self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
                self._thread.start()

    def check(self) -> None:
        """Raise an operation's error in the thread, once."""
        mistake, self._mistake = self._mistake, None
        if mistake is not None:
            raise mistake

    def flush(self) -> bool:
        """Run the waiting operations now; return whether all are done. Raises as `check` does."""
        with self._running:
            done = self._outbox.flush()
        self.check()
        return done

    def forget(self) -> None:
        """Drop the waiting operations: the caller will repeat all of them."""
        with self._running:
            self._outbox.waiting.clear()
            self._outbox.reset()

    def stop(self) -> None:
        """Stop the thread and keep the queue; the next `add` or `flush` continues."""
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
                except Exception as error:  # noqa: BLE001  `check` raises it in the caller's thread
                    self._mistake = self._mistake or error
            with self._starting:
                if not self._outbox.waiting and threading.current_thread() is self._thread:
                    self._thread = None
                    return
