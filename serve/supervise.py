"""Keep a server running: detect that its child ended or hangs, restart it after growing pauses, give up after too many.

The child loads the store's adapters before it opens its port, so they are there once `/health` answers.
"""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Collection
from types import FrameType

from counsel.errors import UserError
from serve.server import Server, reason_in

WINDOW_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
POLL_S = 0.2
# A false alarm cuts every running answer, so the limits are long: on two busy cores `/health` may take seconds. They
# count misses, not seconds: a parent that was stopped for a while must not take its own pause for a silent server.
HEALTH_EVERY_S, HEALTH_WAIT_S, HEALTH_MISSES = 5.0, 10.0, 6
# A dead engine reports it at once, or its port is closed; vLLM may take another minute to exit.
DOWN_MISSES = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM, from a service manager or an orchestrator, which may still route requests to this server."""


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """The handler for SIGTERM of a command that serves."""
    raise Terminated


def supervise(server: Server, stop: threading.Event) -> None:
    """Watch a started server until `stop` is set, and restart it when it fails.

    Raises UserError with the last reason if it fails more than `restarts` times within ten minutes.
    """
    failures_s: deque[float] = deque()
    health = _HealthMonitor(server)
    while not stop.wait(POLL_S):
        if os.getpid() == 1:
            reap_orphans({server.pid} if server.pid else set())
        reason = server.exit_reason() or health.failure()
        if reason is None:
            continue
        now_s = time.monotonic()
        failures_s.append(now_s)
        while now_s - failures_s[0] > WINDOW_S:
            failures_s.popleft()
        if len(failures_s) > server.config.restarts:
            raise UserError(f"the server failed {len(failures_s)} times in {WINDOW_S / 60:.0f} min; last: {reason}")
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (len(failures_s) - 1))
        print(f"the server failed: {reason}; starting it again in {pause_s:.0f} s", file=sys.stderr, flush=True)
        # The engine's processes may outlive the one that ended, and a hung one never ends.
        server.kill()
        if stop.wait(pause_s):
            return
        try:
            server.start()
        except (UserError, OSError) as error:
            # A full disk may have room at the next attempt.
            print(f"the restart failed: {error}", file=sys.stderr, flush=True)
        health = _HealthMonitor(server)


def reap_orphans(children: Collection[int]) -> None:
    """Reap orphans, which a container hands to its process 1; never `children`, which the supervisor watches itself."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in children:
                return
            os.waitpid(ended.si_pid, 0)


class _HealthMonitor:
    """Asks for a server's `/health` every few seconds, and counts the misses."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._n_silent = self._n_down = 0
        self._asked_s = time.monotonic()

    def failure(self) -> str | None:
        """Why the server counts as dead or hung, in one line; None while it may still answer."""
        if time.monotonic() - self._asked_s < HEALTH_EVERY_S:
            return None
        health = self.server.health(HEALTH_WAIT_S)
        self._asked_s = time.monotonic()
        if health == "unknown":
            return None
        self._n_silent = self._n_silent + 1 if health == "silent" else 0
        self._n_down = self._n_down + 1 if health == "down" else 0
        if self._n_down >= DOWN_MISSES:
            return reason_in(self.server.log) or "its engine is dead"
        if self._n_silent >= HEALTH_MISSES:
            return f"it hangs: no answer from /health {HEALTH_MISSES} times in a row, {HEALTH_WAIT_S:.0f} s each"
        return None
