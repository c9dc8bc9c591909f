"""The findings as text: a table per adapter beside the base for the terminal, and report.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.metrics import METRICS, PRIMARY

_ARROWS = {"higher": "↑", "lower": "↓", "": " "}


def terminal(summary: Mapping[str, Any]) -> str:
    """What a person reads when an evaluation ends."""
    blocks = [
        f"{summary['questions']} held-out questions of {summary['run']}, values with 95 % intervals over questions"
    ]
    arms = summary["arms"]
    base = next((name for name, arm in arms.items() if arm["kind"] == "base"), None)
    for name, arm in arms.items():
        if arm["kind"] == "adapter" and base is not None:
            blocks.append(table(_beside(summary, base, name)))
    blocks.append(table(_all_arms(summary)))
    if any(row["p_holm"] is not None for row in summary["differences"]):
        blocks.append(
            "p: paired permutation test, Holm-corrected over the primary metrics (" + ", ".join(PRIMARY) + ").\n"
            "↑ ↓ say which way is better. human: one counsellor against the others; shuffled, echo, canned: floors."
        )
    blocks += [f"! {alarm}" for alarm in summary["alarms"]]
    return "\n\n".join(blocks)


def markdown(summary: Mapping[str, Any]) -> str:
    """The same findings, every metric's weakness, and how they were made."""
    arms = summary["arms"]
    base = next((name for name, arm in arms.items() if arm["kind"] == "base"), None)
    parts = [
        f"# Evaluation of {summary['run']}",
        f"{summary['questions']} held-out questions, {summary['samples_per_question']} answer(s) each, "
        f"{summary['references']} reference answers. Values carry 95 % BCa bootstrap intervals over questions.",
    ]
    if summary["alarms"]:
        parts.append("## Before you believe a number\n\n" + "\n".join(f"- {alarm}" for alarm in summary["alarms"]))
    for name, arm in arms.items():
        if arm["kind"] == "adapter" and base is not None:
            parts.append(f"## {name} beside {base}\n\n" + _pipes(_beside(summary, base, name)))
    parts.append("## Every arm\n\n" + _pipes(_all_arms(summary)))
    counts = [["arm", "answers", "errors", "empty", "cut by length", "retries", "tokens"]]
    counts += [
        [name, *(str(arm[key]) for key in ("rows", "errors", "empty", "cut", "retries", "tokens"))]
        for name, arm in arms.items()
        if arm["kind"] != "yardstick"
    ]
    parts.append("## What was counted\n\nErrors and empty answers are never scored.\n\n" + _pipes(counts))
    parts.append(
        "## What each metric cannot say\n\n"
        + "\n".join(f"- **{metric.title}** {_ARROWS[metric.better]}: {metric.note}." for metric in METRICS.values())
    )
    parts.append(
        "p values come from a paired permutation test over questions; those of the primary metrics "
        f"({', '.join(METRICS[name].title for name in PRIMARY)}) are Holm-corrected together. "
        "No expert rated these answers."
    )
    return "\n\n".join(parts) + "\n"


def _beside(summary: Mapping[str, Any], base: str, adapter: str) -> list[list[str]]:
    rows = [["", base, adapter, "difference", "p", "human"]]
    changes = {row["metric"]: row for row in summary["differences"] if (row["arm"], row["against"]) == (adapter, base)}
    for name, metric in METRICS.items():
        if name not in changes:
            continue
        change = changes[name]
        human = summary["arms"].get("human", {}).get("metrics", {}).get(name)
        rows.append(
            [
                f"{metric.title} {_ARROWS[metric.better]}",
                with_interval(summary["arms"][base]["metrics"].get(name), metric.digits),
                with_interval(summary["arms"][adapter]["metrics"].get(name), metric.digits),
                with_interval(change, metric.digits, sign="+"),
                p_text(change),
                f"{human['value']:.{metric.digits}f}" if human else "",
            ]
        )
    return rows


def _all_arms(summary: Mapping[str, Any]) -> list[list[str]]:
    columns = [*PRIMARY, "question_similarity", "words"]
    rows = [["arm", *(f"{METRICS[name].title} {_ARROWS[METRICS[name].better]}".strip() for name in columns)]]
    for name, arm in summary["arms"].items():
        cells = [arm["metrics"].get(column) for column in columns]
        rows.append(
            [name, *(f"{c['value']:.{METRICS[m].digits}f}" if c else "" for m, c in zip(columns, cells, strict=True))]
        )
    return rows


def with_interval(cell: Mapping[str, Any] | None, digits: int, sign: str = "") -> str:
    """`0.652 [0.641, 0.663]`; without the brackets where there is no interval; empty where there is no value."""
    if cell is None:
        return ""
    value = f"{cell['value']:{sign}.{digits}f}"
    return (
        value if cell["low"] is None else f"{value} [{cell['low']:{sign}.{digits}f}, {cell['high']:{sign}.{digits}f}]"
    )


def p_text(change: Mapping[str, Any]) -> str:
    """The corrected p of a primary metric with a star below 0.05; the plain p in brackets of any other."""
    p = change["p"] if change["p_holm"] is None else change["p_holm"]
    if p is None:
        return ""
    shown = "<0.001" if p < 0.001 else f"{p:.3f}"
    return f"({shown})" if change["p_holm"] is None else f"{shown}{'*' if p < 0.05 else ''}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns, the first row as heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _pipes(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
