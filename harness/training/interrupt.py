"""Stop signals. The first one finishes the batch and writes a checkpoint; a second Ctrl-C stops at once.

SIGTERM, which schedulers send before they kill, never stops at once, however often it comes. A signal also does not
interrupt an import: libraries catch exceptions while they import others, and would stay half imported.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from harness.base.errors import INTERRUPTED, InputError

NOTICE = "Stopping after this batch and a checkpoint. Press Ctrl-C again to stop at once."
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: the terminal was closed
_ALONE = threading.RLock()  # an event of a study may run another one
UNHEARD_SECONDS = 0.01  # until a request that was swallowed, or came in an import, is repeated


class _State:
    requested = False  # a stop was requested
    undivided = False  # in a batch; stopping waits for its end
    swallowing = False  # Python swallows exceptions now
    put_off = False  # a request came where it cannot take effect, and will be repeated
    noticed = False  # the notice was printed, or another process prints it
    displayed = False  # a live display shows it
    turn = 0  # a delayed request of an earlier turn is dropped


def install(*, quiet: bool = False) -> None:
    """Handle stop signals from now on; they raise KeyboardInterrupt.

    With `quiet`, the process prints no notice: its parent does.
    """
    if not _State.put_off:  # `run_study.py` installs them too, and a request may wait since then
        _forget()
    _State.noticed = quiet
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores it
            signal.signal(number, _handle)
    sys.unraisablehook, sys.excepthook = _unraisable, _uncaught
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@contextmanager
def handled() -> Iterator[None]:
    """Handle signals as `install` does, inside the block; not in a thread, which gets no signals.

    Raises InputError if another thread of this process is inside: torch's global generators are one for a process.
    """
    if not _ALONE.acquire(blocking=False):
        raise InputError("This process runs a study in another thread; wait for its end, or use another process.")
    try:
        with _signals():
            yield
    finally:
        _ALONE.release()


@contextmanager
def _signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is _handle:
        yield
        return
    before, hooks = {number: signal.getsignal(number) for number in SIGNALS}, (sys.unraisablehook, sys.excepthook)
    install()
    try:
        yield
    finally:
        _forget()
        sys.unraisablehook, sys.excepthook = hooks
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget() -> None:
    _State.requested, _State.put_off, _State.turn = False, False, _State.turn + 1


@contextmanager
def inherited_later() -> Iterator[None]:
    """Delay Ctrl-C in a process started inside until it calls `install`; before, it would die with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requested() -> bool:
    """Return whether a stop was requested."""
    return _State.requested


@contextmanager
def undivided() -> Iterator[None]:
    """Delay a stop request to the end of the block, unless Ctrl-C comes twice."""
    _State.undivided = True
    try:
        yield
    finally:
        _State.undivided = False
    if _State.requested:
        raise KeyboardInterrupt


def displayed(live: bool) -> None:
    """Tell whether a live display shows the notice from now on."""
    _State.displayed = live


def notice() -> None:
    """Print once that stopping takes a moment."""
    if not _State.noticed:
        _State.noticed = True
        with suppress(OSError):
            os.write(2, f"{NOTICE}\n".encode())  # print is not reentrant


def _handle(number: int, frame: Any) -> None:
    if _State.swallowing:  # the request will be repeated
        return
    again, _State.requested = _State.requested, True
    repeated, _State.put_off = _State.put_off, False
    at_once = again and number == signal.SIGINT
    if again and not (at_once or repeated):
        return
    if _State.undivided and not at_once:
        if not _State.displayed:
            notice()
        return
    if _is_importing(frame) and not at_once:
        _State.put_off = True
        # Not `threading`: the interrupted code may hold its lock.
        _thread.start_new_thread(_ask_again, (threading.get_ident(), _State.turn))  # this is the main thread
        return
    raise KeyboardInterrupt


def _is_importing(frame: Any) -> bool:
    """Return whether the interrupted code is in an import."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_find_and_load" and code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _uncaught(kind: type[BaseException], fault: BaseException, traceback: TracebackType | None) -> None:
    """Exit as an interrupted command does, if the request came before or after its work."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, fault, traceback)
        return
    print("Interrupted.", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _unraisable(fault: Any) -> None:
    """Repeat a request that came in a callback (of a weak reference, say), where Python swallows exceptions."""
    if fault.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(fault)
        return
    _State.swallowing = True
    # Not from here: it would be swallowed, too. To the main thread, since it may be waiting.
    threading.Thread(target=_ask_again, args=(threading.main_thread().ident, _State.turn)).start()
    _State.requested, _State.put_off = False, True
    _State.swallowing = False


def _ask_again(main: int, turn: int) -> None:
    time.sleep(UNHEARD_SECONDS)
    while _State.swallowing:  # on a busy machine, starting this thread takes longer than that
        time.sleep(UNHEARD_SECONDS)
    if turn == _State.turn:
        signal.pthread_kill(main, signal.SIGTERM)
