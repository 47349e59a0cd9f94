"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: one sentence that names the key, file or row, and what would be right.

    Every entry point prints it without a traceback and exits with status 2.
    """
