"""report.html: the whole run on one page, made from the files of the results directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counsel.files import write_text
from counsel.report import page, section
from loadtest.charts import curves, latencies, timeline
from loadtest.results import Results
from loadtest.scenario import Scenario
from loadtest.table import milliseconds, model_cells, objective_cells


def write_report(results: Results, summary: Mapping[str, Any]) -> Path:
    """Write the page of one run; return its path."""
    scenario = results.scenario
    sections = [
        *([section("Objectives", objective_cells(summary))] if summary["slo"] else []),
        section("Latency per model", latencies(summary["models"]), note="Bar: median. Line: 90th percentile."),
        section("Models", model_cells(summary), note=_MODELS_NOTE),
        section("Timeline", timeline(results.records, results.server_samples, scenario.warmup_s)),
        *_curve(summary.get("steps", [])),
        *_cold(summary["cold"]),
        section("Delay from being due", _due_cells(summary), note=_DUE_NOTE),
        section("Outcomes", [("outcome", "n"), *_pairs(summary["all"]["outcomes"])]),
        section("How it was measured", _check_cells(summary), note=_load(scenario)),
        section("Options", [("option", "value"), *_pairs(scenario.to_json())], folded=True),
        section("Server metrics", [("metric", "value"), *_pairs(summary["server"])], folded=True),
        section("Models and versions", [("key", "value"), *_pairs(results.target)], folded=True),
    ]
    path = results.directory / "report.html"
    doubts = [f"Invalid: {reason}." for reason in summary["invalid"]]
    text = page("Load test", sections, finding=load_test_finding(summary), verdict=summary["verdict"], warnings=doubts)
    write_text(path, text)
    return path


_MODELS_NOTE = (
    "Times are in ms from sending, over complete replies whose client did not plan to hang up. n: requests due after "
    "the warm-up. Rates count the replies that ended while the load was steady. A model's tokens/s and requests/s "
    "follow its share of the requests: compare models by TTFT and TPOT."
)
_DUE_NOTE = (
    "A user who wanted to ask when the request was due waited from that moment. The server only answers for the time "
    "from sending. The difference is the client's own delay."
)


def load_test_finding(summary: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    total, slo = summary["all"], summary["slo"]
    missed = [f"{item['metric']} {item['sign']} {item['bound']:g}" for item in slo if not item["held"]]
    answered = f"{total['n']} request{'' if total['n'] == 1 else 's'}, {total['errors']} failed"
    if total["ttft_s"]["p50"] is not None:
        p50, p90 = (milliseconds(total["ttft_s"][key]) for key in ("p50", "p90"))
        answered += f"; the first token took {p50} ms (median) and {p90} ms (90th percentile)"
    if summary["verdict"] == "invalid":
        return f"This run measured its client as well as the server, so do not use its numbers: {answered}."
    if not total["ok"]:
        return f"The server completed no request: {answered}."
    if not slo:
        return f"No objectives were set: {answered}."
    if missed:
        return f"The server missed {len(missed)} of {len(slo)} objectives ({', '.join(missed)}): {answered}."
    return f"The server met {'its objective' if len(slo) == 1 else f'all {len(slo)} objectives'}: {answered}."


def _load(scenario: Scenario) -> str:
    load = f"{scenario.concurrency} clients in a closed loop" if scenario.closed else f"{scenario.arrivals} arrivals"
    rate = "" if scenario.closed or scenario.trace else f" at {scenario.rate} requests/s"
    return (
        f"Load: {load}{rate} for {scenario.duration_s:g} s, mix {scenario.mix}, sent to {scenario.url}. If a check in "
        "the table fails, the run measured the client and not only the server."
    )


def _pairs(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each key with its value as text; nested mappings are written out."""
    pairs = []
    for key, value in document.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
        elif isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        pairs.append((str(key), _plain(value)))
    return pairs


def _plain(value: Any) -> str:
    return "-" if value in ("", None) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("check of the client", "value", "must be", "")]
    for check in summary["checks"]:
        bound = f"{check['sign']} {check['bound']:.4g}"
        lines.append((check["name"], f"{check['value']:.4g}", bound, "passed" if check["held"] else "FAILED"))
    return lines


def _due_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("ms", "p50", "p90", "p95", "p99")]
    names = {"ttft_s": "TTFT from sending", "ttft_due_s": "TTFT from being due",
             "e2e_s": "complete reply from sending", "e2e_due_s": "complete reply from being due",
             "lag_s": "sending after being due"}  # fmt: skip
    for key, name in names.items():
        spread = summary["all"][key]
        values = (spread[percentile] for percentile in ("p50", "p90", "p95", "p99"))
        lines.append((name, *("-" if value is None else f"{1000 * value:.1f}" for value in values)))
    return lines


def _cold(cold: Mapping[str, Any]) -> list[str]:
    """TTFT of requests that are the first to name their adapter, or the first in a long while, against the others."""
    if not cold["cold"]["n"] or not cold["warm"]["n"]:
        return []
    lines = [("adapter requests", "n", "TTFT p50 (ms)", "TTFT p90 (ms)")]
    for name, label in (("cold", "first for its adapter, or sent to the coldest"), ("warm", "all others")):
        spread = cold[name]
        lines.append((label, str(spread["n"]), f"{1000 * spread['p50']:.1f}", f"{1000 * spread['p90']:.1f}"))
    return [section("Cold adapters", lines)]


def _curve(points: Sequence[Mapping[str, Any]]) -> list[str]:
    return [section("By offered rate", curves(points))] if len(points) > 1 else []
