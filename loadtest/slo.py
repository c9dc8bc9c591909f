"""Objectives (SLOs), such as `ttft_p90_s <= 2` or `gentle: error_rate <= 0.01`, and whether a run met them.

    METRIC <= NUMBER            over all requests (or >=)
    MODEL: METRIC <= NUMBER     over the requests to one model
    *: METRIC <= NUMBER         over the requests to each model separately

METRIC is a latency percentile (`ttft_p90_s`; see LATENCIES in loadtest/metrics.py), `error_rate`, `goodput_share`,
`goodput_per_s`, `tokens_per_s` or `requests_per_s`. Goodput counts the requests that got a complete reply within every
limit of `goodput_slo`: `ttft_s <= 1`, `tpot_s <= 0.05`, `e2e_s <= 10`.

A percentile is over every request whose client stays to the end, and a failed request counts as slower than any bound.
So `ttft_p90_s <= 2` means that nine in ten requests had their first token within 2 s, not nine in ten of the answered
ones; otherwise a server that rejects half of its requests could meet any objective. `itl` is over gaps: a failed
request counts as many gaps as a complete reply has on average. Without any complete reply, no objective is met.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from counsel.errors import UserError
from counsel.values import nearest
from loadtest.metrics import LATENCIES, PERCENTILES, percentile
from loadtest.records import FAILED, RequestRecord

_OBJECTIVE = re.compile(r"(?:\s*(?P<scope>\S+)\s*:)?\s*(?P<metric>[a-z0-9_]+)\s*(?P<sign><=|>=)\s*(?P<bound>\S+)\s*")
_PERCENTILE = re.compile(r"(?P<latency>[a-z0-9_]+)_p(?P<percent>\d+)_s")
_SHARES = ("error_rate", "goodput_share")
_METRICS = (
    *(f"{name[:-2]}_p{percent}_s" for name in (*LATENCIES, "itl_s") for percent in PERCENTILES),
    *_SHARES,
    *("goodput_per_s", "tokens_per_s", "requests_per_s"),
)


class Objective(NamedTuple):
    """One service-level objective. Scope "" means all requests, "*" each model."""

    scope: str
    metric: str
    sign: str
    bound: float


class ObjectiveResult(NamedTuple):
    """An objective and its value over the `n` requests of `scope` (None: beyond every bound, or no data).

    For a percentile, n counts the complete replies that have the latency, and the failed requests."""

    scope: str
    metric: str
    sign: str
    bound: float
    value: float | None
    n: int
    held: bool


def parse_objective(text: str) -> Objective:
    """Read one objective; raises UserError that names the nearest metric."""
    match = _OBJECTIVE.fullmatch(text)
    if match is None:
        raise UserError(f"slo is {text!r}; the form is [MODEL:] METRIC <= NUMBER, such as 'ttft_p90_s <= 2'")
    if match["metric"] not in _METRICS:
        raise UserError(f"slo {text!r}: unknown metric {match['metric']!r}; {nearest(match['metric'], _METRICS)}")
    bound = _bound("slo", text, match["bound"])
    if match["metric"] in _SHARES and not 0 <= bound <= 1:
        raise UserError(f"slo {text!r}: {match['metric']} is a share from 0 to 1, not percent; write {bound / 100:g}?")
    return Objective(match["scope"] or "", match["metric"], match["sign"], bound)


def parse_limit(text: str) -> Objective:
    """Read one limit of goodput_slo: a latency of LATENCIES and its upper bound."""
    match = _OBJECTIVE.fullmatch(text)
    if match is None or match["scope"] or match["sign"] != "<=" or match["metric"] not in LATENCIES:
        raise UserError(
            f"goodput_slo is {text!r}; the form is LATENCY <= SECONDS, with LATENCY one of {', '.join(LATENCIES)}"
        )
    return Objective("", match["metric"], "<=", _bound("goodput_slo", text, match["bound"]))


def within_limits(record: RequestRecord, limits: Sequence[Objective]) -> bool:
    """Whether a request got a complete reply within every limit.

    If it has no value for a latency, a reply of one token is within the limit. A longer reply is not: its tokens came
    all at once, which shows nothing.
    """
    if not record.ok:
        return False
    values = ((LATENCIES[limit.metric](record), limit.bound) for limit in limits)
    return all(value <= bound if value is not None else record.completion_tokens == 1 for value, bound in values)


def judge_objectives(
    objectives: Sequence[Objective], summary: Mapping[str, Any], records: Sequence[RequestRecord]
) -> list[ObjectiveResult]:
    """Judge each objective by the measured `records` of a run and the metrics made from them (metrics.summarize)."""
    results = []
    for objective in objectives:
        scopes = list(summary["models"]) if objective.scope == "*" else [objective.scope]
        for scope in scopes:
            metrics = summary["all"] if scope == "" else summary["models"].get(scope)
            own = [record for record in records if scope in ("", record.model)]
            value, n = _value_of(objective.metric, metrics, own) if metrics else (None, 0)
            held = (
                value is not None
                and metrics is not None
                and metrics["ok"] > 0
                and (value <= objective.bound if objective.sign == "<=" else value >= objective.bound)
            )
            results.append(ObjectiveResult(scope or "all", *objective[1:], value, n, held))
    return results


def _value_of(metric: str, metrics: Mapping[str, Any], records: Sequence[RequestRecord]) -> tuple[float | None, int]:
    """The value of a metric over `records`, whose metrics are `metrics`, and over how many requests it is.

    The value is None if it is beyond every bound, or if there is no data.
    """
    match = _PERCENTILE.fullmatch(metric)
    if not match:
        return metrics[metric], metrics["stayed"] if metric in _SHARES else len(records)
    stayed = [record for record in records if record.stays]
    failed = sum(record.outcome in FAILED for record in stayed)
    name = f"{match['latency']}_s"
    if name in LATENCIES:
        values = [value for record in stayed if record.ok and (value := LATENCIES[name](record)) is not None]
        n, beyond = len(values) + failed, failed
    else:
        complete = [record for record in stayed if record.ok and record.gaps_s]
        values = [gap for record in complete for gap in record.gaps_s]
        n, beyond = len(complete) + failed, round(failed * len(values) / len(complete)) if complete else failed
    percent = int(match["percent"])
    value = percentile([*values, *[math.inf] * beyond], percent)
    if value is not None and not math.isfinite(value):
        # There is nothing to interpolate between the last complete reply and the first failure. If nine in ten
        # requests are complete, the slowest of them is the p90.
        rank = -(-(len(values) + beyond) * percent // 100)
        value = sorted(values)[rank - 1] if rank <= len(values) else None
    return value, n


def min_requests(metric: str) -> int:
    """The fewest requests that support a metric: a percentile needs two requests beyond it, other metrics need 20."""
    percent = percent_of(metric)
    return math.ceil(200 / (100 - percent)) if percent else 20


def percent_of(metric: str) -> int:
    """Which percentile a metric is; 0 if it is not a percentile."""
    match = _PERCENTILE.fullmatch(metric)
    return int(match["percent"]) if match else 0


def _bound(option: str, text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{option} {text!r}: {number!r} is not a number; write one, such as 0.5")
    return value
