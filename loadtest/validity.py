"""Whether a run is valid: what the client observed about itself, checked against bounds. An invalid run never passes.

A load test measures the server only if the client does its own part: it sends on time, reads at once, and has a
processor to do so. Otherwise the metrics describe the client. The bounds on delay are relative to what is measured,
because 20 ms of lag spoil a TTFT of 50 ms and do not matter for one of 2 s. Tails are checked as far out as the
objectives look: p95, or p99 if an objective is about a p99.

  requests          requests that count: at least 20, and enough for each percentile that has an objective. Failed
                    requests count: a server that answers nothing misses its objectives, and the run is valid
  sent_share        planned arrivals that were sent within a second of the end of the schedule, or dropped at the
                    in-flight limit, which happens when a server does not answer: at least 0.98
  completed_share   closed loop: share of the requested number of requests that was sent, or else of the time that the
                    loop ran: at least 0.98
  schedule_lag_s    tail of the delay from due to sent (open loop): at most 10 ms, or 10 % of the median TTFT
  clock_error_s     how far the clocks of two processes may differ: at most the same
  hub_lag_p50_s     median delay of a wake-up, in the process where it is longest: the typical error of a timestamp. At
                    most 1 ms, or 5 % of the median TTFT
  hub_lag_s         tail over seconds of the longest delay of a wake-up, in that process: the error of a timestamp in
                    the tail. At most 10 ms, or 10 % of the TTFT in the tail
  client_cpu        95th percentile over seconds of the busiest process: at most 0.9 of a core
  workers           processes that observed themselves until the end: all
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loadtest.metrics import measured, percentile
from loadtest.records import RequestRecord
from loadtest.results import Results
from loadtest.slo import ObjectiveResult, min_requests, parse_objective, percent_of

_MIN_REQUESTS = 20
_SLOW_CLIENT = "lower the rate, add --workers, or test from another machine"
# What a failed check means and what to do, by the first word of its name.
_ADVICE = {
    "requests": "too few to judge; run longer",
    "sent_share": f"the plan was not sent in time; let the run end by itself, or {_SLOW_CLIENT}",
    "completed_share": "the run stopped early; let it end by itself",
    "schedule_lag_s": f"the client sent late; {_SLOW_CLIENT}",
    "clock_error_s": "the workers' clocks could not be matched; use machines that are closer or less busy",
    "hub_lag_p50_s": f"the client read late; {_SLOW_CLIENT}",
    "hub_lag_s": f"the client read late; {_SLOW_CLIENT}",
    "client_cpu": f"the client ran out of processor; {_SLOW_CLIENT}",
    "workers": "a worker was lost; see locust.log",
}


class Check(NamedTuple):
    """One property of the client: its value, the bound (upper or lower), and whether it is within the bound."""

    name: str
    value: float
    sign: str
    bound: float
    held: bool

    def explain(self) -> str:
        """Why this check makes a run invalid, in one line."""
        advice = _ADVICE[self.name.split()[0]]
        return f"{self.name} is {self.value:.3g}, must be {self.sign} {self.bound:.3g}: {advice}"


def check_client(results: Results, ttft_s: Mapping[str, float | None]) -> list[Check]:
    """Check the client's requests and its observations of itself (client.jsonl) against the bounds above.

    `ttft_s` holds the percentiles of the run (`p50`, ...), None if there was no reply.
    """
    scenario = results.scenario
    counted = measured(results.records, scenario.warmup_s)
    seconds = [second for second in results.client_seconds if second["t_s"] >= scenario.warmup_s]
    tail = max([95, *(percent_of(parse_objective(text).metric) for text in scenario.slo)])
    median_s, tail_s = ttft_s["p50"] or 0.0, ttft_s[f"p{tail}"] or 0.0
    max_lag_s = max(0.01, 0.1 * median_s)
    checks = [_at_least("requests", len(counted), _MIN_REQUESTS)]
    if scenario.closed:
        checks.append(_at_least("completed_share", _completed_share(results), 0.98))
    else:
        lags = [lag for record in counted if (lag := record.lag_s) is not None]
        checks.append(_at_least("sent_share", _sent_share(results), 0.98))
        checks.append(_at_most("schedule_lag_s", percentile(lags, tail) or 0.0, max_lag_s))
    clock_error_s = max((second.get("clock_error_s", 0.0) for second in results.client_seconds), default=0.0)
    checks.append(_at_most("clock_error_s", clock_error_s, max_lag_s))
    checks.append(_at_most("hub_lag_p50_s", _worst(seconds, "hub_lag_p50_s", 50), max(0.001, 0.05 * median_s)))
    checks.append(_at_most("hub_lag_s", _worst(seconds, "hub_lag_s", tail), max(0.01, 0.1 * tail_s)))
    checks.append(_at_most("client_cpu", _worst(seconds, "cpu", 95), 0.9))
    checks.append(_at_least("workers", len(_workers_at_end(results)), scenario.workers))
    return checks


def check_objectives(judged: Sequence[ObjectiveResult]) -> list[Check]:
    """A failed check for each objective that has too few requests."""
    return [
        _at_least(f"requests to {item.scope} for {item.metric}", item.n, min_requests(item.metric))
        for item in judged
        if item.n < min_requests(item.metric)
    ]


def _sent_share(results: Results) -> float:
    """The share of the plan that was sent, or dropped at the in-flight limit, in time."""
    planned, latest_s = len(results.plan), results.scenario.duration_s + 1
    # Only ids of the plan: a source that repeats a share does not make up for one that is missing.
    first_turns = (record for record in results.records if record.turn == 0 and record.id < planned)
    return len({record.id for record in first_turns if _handled_s(record) <= latest_s}) / planned


def _handled_s(record: RequestRecord) -> float:
    """When the client had done its part of a request: sent it, or dropped it."""
    at_s = record.end_s if record.outcome == "dropped" else record.sent_s
    return math.inf if at_s is None else at_s


def _completed_share(results: Results) -> float:
    scenario, records = results.scenario, results.records
    if scenario.requests is not None:
        return len({record.id for record in records if record.sent_s is not None}) / scenario.requests
    ends_s = [*(second["t_s"] for second in results.client_seconds), *(record.end_s or 0.0 for record in records)]
    return min(1.0, max(ends_s, default=0.0) / scenario.duration_s)


def _worst(seconds: Sequence[Mapping[str, Any]], key: str, percent: float) -> float:
    """The percentile over the seconds of each process, from the process where it is highest; 0 without seconds."""
    by_worker: dict[int, list[float]] = {}
    for second in seconds:
        by_worker.setdefault(second["worker"], []).append(second.get(key, 0.0))
    return max((percentile(values, percent) or 0.0 for values in by_worker.values()), default=0.0)


def _workers_at_end(results: Results) -> set[int]:
    """Processes that were alive near the end, by their seconds; by their requests in runs too short for those."""
    last_s = max((record.due_s for record in results.records), default=0.0)
    observed = {second["worker"] for second in results.client_seconds if second["t_s"] >= last_s - 3}
    return observed | {record.worker for record in results.records if (record.end_s or 0.0) >= last_s - 3}


def _at_most(name: str, value: float, bound: float) -> Check:
    return Check(name, value, "<=", bound, value <= bound)


def _at_least(name: str, value: float, bound: float) -> Check:
    return Check(name, value, ">=", bound, value >= bound)
