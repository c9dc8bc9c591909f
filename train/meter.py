"""Shows on stderr how far a long job over data is. A job of a few seconds shows nothing."""

import sys
import time

FIRST_AFTER_S = 3.0
EVERY_S = 10.0
EVERY_ON_A_TERMINAL_S = 0.5


class Meter:
    """One job with a known amount of work, such as `reading talks.jsonl`, 2,048 MB.

    total: the amount of work, in `unit`. scale: what is counted, per unit (1e6 to count bytes and show MB).
    """

    def __init__(self, job: str, total: float, unit: str, scale: float = 1.0) -> None:
        self.job = job
        self.unit = unit
        self.scale = scale
        self.total = total
        self._shown = False
        self._next_s = time.monotonic() + FIRST_AFTER_S

    def at(self, done: float) -> None:
        """Report that `done` of the total is done."""
        now = time.monotonic()
        if now < self._next_s:
            return
        terminal = sys.stderr.isatty()
        self._next_s = now + (EVERY_ON_A_TERMINAL_S if terminal else EVERY_S)
        self._shown = True
        line = f"{self.job:<24} {done / self.scale:,.0f} of {self.total / self.scale:,.0f} {self.unit}"
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def done(self) -> None:
        """End the line on a terminal."""
        if self._shown and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
