"""Metrics from request records: pure functions, so that a report can be made from the files at any time.

Latencies and shares are over the requests that were due after the warm-up and whose client stays to the end. A client
that is planned to hang up gets only the quick replies complete, so its latencies would make any server look fast.
Latencies are over complete replies (outcome ok); failures are counted, never timed. Rates are over the replies that
ended within a time window (see loadtest/window.py). A percentile of few requests is still shown, next to its n.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loadtest.records import FAILED, RequestRecord
from loadtest.window import Window, open_window

PERCENTILES = (50, 90, 95, 99)
LATENCIES: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft_s": lambda record: record.ttft_s,
    "ttft_due_s": lambda record: record.ttft_due_s,
    "ttfc_s": lambda record: record.ttfc_s,
    "tpot_s": lambda record: record.tpot_s,
    "e2e_s": lambda record: record.e2e_s,
    "e2e_due_s": lambda record: record.e2e_due_s,
}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value at `percent`, interpolated between ranks as in numpy; None without values.

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


def measured(records: Iterable[RequestRecord], warmup_s: float) -> list[RequestRecord]:
    """The requests that count: those due after the warm-up."""
    return [record for record in records if record.due_s >= warmup_s]


def compute_metrics(
    records: Sequence[RequestRecord],
    ended: Sequence[RequestRecord],
    window_s: float,
    good: Callable[[RequestRecord], bool],
) -> dict[str, Any]:
    """All metrics of some measured `records`. Rates are over the replies that `ended` within `window_s` seconds.

    `good` tests which requests count as goodput. In the result, `stayed` counts the requests whose client stays to the
    end; shares and latencies are over these.
    """
    ok = [record for record in records if record.ok]
    stayed = [record for record in records if record.stays]
    timed = [record for record in stayed if record.ok]
    failed = sum(record.outcome in FAILED for record in stayed)

    def per_s(amount: float) -> float | None:
        return amount / window_s if window_s > 0 else None

    metrics: dict[str, Any] = {
        "n": len(records),
        "ok": len(ok),
        "stayed": len(stayed),
        "errors": sum(record.outcome in FAILED for record in records),
        "error_rate": failed / len(stayed) if stayed else None,
        "outcomes": dict(Counter(record.outcome for record in records)),
        "goodput_share": sum(map(good, stayed)) / len(stayed) if stayed else None,
        "goodput_per_s": per_s(sum(map(good, ended))),
        "requests_per_s": per_s(len(ended)),
        "tokens_per_s": per_s(sum(record.completion_tokens or 0 for record in ended)),
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in ok),
        "completion_tokens": sum(record.completion_tokens or 0 for record in ok),
    }
    for name, latency in LATENCIES.items():
        metrics[name] = describe([value for record in timed if (value := latency(record)) is not None])
    metrics["itl_s"] = describe([gap for record in timed for gap in record.gaps_s])
    metrics["lag_s"] = describe([lag for record in records if (lag := record.lag_s) is not None])
    return metrics


def cold_penalty(records: Sequence[RequestRecord], base: str | None, warmup_s: float) -> dict[str, Any]:
    """TTFT of cold adapter requests (the first for their adapter, or tagged `cold`) and of warm ones.

    `records` are those of the whole run: a request in the warm-up loads its adapter, but is not counted.
    """
    loaded: set[str] = set()
    ttft_s: dict[str, list[float]] = {"cold": [], "warm": []}
    for record in sorted(records, key=lambda record: record.due_s):
        if record.model == base or record.sent_s is None:
            continue
        kind = "cold" if record.model not in loaded or "cold" in record.tags else "warm"
        loaded.add(record.model)
        if record.ok and record.stays and record.due_s >= warmup_s and record.ttft_s is not None:
            ttft_s[kind].append(record.ttft_s)
    return {kind: describe(values) for kind, values in ttft_s.items()}


def step_points(
    records: Sequence[RequestRecord],
    edges_s: Sequence[float],
    warmup_s: float,
    good: Callable[[RequestRecord], bool],
) -> list[dict[str, Any]]:
    """One point of the curves (see charts.curves) per step of a stepped rate, from the requests due in that step.

    `records` are those of the whole run. Requests due in the warm-up are left out, and so are steps within it.
    """
    points = []
    for edge_s, end_s in itertools.pairwise(edges_s):
        begin_s = max(edge_s, warmup_s)
        if begin_s >= end_s:
            continue
        due = [record for record in records if begin_s <= record.due_s < end_s]
        window = open_window(records, begin_s, end_s, filled_from_s=edge_s)
        metrics = compute_metrics(due, window.ended(records), window.length_s, good)
        points.append(curve_point(len(due) / (end_s - begin_s), metrics))
    return points


def curve_point(offered: float, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that the curves show at one offered rate (requests/s)."""
    return {
        "offered": offered,
        "achieved": metrics["requests_per_s"],
        "ttft_p50_s": metrics["ttft_s"]["p50"],
        "ttft_p90_s": metrics["ttft_s"]["p90"],
        "tpot_p50_s": metrics["tpot_s"]["p50"],
        "tokens_per_s": metrics["tokens_per_s"],
        "goodput_share": metrics["goodput_share"],
        "n": metrics["n"],
    }


def describe(values: Sequence[float]) -> dict[str, Any]:
    """n, mean and percentiles; mean and percentiles are None without values."""
    mean = sum(values) / len(values) if values else None
    return {"n": len(values), "mean": mean, **{f"p{percent}": percentile(values, percent) for percent in PERCENTILES}}


def summarize(
    records: Sequence[RequestRecord],
    models: Iterable[str],
    warmup_s: float,
    window: Window,
    good: Callable[[RequestRecord], bool],
) -> dict[str, Any]:
    """Metrics of all measured requests together, and of each model in order of its name.

    `models` are the models of the run. One without requests has metrics too: zeros and None.
    """
    counted, ended = measured(records, warmup_s), window.ended(records)

    def of_model(model: str) -> dict[str, Any]:
        own, own_ended = ([record for record in some if record.model == model] for some in (counted, ended))
        return compute_metrics(own, own_ended, window.length_s, good)

    return {
        "window": window._asdict(),
        "all": compute_metrics(counted, ended, window.length_s, good),
        "models": {model: of_model(model) for model in sorted({*models, *(record.model for record in records)})},
    }


def rounded(document: Any) -> Any:
    """The same document with floats rounded to six significant digits, more than any of them is accurate to."""
    if isinstance(document, dict):
        return {key: rounded(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [rounded(value) for value in document]
    return float(f"{document:.6g}") if isinstance(document, float) else document
