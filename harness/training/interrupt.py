"""Signals that ask a process to stop. Once: the batch is finished and a checkpoint written; Ctrl-C twice: at once.

SIGTERM, which schedulers send before they kill, is a polite request however often it comes. An import is not cut in two
by it either: libraries catch whatever is raised while they import others, and are half there from then on.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from harness.base.errors import INTERRUPTED

NOTICE = "Stopping: the batch is finished first, then saved. Ctrl-C again stops at once."
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: the terminal was closed
UNHEARD_SECONDS = 0.01  # until a request that was swallowed, or came inside an import, is made again


class _State:
    requested = False  # somebody asked this process to stop
    undivided = False  # a batch is being computed; stopping waits for its end
    swallowing = False  # Python swallows what is raised now
    put_off = False  # a request came inside an import, and is about to be made again
    noticed = False  # that it waits was said, or is said by another process
    turn = 0  # a request that waits to be made again is one of this turn, or of nobody


def install(*, quiet: bool = False) -> None:
    """Handle SIGINT and SIGTERM from now on; both end in KeyboardInterrupt.

    A process that is `quiet` has another one above it that says what there is to say.
    """
    _State.requested, _State.noticed, _State.turn = False, quiet, _State.turn + 1
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores it
            signal.signal(number, _handle)
    sys.unraisablehook, sys.excepthook = _unraisable, _uncaught
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@contextmanager
def handled() -> Iterator[None]:
    """As after `install`, inside; in a thread, where Python hears no signals, everything stays as it is."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is _handle:
        yield
        return
    before, hooks = {number: signal.getsignal(number) for number in SIGNALS}, (sys.unraisablehook, sys.excepthook)
    install()
    try:
        yield
    finally:
        _State.requested, _State.turn = False, _State.turn + 1
        sys.unraisablehook, sys.excepthook = hooks
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def inherited_later() -> Iterator[None]:
    """A Ctrl-C reaches a process that is started inside once it calls `install`; before, it would only die noisily."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requested() -> bool:
    """Whether somebody asked this process to stop."""
    return _State.requested


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


def notice() -> None:
    """Say, once, that stopping takes a moment."""
    if not _State.noticed:
        _State.noticed = True
        os.write(2, f"{NOTICE}\n".encode())  # print may not be called inside a print


def _handle(number: int, frame: Any) -> None:
    if _State.swallowing:  # a request is about to be made again
        return
    again, _State.requested = _State.requested, True
    repeated, _State.put_off = _State.put_off, False
    at_once = again and number == signal.SIGINT
    if again and not (at_once or repeated):
        return
    if _State.undivided and not at_once:
        if not sys.stdout.isatty():  # a live display says it itself
            notice()
        return
    if _is_importing(frame) and not at_once:
        _State.put_off = True
        # Not threading's: whatever was interrupted may hold its lock.
        _thread.start_new_thread(_ask_again, (threading.get_ident(), _State.turn))  # this is the main thread
        return
    raise KeyboardInterrupt


def _is_importing(frame: Any) -> bool:
    """Whether what a signal found at work is part of an import."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_find_and_load" and code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _uncaught(kind: type[BaseException], fault: BaseException, traceback: TracebackType | None) -> None:
    """End as a command does that was interrupted, where the request came before or after its work."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, fault, traceback)
        return
    print("Interrupted.", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _unraisable(fault: Any) -> None:
    """Make a request again that came inside a callback (of a weak reference, say), where Python swallows exceptions."""
    if fault.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(fault)
        return
    _State.swallowing = True
    # Not from here: it would be swallowed with the callback's own. To the main thread, for it may be waiting.
    threading.Thread(target=_ask_again, args=(threading.main_thread().ident, _State.turn)).start()
    _State.requested = False
    _State.swallowing = False


def _ask_again(main: int, turn: int) -> None:
    time.sleep(UNHEARD_SECONDS)
    while _State.swallowing:  # on a busy machine, starting this thread takes longer than that
        time.sleep(UNHEARD_SECONDS)
    if turn == _State.turn:
        signal.pthread_kill(main, signal.SIGTERM)
