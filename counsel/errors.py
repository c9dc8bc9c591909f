"""The exception whose message is for the user."""


class UserError(Exception):
    """An expected failure: one line that says what was wrong, the value, what is allowed and what to do.

    `counsel.cli.main` prints it as `error: <line>` and exits 1. Any other exception is a bug and keeps its traceback.
    """
