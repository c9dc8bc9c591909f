"""Waiting for what another process or thread will do, where nothing tells when it has."""

import time
from collections.abc import Callable

import psutil

# Ends a test that hangs. No test passes or fails by how long something took.
HANG_S = 600.0


def until(promise: Callable[[], bool]) -> None:
    """Return once `promise()` is true. Only for what stays true: hold what may pass by unseen, and then look at it."""
    deadline_s = time.monotonic() + HANG_S
    while not promise():
        assert time.monotonic() < deadline_s, f"not true within {HANG_S:.0f} s"
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a dead one that nobody has collected yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
