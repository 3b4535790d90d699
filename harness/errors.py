"""The one exception that means: the user can mend this."""


class InputError(Exception):
    """A wrong argument, study, file or environment.

    The message is one sentence that says what to do instead. The command line prints it and exits with 2, without a
    traceback; nothing has been written when it is raised.
    """
