"""Waiting for another process or thread that gives no signal when it is done."""

import time
from collections.abc import Callable

import psutil

# Ends a hanging test. No test passes or fails because of how long something took.
HANG_S = 600.0


def until(promise: Callable[[], bool]) -> None:
    """Return once `promise()` is true. Only for what stays true once it is: a short-lived state can be missed."""
    deadline_s = time.monotonic() + HANG_S
    while not promise():
        assert time.monotonic() < deadline_s, f"not true within {HANG_S:.0f} s"
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs. A zombie does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
