"""Objectives and whether a run held them: `ttft_p90_s <= 2`, `gentle: error_rate <= 0.01`, `*: tpot_p50_s <= 0.05`.

    METRIC <= NUMBER            over all requests (or >=)
    MODEL: METRIC <= NUMBER     over one model's
    *: METRIC <= NUMBER         over each model's on its own

METRIC is a latency percentile (`ttft_p90_s`; latencies in loadtest/metrics.py), `error_rate`, `goodput_share`,
`goodput_per_s`, `tokens_per_s` or `requests_per_s`. Goodput counts the requests that came back whole within every
limit of `good`: `ttft_s <= 1`, `tpot_s <= 0.05`, `e2e_s <= 10`.

A percentile is judged over every request whose client was to stay, and one that failed is slower than any bound:
`ttft_p90_s <= 2` says that nine in ten had their first token within 2 s, not nine in ten of those that were answered.
Else a server that turns half of its requests away would hold any objective. `itl` is over gaps: a failed request counts
as many as a whole reply has on average. Where no reply was whole, nothing is held.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from counsel.cli import nearest
from counsel.errors import UserError
from loadtest.metrics import LATENCIES, PERCENTILES, percentile
from loadtest.records import FAILED, Row

_OBJECTIVE = re.compile(r"(?:\s*(?P<scope>\S+)\s*:)?\s*(?P<metric>[a-z0-9_]+)\s*(?P<sign><=|>=)\s*(?P<bound>\S+)\s*")
_PERCENTILE = re.compile(r"(?P<latency>[a-z0-9_]+)_p(?P<percent>\d+)_s")
SHARES = ("error_rate", "goodput_share")
RATES = ("goodput_per_s", "tokens_per_s", "requests_per_s")
METRICS = (*(f"{name[:-2]}_p{percent}_s" for name in (*LATENCIES, "itl_s") for percent in PERCENTILES), *SHARES, *RATES)


class Objective(NamedTuple):
    """One line of the service-level objectives; scope "" is all requests, "*" each model."""

    scope: str
    metric: str
    sign: str
    bound: float


class Judged(NamedTuple):
    """An objective held against a run: over `scope`, where `n` requests gave `value` (None: too few came back).

    For a percentile, n counts the whole replies that have the latency, and those that failed."""

    scope: str
    metric: str
    sign: str
    bound: float
    value: float | None
    n: int
    held: bool


def parse_objective(text: str) -> Objective:
    """Read one objective; raises UserError with the nearest metric."""
    match = _OBJECTIVE.fullmatch(text)
    if match is None:
        raise UserError(f"slo {text!r} cannot be read; the form is [MODEL:] METRIC <= NUMBER")
    if match["metric"] not in METRICS:
        raise UserError(f"slo {text!r}: no metric {match['metric']!r}; {nearest(match['metric'], METRICS)}")
    bound = _bound(text, match["bound"])
    if match["metric"] in SHARES and not 0 <= bound <= 1:
        raise UserError(f"slo {text!r}: {match['metric']} is a share from 0 to 1, not percent; write {bound / 100:g}?")
    return Objective(match["scope"] or "", match["metric"], match["sign"], bound)


def parse_limit(text: str) -> Objective:
    """Read one limit of what counts as a good request: a latency of LATENCIES and its most."""
    match = _OBJECTIVE.fullmatch(text)
    if match is None or match["scope"] or match["sign"] != "<=" or match["metric"] not in LATENCIES:
        raise UserError(
            f"good {text!r} cannot be read; the form is LATENCY <= SECONDS, LATENCY of {', '.join(LATENCIES)}"
        )
    return Objective("", match["metric"], "<=", _bound(text, match["bound"]))


def is_good(row: Row, limits: Sequence[Objective]) -> bool:
    """Whether a request came back whole and within every limit.

    A latency that it does not have is held by a reply of one token; one whose tokens all came at once shows none.
    """
    if not row.ok:
        return False
    values = ((LATENCIES[limit.metric](row), limit.bound) for limit in limits)
    return all(value <= bound if value is not None else row.completion_tokens == 1 for value, bound in values)


def judge(objectives: Sequence[Objective], summary: Mapping[str, Any], rows: Sequence[Row]) -> list[Judged]:
    """Hold each objective against the measured rows of a run and the figures made of them (figures.summarise)."""
    judged = []
    for objective in objectives:
        scopes = list(summary["models"]) if objective.scope == "*" else [objective.scope]
        for scope in scopes:
            found = summary["all"] if scope == "" else summary["models"].get(scope)
            own = [row for row in rows if scope in ("", row.model)]
            value, n = _value_of(objective.metric, found, own) if found else (None, 0)
            held = (
                value is not None
                and found is not None
                and found["ok"] > 0
                and (value <= objective.bound if objective.sign == "<=" else value >= objective.bound)
            )
            judged.append(Judged(scope or "all", *objective[1:], value, n, held))
    return judged


def _value_of(metric: str, found: Mapping[str, Any], rows: Sequence[Row]) -> tuple[float | None, int]:
    """The value of a metric over some rows, whose figures are `found`, and how many rows it comes from.

    The value is None where it is beyond every bound, or of nothing.
    """
    match = _PERCENTILE.fullmatch(metric)
    if not match:
        return found[metric], found["stayed"] if metric in SHARES else len(rows)
    stayed = [row for row in rows if row.stays]
    failed = sum(row.outcome in FAILED for row in stayed)
    name = f"{match['latency']}_s"
    if name in LATENCIES:
        values = [value for row in stayed if row.ok and (value := LATENCIES[name](row)) is not None]
        n, beyond = len(values) + failed, failed
    else:
        whole = [row for row in stayed if row.ok and row.gaps_s]
        values = [gap for row in whole for gap in row.gaps_s]
        n, beyond = len(whole) + failed, round(failed * len(values) / len(whole)) if whole else failed
    percent = int(match["percent"])
    value = percentile([*values, *[math.inf] * beyond], percent)
    if value is not None and not math.isfinite(value):
        # Between the last whole reply and the first failure there is nothing to interpolate: where nine in ten of all
        # are whole, the slowest of those is the p90.
        rank = -(-(len(values) + beyond) * percent // 100)
        value = sorted(values)[rank - 1] if rank <= len(values) else None
    return value, n


def rows_needed(metric: str) -> int:
    """The fewest requests that carry a metric: a percentile needs two beyond it; a rate needs 20."""
    percent = percent_of(metric)
    return math.ceil(200 / (100 - percent)) if percent else 20


def percent_of(metric: str) -> int:
    """Which percentile a metric is; 0 for what is none."""
    match = _PERCENTILE.fullmatch(metric)
    return int(match["percent"]) if match else 0


def _bound(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{text!r}: {number!r} is not a number")
    return value
