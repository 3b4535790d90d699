"""Commands that train: stop them, and print the command that resumes them."""

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
    """Wrap a command that trains: when it stops, print how to resume."""

    def work(args: Namespace) -> int:
        interrupt.install()
        _share_cores()
        try:
            return command(args)
        except KeyboardInterrupt:
            return _stopped(INTERRUPTED)
        except Halt as error:
            text = str(error)
        except MemoryError as error:  # outside a trial, which would fail and let the next one run
            text = f"{str(error) or 'out of memory'}; free memory, or use another device."
        except OSError as error:
            if not no_room(error):
                raise
            text = f"{error.filename or 'A file'} cannot be written ({error.strerror}); make room."
        print(f"error: {text}", file=sys.stderr)
        return _stopped(FAILED)

    return work


def _stopped(code: int) -> int:
    """Print the command that resumes, as the last line, with passwords masked; return the exit code."""
    from harness.report.display import StudyConsole

    text = f"Resume with:\n{_command()}"
    try:
        print(text, file=sys.stderr if StudyConsole.left else sys.stdout, flush=True)
    except BrokenPipeError:  # stdout is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(text, file=sys.stderr)
    return code


def _command() -> str:
    """Return the command line, without options that must not run twice, and with passwords masked."""
    program, *arguments = sys.argv
    started = ["-m", "harness"] if Path(program).name == "__main__.py" else [program]  # argv[0] of `python -m`
    command = [Path(sys.executable).name, *started, *arguments]
    return shlex.join(map(masked, command))


def lasting_command() -> str:
    """Return the command line without --fresh and --reopen-test, which apply once."""
    words = [word for word in shlex.split(_command()) if word != "--fresh"]
    places = [place for place, word in enumerate(words) if word.startswith("--reopen-test")]
    for place in reversed(places):
        del words[place : place + (1 if "=" in words[place] else 2)]
    return shlex.join(words)


def _share_cores() -> None:
    """Let waiting threads of GNU OpenMP sleep sooner; call it before torch is imported.

    By default they spin for milliseconds, and two processes on the same cores block each other: a step took 1.7 s,
    against 0.36 s with a thirtieth of the spinning and 0.09 s alone (benchmarks/RESULTS.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
