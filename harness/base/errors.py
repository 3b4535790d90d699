"""What ends a command with one sentence instead of a traceback, and the exit codes."""

from __future__ import annotations

import errno
import re
from unicodedata import category

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes of every command

# user:password@ after ://, up to the last @ of the word, and passwords given as a parameter.
SECRETS = re.compile(r"(?<=://)([^\s/@:]*:)\S*(?=@)|([?&](?:password|passwd|token)=)[^\s&'\"]+", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with *** for every password in a URL: what is printed and stored is read by others."""
    return SECRETS.sub(lambda found: f"{found[1] or found[2]}***", text)


def is_utf8(text: str) -> bool:
    """Whether the text can be written into a file; a name made of other bytes cannot."""
    return not any(category(each) == "Cs" for each in text)


class Told(Exception):
    """What a command ends with: a sentence for people, and an exit code."""

    code = FAILED

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class InputError(Told):
    """Something a user can mend. The message is one clear sentence that says what to do instead; exit code 2."""

    code = WRONG_INPUT

    def __init__(self, message: str) -> None:
        super().__init__(shown(masked(message)))


class Halt(Told):
    """A study cannot go on for a reason that lies outside it: no room on the disk, a database that broke.

    What is finished is kept, and the same command goes on once the reason is gone; exit code 1.
    """


class StudyFailed(Told):
    """A study ended without a result, or with one that is not to be trusted; exit code 1."""


def no_room(error: BaseException) -> bool:
    """Whether the disk, the quota or the allowed file size is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: str) -> str:
    """The text on one line of a terminal or a file: a name may hold bytes that are no UTF-8, which Python reads as lone
    surrogates, line breaks, and signs that steer the terminal."""
    return "".join(each if each.isprintable() or category(each) == "Zs" else ascii(each)[1:-1] for each in text)
