"""Figures from rows: pure functions, so that a report can be made again from the files at any time.

Every figure is over the rows that were due after the warm-up. Latencies are over whole replies (outcome ok); failures
are counted, never timed. A percentile of few rows is still shown, with its n beside it.
"""

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
    high = min(low + 1, len(ordered) - 1)
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
