"""The tables that end a run, as cells that the terminal and the report share; times in milliseconds."""

from collections.abc import Mapping
from typing import Any

from counsel.report.tables import text_table

_HEAD = ("model", "n", "errors", "TTFT p50", "p90", "TPOT p50", "p90", "e2e p50", "p90", "tokens/s", "requests/s")


def result_table(summary: Mapping[str, Any]) -> str:
    """The per-model table of a summary, for a terminal."""
    begin_s, end_s = summary["window"]["begin_s"], summary["window"]["end_s"]
    return (
        f"{text_table(model_cells(summary), 1)}\n"
        "Times in ms, from sending. n: every request due after the warm-up.\n"
        f"Rates count the replies that ended between {begin_s:.1f} s and {end_s:.1f} s. A model's tokens/s and "
        "requests/s\nfollow its share of the requests: compare models by TTFT and TPOT."
    )


def model_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line per model, the whole run last; a dash where there is no value."""
    lines: list[tuple[str, ...]] = [_HEAD]
    for name, figures in [*summary["models"].items(), ("all", summary["all"])]:
        cells = [name, str(figures["n"]), str(figures["errors"])]
        for latency in ("ttft_s", "tpot_s", "e2e_s"):
            cells += [milliseconds(figures[latency]["p50"]), milliseconds(figures[latency]["p90"])]
        lines.append((*cells, _plain(figures["tokens_per_s"]), _plain(figures["requests_per_s"])))
    return lines


def objective_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line per objective."""
    lines: list[tuple[str, ...]] = [("objective", "over", "n", "value", "")]
    for item in summary["slo"]:
        text = f"{item['metric']} {item['sign']} {item['bound']:g}"
        value = "-" if item["value"] is None else f"{item['value']:.4g}"
        lines.append((text, item["scope"], str(item["n"]), value, "met" if item["held"] else "MISSED"))
    return lines


def verdict_text(summary: Mapping[str, Any]) -> str:
    """The objectives one by one, then the verdict and, when the run is invalid, why."""
    lines = [text_table(objective_cells(summary), 1)] if summary["slo"] else []
    if not summary["all"]["ok"]:
        lines.append("no request got a complete reply")
    lines += [f"invalid: {reason}" for reason in summary["invalid"]]
    return "\n".join([*lines, f"verdict: {summary['verdict']}"])


def milliseconds(seconds: float | None) -> str:
    """Whole milliseconds from 100 ms up, one decimal below; a dash for None."""
    return "-" if seconds is None else f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
