"""The time window over which rates are counted: from when the server is filled until arrivals end.

A run has two edges. At its start the server fills up: requests arrive, and none can have been answered yet. At its end
nothing arrives any more, and running requests drain. Neither shows what the server can do, and one straggler can make
the drain arbitrarily long. So a rate counts the replies that ended within a window, whenever they were due, and divides
by the length of that window. `fast` and `slow` are the 10th and 90th percentile of the time from due to complete:

  the window begins   `fast` after the warm-up, but not before `slow`, when the first replies are back
  the window ends     `fast` after arrivals end

If all replies take equally long, the result is exactly the rate at which they were due, with or without a warm-up. If
more is asked of a server than it can do, the result is what it can do; then the window begins in the middle at the
latest. In a closed loop the clients fill the server at once, and the window is from the first request to the last
reply, but at most `slow` after the last request.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from loadtest.records import RequestRecord

# Far less than the gap between two arrivals, far more than the rounding error of summed times.
_CLOCK_S = 1e-6


class Window(NamedTuple):
    """Seconds after the start of the run."""

    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s

    def ended(self, records: Iterable[RequestRecord]) -> list[RequestRecord]:
        """The complete replies whose last token came in the window."""
        first_s, last_s = self.begin_s - _CLOCK_S, self.end_s + _CLOCK_S
        return [each for each in records if each.ok and each.last_s is not None and first_s <= each.last_s <= last_s]


def open_window(records: Sequence[RequestRecord], begin_s: float, end_s: float, filled_from_s: float = 0.0) -> Window:
    """The window for arrivals due from `begin_s` to `end_s`, at a rate that began at `filled_from_s`.

    `records` are those of the whole run. A later turn counts from its conversation's first turn, which is the arrival.
    """
    arrived: dict[int, float] = {}
    for record in records:
        arrived[record.id] = min(record.due_s, arrived.get(record.id, record.due_s))
    took_s = [
        record.last_s - arrived[record.id]
        for record in records
        if record.ok and record.last_s is not None and begin_s - _CLOCK_S <= arrived[record.id] < end_s
    ]
    if not took_s:
        return Window(begin_s, end_s)
    fast_s, slow_s = (float(value) for value in np.percentile(took_s, (10, 90)))
    # If some requests were cut off, nothing was observed after the last outcome.
    observed_s = max((record.end_s for record in records if record.end_s is not None), default=end_s)
    if any(record.outcome == "unfinished" for record in records):
        fast_s = min(fast_s, max(observed_s - end_s, 0.0))
    middle_s = (begin_s + end_s) / 2
    return Window(min(max(begin_s + fast_s, filled_from_s + slow_s), middle_s + fast_s), end_s + fast_s)


def closed_window(records: Sequence[RequestRecord]) -> Window:
    """The window of a closed loop: while its clients were busy. `records` are the measured ones."""
    sent = [record.sent_s for record in records if record.sent_s is not None]
    replies = [record for record in records if record.ok and record.last_s is not None and record.sent_s is not None]
    if not sent or not replies:
        return Window(0.0, 0.0)
    slow_s = float(np.percentile([(record.last_s or 0.0) - (record.sent_s or 0.0) for record in replies], 90))
    return Window(min(sent), min(max(record.last_s or 0.0 for record in replies), max(sent) + slow_s))


def arrivals_end_s(due_s: Sequence[float], duration_s: float, *, limited: bool, trace: bool) -> float:
    """When arrivals end: at the end of the schedule, or one gap after the last arrival if their number is limited.

    `due_s` is ascending. `limited`: the plan has fewer arrivals than the schedule. A trace starts with an arrival, so
    it has one gap fewer than arrivals; otherwise the first arrival is half a gap in, on average.
    """
    if not due_s or not (limited or trace):
        return duration_s
    n = len(due_s)
    if trace:
        return min(duration_s, due_s[-1] + (due_s[-1] - due_s[0]) / (n - 1)) if n > 1 else duration_s
    return min(duration_s, due_s[-1] * n / (n - 0.5))
