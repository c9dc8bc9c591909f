"""Keep a server up: notice that its child ended, start it again with growing pauses, and give up after too many deaths.

The child replays the store's adapters before it opens its port, so whoever waits for `/health` finds everything there.
"""

import sys
import threading
import time
from collections import deque

from serve.server import Server
from train.errors import UserError

WINDOW_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
POLL_S = 0.2


def supervise(server: Server, stop: threading.Event) -> int:
    """Watch a started server until `stop` is set; return how often it was restarted.

    Raises UserError with the last reason when it died more than `restarts` times within ten minutes.
    """
    deaths_s: deque[float] = deque()
    n_restarts = 0
    while not stop.wait(POLL_S):
        reason = server.died()
        if reason is None:
            continue
        now_s = time.monotonic()
        deaths_s.append(now_s)
        while now_s - deaths_s[0] > WINDOW_S:
            deaths_s.popleft()
        if len(deaths_s) > server.config.restarts:
            raise UserError(f"the server died {len(deaths_s)} times in {WINDOW_S / 60:.0f} min; last: {reason}")
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (len(deaths_s) - 1))
        print(f"the server died: {reason}; starting it again in {pause_s:.0f} s", file=sys.stderr, flush=True)
        # The engine's processes may outlive the one we saw end.
        server.kill()
        if stop.wait(pause_s):
            break
        try:
            server.start()
            n_restarts += 1
        except UserError as error:
            print(f"it did not come up: {error}", file=sys.stderr, flush=True)
    return n_restarts
