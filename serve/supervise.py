"""Keep a server up: notice that its child ended or hangs, start it again with growing pauses, give up after too many.

The child replays the store's adapters before it opens its port, so whoever waits for `/health` finds everything there.
"""

import contextlib
import os
import sys
import threading
import time
from collections import deque

from counsel.errors import UserError
from serve.server import Server, reason_in

WINDOW_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
POLL_S = 0.2
# A false alarm cuts every running answer, so patience is long: on two busy cores `/health` may take seconds. Misses are
# counted, not seconds, so that a parent that was itself stopped for a while does not take that for silence.
HEALTH_EVERY_S, HEALTH_WAIT_S, HEALTH_MISSES = 5.0, 10.0, 6
# A dead engine says so at once, or its port is closed already; vLLM may take a minute more to end.
DOWN_MISSES = 2


def supervise(server: Server, stop: threading.Event) -> None:
    """Watch a started server until `stop` is set, and start it again when it fails.

    Raises UserError with the last reason when it died more than `restarts` times within ten minutes.
    """
    deaths_s: deque[float] = deque()
    health = _Health(server)
    while not stop.wait(POLL_S):
        if os.getpid() == 1:
            reap_orphans(server.pid)
        reason = server.died() or health.lost()
        if reason is None:
            continue
        now_s = time.monotonic()
        deaths_s.append(now_s)
        while now_s - deaths_s[0] > WINDOW_S:
            deaths_s.popleft()
        if len(deaths_s) > server.config.restarts:
            raise UserError(f"the server failed {len(deaths_s)} times in {WINDOW_S / 60:.0f} min; last: {reason}")
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (len(deaths_s) - 1))
        print(f"the server failed: {reason}; starting it again in {pause_s:.0f} s", file=sys.stderr, flush=True)
        # The engine's processes may outlive the one we saw end, and a hung one never ends.
        server.kill()
        if stop.wait(pause_s):
            return
        try:
            server.start()
        except (UserError, OSError) as error:
            # A disk that is full now may have room at the next try.
            print(f"it did not come up: {error}", file=sys.stderr, flush=True)
        health = _Health(server)


def reap_orphans(child: int | None) -> None:
    """Collect what ended and was left to us, as it is to process 1 of a container; never `child`, which we watch."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == child:
                return
            os.waitpid(ended.si_pid, 0)


class _Health:
    """Asks a server how it is every few seconds, and counts the misses."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._silent = self._down = 0
        self._asked_s = time.monotonic()

    def lost(self) -> str | None:
        """Why the server counts as dead or hung, in one line; None while it may still answer."""
        if time.monotonic() - self._asked_s < HEALTH_EVERY_S:
            return None
        said = self.server.health(HEALTH_WAIT_S)
        self._asked_s = time.monotonic()
        if said == "unknown":
            return None
        self._silent = self._silent + 1 if said == "silent" else 0
        self._down = self._down + 1 if said == "down" else 0
        if self._down >= DOWN_MISSES:
            return reason_in(self.server.log) or "its engine is dead"
        if self._silent >= HEALTH_MISSES:
            return f"it hangs: no answer from /health {HEALTH_MISSES} times in a row, {HEALTH_WAIT_S:.0f} s each"
        return None
