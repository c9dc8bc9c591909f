"""Figures from rows: pure functions, so that a report can be made again from the files at any time.

Every figure is over the rows that were due after the warm-up. Latencies are over whole replies (outcome ok); failures
are counted, never timed. A percentile of few rows is still shown, with its n beside it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loadtest.rows import FAILED, Row

PERCENTILES = (50, 90, 95, 99)
LATENCIES: dict[str, Callable[[Row], float | None]] = {
    "ttft_s": lambda row: row.ttft_s,
    "ttft_due_s": lambda row: row.ttft_due_s,
    "ttfc_s": lambda row: row.ttfc_s,
    "tpot_s": lambda row: row.tpot_s,
    "e2e_s": lambda row: row.e2e_s,
    "e2e_due_s": lambda row: row.e2e_due_s,
}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value at `percent`, interpolated between ranks as numpy does; None of nothing.

    percentile([1, 2, 3, 4], 50) is 2.5.
    """
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = math.ceil(place)
    if low == high:
        return ordered[low]
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def measured(rows: Iterable[Row], warmup_s: float) -> list[Row]:
    """The rows that count: due after the warm-up."""
    return [row for row in rows if row.due_s >= warmup_s]


def figures(rows: Sequence[Row], window_s: float, good: Callable[[Row], bool]) -> dict[str, Any]:
    """All figures of some rows; `window_s` is the time they took together (see `window`), `good` what counts
    as goodput; clients that hung up are left out of its share."""
    ok = [row for row in rows if row.ok]
    outcomes = Counter(row.outcome for row in rows)
    failed = sum(outcomes[outcome] for outcome in FAILED)
    good_n = sum(good(row) for row in rows)
    stayed = len(rows) - outcomes["cancelled"]
    tokens = sum(row.completion_tokens or 0 for row in ok)
    found: dict[str, Any] = {
        "n": len(rows),
        "ok": len(ok),
        "errors": failed,
        "error_rate": failed / len(rows) if rows else None,
        "outcomes": dict(outcomes),
        "goodput_share": good_n / stayed if stayed else None,
        "goodput_per_s": good_n / window_s if window_s > 0 else None,
        "requests_per_s": len(ok) / window_s if window_s > 0 else None,
        "tokens_per_s": tokens / window_s if window_s > 0 else None,
        "prompt_tokens": sum(row.prompt_tokens or 0 for row in ok),
        "completion_tokens": tokens,
    }
    for name, of in LATENCIES.items():
        found[name] = spread([value for row in ok if (value := of(row)) is not None])
    found["itl_s"] = spread([gap for row in ok for gap in row.gaps_s])
    found["lag_s"] = spread([lag for row in rows if (lag := row.lag_s) is not None])
    return found


def cold_penalty(rows: Sequence[Row], base: str | None) -> dict[str, Any]:
    """TTFT of adapter requests that were cold (the first to name theirs, or tagged so) and of the warm ones."""
    seen: set[str] = set()
    ttft_s: dict[str, list[float]] = {"cold": [], "warm": []}
    for row in sorted(rows, key=lambda row: row.due_s):
        if row.model == base or row.sent_s is None:
            continue
        kind = "cold" if row.model not in seen or "cold" in row.tags else "warm"
        seen.add(row.model)
        if row.ok and row.ttft_s is not None:
            ttft_s[kind].append(row.ttft_s)
    return {kind: spread(values) for kind, values in ttft_s.items()}


def step_points(rows: Sequence[Row], edges_s: Sequence[float], good: Callable[[Row], bool]) -> list[dict[str, Any]]:
    """One point of the curves per plateau of a stepped rate: the rows that were due in it (see charts.curves)."""
    points = []
    for begin_s, end_s in itertools.pairwise(edges_s):
        due = [row for row in rows if begin_s <= row.due_s < end_s]
        ends_s = [row.end_s for row in due if row.ok and row.end_s is not None]
        # A server that keeps up ends them about when the plateau ends; one that does not drags on, and its rate falls.
        window_s = max([end_s - begin_s, *(at_s - begin_s for at_s in ends_s)])
        points.append(curve_point(len(due) / (end_s - begin_s), figures(due, window_s, good)))
    return points


def curve_point(offered: float, found: dict[str, Any]) -> dict[str, Any]:
    """What the curves draw of the figures at one offered rate (requests/s)."""
    return {
        "offered": offered,
        "achieved": found["requests_per_s"],
        "ttft_p50_s": found["ttft_s"]["p50"],
        "ttft_p90_s": found["ttft_s"]["p90"],
        "tpot_p50_s": found["tpot_s"]["p50"],
        "tokens_per_s": found["tokens_per_s"],
        "goodput_share": found["goodput_share"],
        "n": found["n"],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """n, mean and percentiles; None where there is nothing."""
    mean = sum(values) / len(values) if values else None
    return {"n": len(values), "mean": mean, **{f"p{percent}": percentile(values, percent) for percent in PERCENTILES}}


def window(rows: Sequence[Row]) -> float:
    """Seconds from the first sending to the last end among `rows`: what rates are divided by."""
    sent = [row.sent_s for row in rows if row.sent_s is not None]
    ends = [row.end_s for row in rows if row.end_s is not None and row.sent_s is not None]
    return max(ends) - min(sent) if sent and ends else 0.0


def summarise(rows: Sequence[Row], warmup_s: float, good: Callable[[Row], bool]) -> dict[str, Any]:
    """Figures of all measured rows together and of each model, models in order of their name."""
    counted = measured(rows, warmup_s)
    window_s = window(counted)
    models = sorted({row.model for row in counted})
    return {
        "window_s": window_s,
        "all": figures(counted, window_s, good),
        "models": {model: figures([row for row in counted if row.model == model], window_s, good) for model in models},
    }


def rounded(document: Any) -> Any:
    """The same document with floats cut to six significant digits, which is more than any of them knows."""
    if isinstance(document, dict):
        return {key: rounded(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [rounded(value) for value in document]
    return float(f"{document:.6g}") if isinstance(document, float) else document
