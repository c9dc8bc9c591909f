"""The one exception a user is meant to read."""


class UserError(Exception):
    """An expected failure: one line that says what was wrong, the value, what is allowed and what to do.

    `counsel.cli.main` prints it as `error: <line>` and exits 1. Everything else that escapes is our bug and keeps
    its traceback.
    """
