"""The time that rates are counted in: from when the server is filled to when arrivals end.

A run has two edges. At its start the server is being filled: requests arrive, and none can have come back yet. At its
end nothing arrives any more, and what is still running drains away. Neither says what the server can do, and one
straggler may stretch the second to any length. So a rate counts the replies that ended within a window, whenever they
were due, over the window's own length. `fast` and `slow`, the 10th and 90th percentile of how long after being due a
reply was whole, move it:

  it begins   when the warm-up is over, and `fast` later; and not before `slow`, when what came first is back
  it ends     when arrivals end, and `fast` later

Replies that all take equally long give exactly the rate at which they were due, with a warm-up or without. A server
that is asked for more than it can do gives what it can do: there, the window begins at the middle at the latest. In a
closed loop the clients fill the server at once, and the window is from the first sending to the last reply, at most
`slow` after the last sending.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from loadtest.records import Row

# Far below the distance of two arrivals, far above what is lost by adding up times.
_CLOCK_S = 1e-6


class Window(NamedTuple):
    """Seconds after the start of the run."""

    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s

    def ended(self, rows: Iterable[Row]) -> list[Row]:
        """The whole replies whose last token came in the window."""
        first_s, last_s = self.begin_s - _CLOCK_S, self.end_s + _CLOCK_S
        return [row for row in rows if row.ok and row.last_s is not None and first_s <= row.last_s <= last_s]


def open_window(rows: Sequence[Row], begin_s: float, end_s: float, filled_from_s: float = 0.0) -> Window:
    """The window of arrivals that were due from `begin_s` to `end_s`, at a rate that holds since `filled_from_s`.

    `rows`: all of the run. The turns of a conversation count from its first, which is what arrived.
    """
    arrived: dict[int, float] = {}
    for row in rows:
        arrived[row.id] = min(row.due_s, arrived.get(row.id, row.due_s))
    took_s = [
        row.last_s - arrived[row.id]
        for row in rows
        if row.ok and row.last_s is not None and begin_s - _CLOCK_S <= arrived[row.id] < end_s
    ]
    if not took_s:
        return Window(begin_s, end_s)
    fast_s, slow_s = (float(value) for value in np.percentile(took_s, (10, 90)))
    # Where not all came back, nobody watched for longer than the last outcome.
    watched_s = max((row.end_s for row in rows if row.end_s is not None), default=end_s)
    if any(row.outcome == "unfinished" for row in rows):
        fast_s = min(fast_s, max(watched_s - end_s, 0.0))
    middle_s = (begin_s + end_s) / 2
    return Window(min(max(begin_s + fast_s, filled_from_s + slow_s), middle_s + fast_s), end_s + fast_s)


def closed_window(rows: Sequence[Row]) -> Window:
    """The window of a closed loop: while its clients were busy. `rows`: those that are measured."""
    sent = [row.sent_s for row in rows if row.sent_s is not None]
    replies = [row for row in rows if row.ok and row.last_s is not None and row.sent_s is not None]
    if not sent or not replies:
        return Window(0.0, 0.0)
    slow_s = float(np.percentile([(row.last_s or 0.0) - (row.sent_s or 0.0) for row in replies], 90))
    return Window(min(sent), min(max(row.last_s or 0.0 for row in replies), max(sent) + slow_s))


def arrivals_end_s(due_s: Sequence[float], duration_s: float, *, limited: bool, trace: bool) -> float:
    """When arrivals end: the schedule's end, or for a plan that was cut off by a number, one gap after its last.

    `due_s`: ascending. `limited`: the plan holds fewer arrivals than the schedule. A trace begins with an arrival, so
    its gaps are one fewer than its arrivals; other arrivals begin half a gap in, on average.
    """
    if not due_s or not (limited or trace):
        return duration_s
    n = len(due_s)
    if trace:
        return min(duration_s, due_s[-1] + (due_s[-1] - due_s[0]) / (n - 1)) if n > 1 else duration_s
    return min(duration_s, due_s[-1] * n / (n - 0.5))
