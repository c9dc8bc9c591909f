"""Whether a run may be believed: what the client saw of itself, against bounds. A run that fails here never passes.

A load test measures the server only as far as the client keeps its own promises: to send on time, to read at once, to
have a processor to do so. When it does not, the figures describe the client. The bounds on delay are relative to what
is measured, because 20 ms of lag spoil a TTFT of 50 ms and mean nothing to one of 2 s. The tail is watched as far out
as objectives look: p95, or p99 where one is of that.

  sent_share        planned arrivals that were sent, or dropped at the in-flight cap, which is where a server that does
                    not answer leads, within a second of the end of the schedule: at least 0.98
  played_share      closed loop: of the requests asked for, or else of the time, what was played: at least 0.98
  schedule_lag_s    tail of sending after being due (open loop): at most 10 ms, or 10 % of the median TTFT
  clock_error_s     how far the clocks of two processes may be apart: at most that
  hub_lag_p50_s     median wake-up after its time, of the process with the latest: how wrong a usual time may be. At
                    most 1 ms, or 5 % of the median TTFT
  hub_lag_s         tail over seconds of the latest wake-up, of that process: how wrong a time in the tail may be. At
                    most 10 ms, or 10 % of the TTFT there
  client_cpu        95th percentile over seconds of the busiest process: at most 0.9 of a core
  workers           processes that watched themselves to the end: all
  rows              requests judged: at least 20, and enough for each percentile that has an objective. Failed ones
                    count: a server that answers nothing misses its objectives, and the run is valid
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loadtest.metrics import measured, percentile
from loadtest.records import Row
from loadtest.results import Results
from loadtest.scenario import Scenario
from loadtest.slo import Judged, parse_objective, percent_of, rows_needed

_ROWS = 20


class Check(NamedTuple):
    """One property of the client: its value, the bound (most, or least) it must keep, and whether it does."""

    name: str
    value: float
    sign: str
    bound: float
    held: bool


def check_client(results: Results, ttft_s: Mapping[str, float | None]) -> list[Check]:
    """Hold the client's rows and its seconds (client.jsonl) against the bounds above.

    `ttft_s`: its percentiles in the run (`p50`, ...), None when nothing came back.
    """
    scenario, planned = results.scenario, len(results.plan)
    rows, seconds = results.rows, results.client_seconds
    counted = measured(rows, scenario.warmup_s)
    watched = [second for second in seconds if second["t_s"] >= scenario.warmup_s]
    tail = max([95, *(percent_of(parse_objective(text).metric) for text in scenario.slo)])
    median_s, tail_s = ttft_s["p50"] or 0.0, ttft_s[f"p{tail}"] or 0.0
    late_s = max(0.01, 0.1 * median_s)
    checks = [_least("rows", len(counted), _ROWS)]
    if not scenario.closed:
        latest_s = scenario.duration_s + 1
        # Of the plan itself: a source too many, which repeats a share, does not stand in for one that is missing.
        in_time = {row.id for row in rows if row.turn == 0 and row.id < planned and _left_s(row) <= latest_s}
        lags = [lag for row in counted if (lag := row.lag_s) is not None]
        checks.append(_least("sent_share", len(in_time) / planned, 0.98))
        checks.append(_most("schedule_lag_s", percentile(lags, tail) or 0.0, late_s))
    else:
        checks.append(_least("played_share", _played_share(scenario, rows, seconds), 0.98))
    clock_s = max((second.get("clock_error_s", 0.0) for second in seconds), default=0.0)
    checks.append(_most("clock_error_s", clock_s, late_s))
    checks.append(_most("hub_lag_p50_s", _worst(watched, "hub_lag_p50_s", 50), max(0.001, 0.05 * median_s)))
    checks.append(_most("hub_lag_s", _worst(watched, "hub_lag_s", tail), max(0.01, 0.1 * tail_s)))
    checks.append(_most("client_cpu", _worst(watched, "cpu", 95), 0.9))
    checks.append(_least("workers", len(_steadfast(rows, seconds)), scenario.workers))
    return checks


def check_rows(judged: Sequence[Judged]) -> list[Check]:
    """For each objective that was judged: whether enough requests were made for it."""
    return [
        _least(f"requests to {item.scope} for {item.metric}", item.n, rows_needed(item.metric))
        for item in judged
        if item.n < rows_needed(item.metric)
    ]


def _left_s(row: Row) -> float:
    """When the client had done its part of a row: sent it, or dropped it at the cap."""
    at_s = row.end_s if row.outcome == "dropped" else row.sent_s
    return math.inf if at_s is None else at_s


def _worst(seconds: Sequence[Mapping[str, Any]], key: str, percent: float) -> float:
    """The percentile over the seconds of each process, of the process where it is highest; 0 of none."""
    by_worker: dict[int, list[float]] = {}
    for second in seconds:
        by_worker.setdefault(second["worker"], []).append(second.get(key, 0.0))
    return max((percentile(values, percent) or 0.0 for values in by_worker.values()), default=0.0)


def _played_share(scenario: Scenario, rows: Sequence[Row], seconds: Sequence[Mapping[str, Any]]) -> float:
    if scenario.requests is not None:
        return len({row.id for row in rows if row.sent_s is not None}) / scenario.requests
    last_s = max([*(second["t_s"] for second in seconds), *(row.end_s or 0.0 for row in rows)], default=0.0)
    return min(1.0, last_s / scenario.duration_s)


def _steadfast(rows: Sequence[Row], seconds: Sequence[Mapping[str, Any]]) -> set[int]:
    """Processes that were there near the end: by their seconds, or in runs too short for those by their rows."""
    last_s = max((row.due_s for row in rows), default=0.0)
    alive = {second["worker"] for second in seconds if second["t_s"] >= last_s - 3}
    return alive | {row.worker for row in rows if (row.end_s or 0.0) >= last_s - 3}


def _most(name: str, value: float, bound: float) -> Check:
    return Check(name, value, "<=", bound, value <= bound)


def _least(name: str, value: float, bound: float) -> Check:
    return Check(name, value, ">=", bound, value >= bound)
