"""One clock for all processes of a run: when it began, on the monotonic clock of each.

Processes begin at different moments, and other machines count their monotonic time from elsewhere. So each worker asks
the leader for its time, a few times, and believes the quickest answer: the leader read its clock somewhere within that
round trip, so the middle of it is wrong by half of it at most (Cristian 1989). Then it says when the run begins.
"""

import time
from collections.abc import Callable

_QUESTIONS = 8


class Clock:
    """What a process knows of the leader's clock."""

    def __init__(self) -> None:
        self._round_trip_s = float("inf")
        self._ahead_s = 0.0
        self._left = _QUESTIONS

    @property
    def error_s(self) -> float:
        """How far `here` may be wrong."""
        return self._round_trip_s / 2

    def ask(self, send: Callable[[float], None]) -> bool:
        """Ask the leader for its time through `send`, unless it was asked often enough; whether it was asked."""
        if not self._left:
            return False
        self._left -= 1
        send(time.monotonic())
        return True

    def answer(self, asked_s: float, leader_s: float) -> None:
        """Take the leader's answer to the question that was asked at `asked_s` here."""
        now_s = time.monotonic()
        if now_s - asked_s < self._round_trip_s:
            self._round_trip_s = now_s - asked_s
            self._ahead_s = leader_s - (asked_s + now_s) / 2

    def here(self, leader_s: float) -> float:
        """A moment of the leader's clock on the one of this process."""
        return leader_s - self._ahead_s
