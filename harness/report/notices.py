"""Notices of what happens to a study, one JSON object a line: printed (`--json`), or sent to a command (`--on-event`).

They come from the coordinator alone. Each is the input of a process of its own, in a thread, with a time limit: the
study neither waits for a command nor fails with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from harness.base.errors import Halt, InputError, first_line
from harness.config import events
from harness.config.options import RunOptions
from harness.config.study import Study
from harness.store.database import without_waiting
from harness.store.store import Store, wanted

SECONDS = 30.0  # that a command may take for a notice
ENDING_SECONDS = 5.0  # to end a command that takes longer


def check_command(command: str) -> list[str]:
    """Return the words of a command. Raises InputError if it is not one, or its program does not exist."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--on-event {command!r} cannot be read ({error}); quote it as in a shell.") from error
    if not words or shutil.which(words[0]) is None:
        raise InputError(f"--on-event: there is no program {words[0] if words else command!r}; give one that exists.")
    return words


class Messenger:
    """Send lines to a command: a thread starts it for each, in order."""

    def __init__(self, command: str) -> None:
        self._words, self._command = check_command(command), command
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._failed = False  # which is said once
        self._thread = threading.Thread(target=self._work, name="notices", daemon=True)
        self._thread.start()

    def send(self, line: str) -> None:
        self._lines.put(line)

    def close(self) -> None:
        """Wait for the last notices, no longer than for one that fails."""
        self._lines.put(None)
        self._thread.join(SECONDS + ENDING_SECONDS)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            fault = self._fault(line)
            if fault is not None and not self._failed:
                self._failed = True
                print(f"--on-event {self._command!r} failed ({fault}); the study goes on.", file=sys.stderr)

    def _fault(self, line: str) -> str | None:
        options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options |= {"text": True, "encoding": "utf-8", "errors": "replace"}
        try:  # a session of its own: Ctrl-C is for the study
            process = subprocess.Popen(self._words, start_new_session=True, **options)
        except OSError as error:
            return str(error)
        with process:
            try:
                _, said = process.communicate(f"{line}\n", SECONDS)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                return f"it took longer than {SECONDS:g} s"
        if not process.returncode:
            return None
        return f"exit code {process.returncode}" + (f": {said.splitlines()[-1]}" if said.strip() else "")


def _print(line: str) -> None:
    from harness.report.display import unread

    try:
        print(line, flush=True)
    except (BrokenPipeError, ConnectionResetError):  # nobody reads them any more: the study goes on
        unread()


class Notices:
    """Turn a study's events into notices."""

    def __init__(self, study: Study, store: Store, resume: str | None, outputs: list[Callable[[str], object]]) -> None:
        """`resume` is the command that goes on with the study."""
        self._study, self._store, self._resume, self._outputs = study, store, resume, outputs

    def tell(self, event: str, **about: Any) -> None:
        """Send a notice with the study's progress."""
        progress: dict[str, Any] = {}
        with contextlib.suppress(Halt):  # the database is lost, which is why the study stops
            progress = {"finished": self._store.finished(), "trials": wanted(self._study, self._store)}
        line = json.dumps({"event": event, "study": self._study.name, **about, **progress})
        for output in self._outputs:
            output(line)

    def show(self, event: events.Event) -> None:
        match event:
            case events.TrialEnded(outcome=events.Completed(value=value)):
                best = self._store.best()
                if best is not None and best.number == event.number:
                    self.tell("new_best", trial=event.number, value=value, params=event.params)
            case events.TrialEnded(outcome=events.Failed() | events.Diverged() as outcome):
                self.tell("trial_failed", trial=event.number, state=outcome.state, reason=outcome.reason)
            case events.SearchStopped():
                self.tell("search_stopped", reason=event.reason)

    def stopped(self, error: BaseException) -> None:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
        with without_waiting():  # for a server whose absence may be the reason
            self.tell("stopped", reason=reason, command=self._resume)

    def finished(self) -> None:
        final, chosen = self._store.facts().final, self._store.chosen()
        about: dict[str, Any] = {"chosen": None if chosen is None else chosen.number}
        if final is not None:
            about["test"] = {"objective": final.objective, "value": final.value, "interval": list(final.interval)}
        self.tell("finished", **about)


@contextlib.contextmanager
def telling(options: RunOptions, study: Study, store: Store) -> Iterator[list[Callable[[events.Event], object]]]:
    """Send a study's notices; yield the hooks that get its events."""
    if not (options.json or options.on_event):
        yield []
        return
    with contextlib.ExitStack() as kept:
        outputs: list[Callable[[str], object]] = [_print] if options.json else []
        if options.on_event:
            messenger = Messenger(options.on_event)
            kept.callback(messenger.close)
            outputs.append(messenger.send)
        notices = Notices(study, store, options.command, outputs)
        notices.tell("begun")
        try:
            yield [notices.show]
        except BaseException as error:
            notices.stopped(error)
            raise
        notices.finished()
