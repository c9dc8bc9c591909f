"""One clock for all processes of a run: its start, on the monotonic clock of each.

Processes start at different moments, and monotonic clocks of other machines have another origin. So each worker asks
the leader for its time a few times, and uses the quickest answer: the leader read its clock at some point within that
round trip, so the middle of it is wrong by at most half of it (Cristian 1989). Then the leader announces the start.
"""

import time
from collections.abc import Callable

_QUESTIONS = 8


class Clock:
    """The leader's clock, as this process knows it."""

    def __init__(self) -> None:
        self._round_trip_s = float("inf")
        self._ahead_s = 0.0
        self._left = _QUESTIONS

    @property
    def error_s(self) -> float:
        """The largest possible error of `here`."""
        return self._round_trip_s / 2

    def ask(self, send: Callable[[float], None]) -> bool:
        """Ask the leader for its time through `send`, unless that was done often enough; whether it was asked."""
        if not self._left:
            return False
        self._left -= 1
        send(time.monotonic())
        return True

    def answer(self, asked_s: float, leader_s: float) -> None:
        """Take the leader's answer to the question sent at `asked_s` on the clock of this process."""
        now_s = time.monotonic()
        if now_s - asked_s < self._round_trip_s:
            self._round_trip_s = now_s - asked_s
            self._ahead_s = leader_s - (asked_s + now_s) / 2

    def here(self, leader_s: float) -> float:
        """A time on the leader's clock, converted to the clock of this process."""
        return leader_s - self._ahead_s
