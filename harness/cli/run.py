"""Commands that train: how they are stopped, and how they say what goes on."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from harness.base.errors import FAILED, INTERRUPTED, Halt, masked, no_room
from harness.training import interrupt


def resumable(command: Callable[[Namespace], int]) -> Callable[[Namespace], int]:
    """A command that trains. One that was stopped says how to go on."""

    def work(args: Namespace) -> int:
        interrupt.install()
        _share_cores()
        try:
            return command(args)
        except KeyboardInterrupt:
            return _stopped(INTERRUPTED)
        except Halt as error:
            text = str(error)
        except MemoryError as error:  # outside of a trial, which would have failed and let the next one try
            text = f"{str(error) or 'out of memory'}; free some, or take another device."
        except OSError as error:
            if not no_room(error):
                raise
            text = f"{error.filename or 'A file'} cannot be written ({error.strerror}); make room."
        print(f"error: {text}", file=sys.stderr)
        return _stopped(FAILED)

    return work


def _stopped(code: int) -> int:
    """The command that goes on, as the last line; a password in it is the user's to fill in again."""
    from harness.report.display import StudyConsole

    text = f"Go on with:\n{_command()}"
    try:
        print(text, file=sys.stderr if StudyConsole.left else sys.stdout, flush=True)
    except BrokenPipeError:  # nobody reads stdout any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(text, file=sys.stderr)
    return code


def _command() -> str:
    """What was typed, without what has been done and must not be done twice, and with the passwords hidden."""
    program, *arguments = sys.argv
    started = ["-m", "harness"] if Path(program).name == "__main__.py" else [program]  # `python -m` gives that file
    command = [Path(sys.executable).name, *started, *arguments]
    return shlex.join(map(masked, command))


def lasting_command() -> str:
    """The same without a reason to open the test set again, which holds once."""
    words = shlex.split(_command())
    places = [place for place, word in enumerate(words) if word.startswith("--reopen-test")]
    for place in reversed(places):
        del words[place : place + (1 if "=" in words[place] else 2)]
    return shlex.join(words)


def _share_cores() -> None:
    """Let waiting threads of GNU OpenMP sleep sooner; must come before torch is imported.

    By default they spin for milliseconds, and two processes on the same cores keep each other from working: a step took
    1.7 s, against 0.36 s with a thirtieth of the spinning and 0.09 s alone (benchmarks/RESULTS.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
