"""Figures from rows: pure functions, so that a report can be made again from the files at any time.

Latencies and shares are over the rows that were due after the warm-up, and whose client was to stay: one that is to
hang up sees the quick replies whole and the slow ones not at all, so its times would make any server fast. Latencies
are over whole replies (outcome ok); failures are counted, never timed. Rates are over the replies that ended within a
window of time (see loadtest/window.py). A percentile of few rows is still shown, with its n beside it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loadtest.records import FAILED, Row
from loadtest.window import Window, open_window

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


def figures(rows: Sequence[Row], ended: Sequence[Row], window_s: float, good: Callable[[Row], bool]) -> dict[str, Any]:
    """All figures of some measured `rows`; rates are of the replies that `ended` within `window_s` seconds.

    `good`: what counts as goodput. `stayed`: the rows whose client was to stay, of which shares and latencies are.
    """
    ok = [row for row in rows if row.ok]
    stayed = [row for row in rows if row.stays]
    timed = [row for row in stayed if row.ok]
    failed = sum(row.outcome in FAILED for row in stayed)

    def per_s(amount: float) -> float | None:
        return amount / window_s if window_s > 0 else None

    found: dict[str, Any] = {
        "n": len(rows),
        "ok": len(ok),
        "stayed": len(stayed),
        "errors": sum(row.outcome in FAILED for row in rows),
        "error_rate": failed / len(stayed) if stayed else None,
        "outcomes": dict(Counter(row.outcome for row in rows)),
        "goodput_share": sum(map(good, stayed)) / len(stayed) if stayed else None,
        "goodput_per_s": per_s(sum(map(good, ended))),
        "requests_per_s": per_s(len(ended)),
        "tokens_per_s": per_s(sum(row.completion_tokens or 0 for row in ended)),
        "prompt_tokens": sum(row.prompt_tokens or 0 for row in ok),
        "completion_tokens": sum(row.completion_tokens or 0 for row in ok),
    }
    for name, of in LATENCIES.items():
        found[name] = spread([value for row in timed if (value := of(row)) is not None])
    found["itl_s"] = spread([gap for row in timed for gap in row.gaps_s])
    found["lag_s"] = spread([lag for row in rows if (lag := row.lag_s) is not None])
    return found


def cold_penalty(rows: Sequence[Row], base: str | None, warmup_s: float) -> dict[str, Any]:
    """TTFT of adapter requests that were cold (the first to name theirs, or tagged so) and of the warm ones.

    `rows`: all of the run. One of the warm-up loads its adapter, and is in no figure.
    """
    seen: set[str] = set()
    ttft_s: dict[str, list[float]] = {"cold": [], "warm": []}
    for row in sorted(rows, key=lambda row: row.due_s):
        if row.model == base or row.sent_s is None:
            continue
        kind = "cold" if row.model not in seen or "cold" in row.tags else "warm"
        seen.add(row.model)
        if row.ok and row.stays and row.due_s >= warmup_s and row.ttft_s is not None:
            ttft_s[kind].append(row.ttft_s)
    return {kind: spread(values) for kind, values in ttft_s.items()}


def step_points(
    rows: Sequence[Row], edges_s: Sequence[float], warmup_s: float, good: Callable[[Row], bool]
) -> list[dict[str, Any]]:
    """One point of the curves per plateau of a stepped rate: the rows that were due in it (see charts.curves).

    `rows`: all of the run. What was due in the warm-up is in no point, and a plateau within it has none.
    """
    points = []
    for edge_s, end_s in itertools.pairwise(edges_s):
        begin_s = max(edge_s, warmup_s)
        if begin_s >= end_s:
            continue
        due = [row for row in rows if begin_s <= row.due_s < end_s]
        window = open_window(rows, begin_s, end_s, filled_from_s=edge_s)
        found = figures(due, window.ended(rows), window.length_s, good)
        points.append(curve_point(len(due) / (end_s - begin_s), found))
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


def summarise(
    rows: Sequence[Row], asked: Iterable[str], warmup_s: float, window: Window, good: Callable[[Row], bool]
) -> dict[str, Any]:
    """Figures of all measured rows together and of each model that was `asked`, models in order of their name.

    A model without rows has figures too: zeros and None.
    """
    counted, ended = measured(rows, warmup_s), window.ended(rows)

    def of(model: str) -> dict[str, Any]:
        own, whole = ([row for row in some if row.model == model] for some in (counted, ended))
        return figures(own, whole, window.length_s, good)

    return {
        "window": window._asdict(),
        "all": figures(counted, ended, window.length_s, good),
        "models": {model: of(model) for model in sorted({*asked, *(row.model for row in rows)})},
    }


def rounded(document: Any) -> Any:
    """The same document with floats cut to six significant digits, which is more than any of them knows."""
    if isinstance(document, dict):
        return {key: rounded(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [rounded(value) for value in document]
    return float(f"{document:.6g}") if isinstance(document, float) else document
