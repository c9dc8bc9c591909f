"""The tables a run ends with, as cells that the terminal and the report share; times in milliseconds."""

from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = ("model", "n", "errors", "TTFT p50", "p90", "TPOT p50", "p90", "e2e p50", "p90", "tokens/s", "requests/s")


def table(summary: Mapping[str, Any]) -> str:
    """The per-model table of a summary, for a terminal."""
    begin_s, end_s = summary["window"]["begin_s"], summary["window"]["end_s"]
    return (
        f"{aligned(model_cells(summary))}\ntimes in ms, from sending; n counts every request due after the warm-up; "
        f"rates count what ended from {begin_s:.1f} s to {end_s:.1f} s"
    )


def model_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line per model, the whole run last; a dash where there is no value."""
    lines: list[tuple[str, ...]] = [_HEAD]
    for name, found in [*summary["models"].items(), ("all", summary["all"])]:
        cells = [name, str(found["n"]), str(found["errors"])]
        for latency in ("ttft_s", "tpot_s", "e2e_s"):
            cells += [_ms(found[latency]["p50"]), _ms(found[latency]["p90"])]
        lines.append((*cells, _plain(found["tokens_per_s"]), _plain(found["requests_per_s"])))
    return lines


def objective_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line per objective that was judged."""
    lines: list[tuple[str, ...]] = [("objective", "over", "n", "value", "")]
    for item in summary["slo"]:
        text = f"{item['metric']} {item['sign']} {item['bound']:g}"
        value = "-" if item["value"] is None else f"{item['value']:.4g}"
        lines.append((text, item["scope"], str(item["n"]), value, "held" if item["held"] else "MISSED"))
    return lines


def verdict_text(summary: Mapping[str, Any]) -> str:
    """The objectives one by one, then the verdict and, when the run is invalid, why."""
    lines = [aligned(objective_cells(summary))] if summary["slo"] else []
    if not summary["all"]["ok"]:
        lines.append("no request got a whole reply")
    lines += [f"not to be believed: {reason}" for reason in summary["invalid"]]
    return "\n".join([*lines, f"verdict: {summary['verdict']}"])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
