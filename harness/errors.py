"""What ends a command with one sentence instead of a traceback."""

from __future__ import annotations

import errno


class InputError(Exception):
    """Something a user can mend. The message is one clear sentence that says what to do instead; exit code 2."""


class Halt(Exception):
    """A study cannot go on for a reason that lies outside it: no room on the disk, a database that broke.

    What is finished is kept, and the same command goes on once the reason is gone; exit code 1.
    """


def no_room(error: BaseException) -> bool:
    """Whether the disk, the quota or the allowed file size is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
