"""The table a run ends with: one line per model, times in milliseconds."""

from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = ("model", "n", "errors", "TTFT p50", "p90", "TPOT p50", "p90", "e2e p50", "p90", "tokens/s", "requests/s")


def table(summary: Mapping[str, Any]) -> str:
    """The per-model table of a summary, the whole run last; a dash where there is no value."""
    lines = [_HEAD]
    for name, found in [*summary["models"].items(), ("all", summary["all"])]:
        cells = [name, str(found["n"]), str(found["errors"])]
        for latency in ("ttft_s", "tpot_s", "e2e_s"):
            cells += [_ms(found[latency]["p50"]), _ms(found[latency]["p90"])]
        lines.append((*cells, _plain(found["tokens_per_s"]), _plain(found["requests_per_s"])))
    return f"{aligned(lines)}\ntimes in ms, from sending; n counts every request due after the warm-up"


def verdict_text(summary: Mapping[str, Any]) -> str:
    """The objectives one by one, then the verdict and, when the run is invalid, why."""
    lines = []
    if summary["slo"]:
        cells = [("objective", "over", "n", "value", "")]
        cells += [
            (
                f"{item['metric']} {item['sign']} {item['bound']:g}", item["scope"], str(item["n"]),
                "-" if item["value"] is None else f"{item['value']:.4g}", "held" if item["held"] else "MISSED",
            )
            for item in summary["slo"]
        ]  # fmt: skip
        lines.append(aligned(cells))
    lines += [f"not to be believed: {reason}" for reason in summary["invalid"]]
    return "\n".join([*lines, f"verdict: {summary['verdict']}"])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
