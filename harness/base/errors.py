"""Exceptions that end a command with a message instead of a traceback, and exit codes."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from unicodedata import category

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes of every command

# user:password@ after ://, up to the last @ of the word, and passwords given as a parameter.
SECRETS = re.compile(
    r"(?<=://)([^\s/@:]*:)\S*(?=@)|([?&](?:password|passwd|sslpassword|token)=)[^\s&'\"]+|(https?://)[^\s/@:]+(?=@)",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Replace every password in a URL with ***: others read what is printed and stored."""
    return SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3] or ''}***", text)


def recordable(arguments: Sequence[str]) -> list[str]:
    """Return a command line without passwords, and without --on-event, whose command may hold some."""
    found, words = [], iter(arguments)
    for word in words:
        if word == "--on-event":
            next(words, None)
        elif not word.startswith("--on-event="):
            found.append(masked(word))
    return found


def is_utf8(text: str) -> bool:
    """Return whether the text is valid UTF-8; a file name may contain other bytes."""
    return not any(category(each) == "Cs" for each in text)


class Told(Exception):
    """An exception that ends a command with a message and an exit code."""

    code = FAILED

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class InputError(Told):
    """A mistake that the user can fix. The message says what to do instead; exit code 2."""

    code = WRONG_INPUT

    def __init__(self, message: str) -> None:
        super().__init__(shown(masked(message)))


class Halt(Told):
    """A study cannot continue for an external reason: a full disk, a broken database.

    Finished work is kept, and the same command resumes the study once the cause is fixed; exit code 1.
    """


class StudyFailed(Told):
    """A study ended without a result, or with one that cannot be trusted; exit code 1."""


def no_room(error: BaseException) -> bool:
    """Return whether the disk, quota or file size limit is reached."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: str) -> str:
    """Escape a text for one line of a terminal or a file: a name may contain invalid UTF-8, which Python reads as lone
    surrogates, line breaks, and control characters."""
    return "".join(each if each.isprintable() or category(each) == "Zs" else ascii(each)[1:-1] for each in text)
