"""The findings as text: a table per adapter beside the base for the terminal, and report.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.judge.rubric import HOLD_FOR_NOISE, RUBRIC
from eval.metrics import METRICS, PRIMARY
from eval.summary import DIVERSITY_WORDS

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
    blocks += [f"! {warning}" for warning in summary["warnings"]]
    return "\n\n".join(blocks)


def markdown(summary: Mapping[str, Any]) -> str:
    """The same findings, every metric's weakness, and how they were made."""
    arms = summary["arms"]
    base = next((name for name, arm in arms.items() if arm["kind"] == "base"), None)
    parts = [
        f"# Evaluation of {summary['run']}",
        f"{summary['questions']} held-out questions, {summary['samples_per_question']} answer(s) each, "
        f"{summary['references']} reference answers. Values carry 95 % intervals over questions.",
    ]
    if summary["warnings"]:
        parts.append(
            "## Before you believe a number\n\n" + "\n".join(f"- {warning}" for warning in summary["warnings"])
        )
    for name, arm in arms.items():
        if arm["kind"] == "adapter" and base is not None:
            parts.append(f"## {name} beside {base}\n\n" + _pipes(_beside(summary, base, name)))
    parts.append("## Every arm\n\n" + _pipes(_all_arms(summary)))
    counted = ("rows", "errors", "empty", "cut", "retries", "tokens")
    counts = [["arm", "answers", "errors", "empty", "cut by length", "retries", "tokens", "distinct-2 of all answers"]]
    for name, arm in arms.items():
        numbers = ["" if arm["kind"] == "yardstick" else str(arm[key]) for key in counted]
        counts.append([name, *numbers, "" if arm["diversity"] is None else f"{arm['diversity']:.3f}"])
    parts.append(
        "## What was counted\n\nErrors and empty answers are never scored. distinct-2 of all answers: distinct word "
        f"pairs in an arm's first {DIVERSITY_WORDS} words; one reply for everyone makes it small.\n\n" + _pipes(counts)
    )
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


def judged_terminal(judged: Mapping[str, Any]) -> str:
    """What a person reads when a judging ends."""
    return "\n\n".join([judged_lead(judged), *(f"! {warning}" for warning in judged["warnings"]),
                        *(table(rows) for rows in judged_tables(judged))])  # fmt: skip


def judged_markdown(judged: Mapping[str, Any]) -> str:
    """The section that a judging adds to report.md."""
    parts = [
        f"## Judged by {judged['judge']}",
        judged_lead(judged),
        "\n".join(f"- {warning}" for warning in judged["warnings"]),
        *(_pipes(rows) for rows in judged_tables(judged)),
        "Criteria:\n\n" + "\n".join(f"- **{name}**: {statement}" for name, statement in RUBRIC.items()),
    ]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def judged_tables(judged: Mapping[str, Any]) -> list[list[list[str]]]:
    """The preference and the rubric as tables of text, and the agreement with people where there are labels."""
    (first, second), found, criteria = judged["arms"], judged["preference"], judged["rubric"]
    preference = [
        [f"{second} against {first}", "", "questions"],
        *(
            [title, with_interval(found[key], 3), str(found[key]["n"]) if found[key] else ""]
            for title, key in (
                ("win rate (tie: one half)", "win_rate"),
                ("same verdict in both orders", "consistency"),
                ("verdicts for the answer shown first (no bias: 0.5)", "first_chosen"),
                ("decided pairs won by the longer answer", "longer_wins"),
                (f"pairs in which {second} is longer", "second_longer"),
            )
        ),
    ]
    changes = {row["criterion"]: row for row in criteria["differences"]}
    rubric = [["criterion", first, second, "difference", "p", "validated"]]
    for name in RUBRIC:
        change = changes.get(name)
        rubric.append(
            [
                f"{name} †" if name in HOLD_FOR_NOISE else name,
                *(with_interval(criteria["arms"][arm][name], 3) for arm in (first, second)),
                with_interval(change, 3, sign="+"),
                p_text(change) if change else "",
                _validated(judged, name),
            ]
        )
    agreement = [
        ["judge and people", "answers", "questions", "equal", "kappa", "alpha", "alpha of people", "validated"]
    ]
    for name, each in judged["agreement"].items():
        numbers = [f"{each[key]:.2f}" if each[key] is not None else "" for key in ("raw", "kappa", "human_alpha")]
        agreement.append(
            [
                name,
                str(each["n"]),
                str(each.get("questions", "")),
                *numbers[:2],
                with_interval(each["alpha"], 2),
                numbers[2],
                _validated(judged, name),
            ]
        )
    return [preference, rubric, *([agreement] if len(agreement) > 1 else [])]


def judged_lead(judged: Mapping[str, Any]) -> str:
    """Who won, in a few sentences, and how it was judged."""
    (first, second), found, counts = judged["arms"], judged["preference"], judged["counts"]
    p = "" if found["p"] is None else f" (p {'<0.001' if found['p'] < 0.001 else format(found['p'], '.3f')})"
    return (
        f"{judged['judge']} ({_validated(judged, 'preference')} on preference): {second} against {first} wins "
        f"{found['wins']}, ties {found['ties']}, loses {found['losses']} of {found['judged']} pairs{p}. Each pair is "
        f"judged in both orders; verdicts that differ are a tie. {counts['asked']} judgements, {counts['failed']} "
        f"failed, {counts['unreadable']} unreadable. † holds for text without sense too: read it beside coherent."
    )


def _validated(judged: Mapping[str, Any], name: str) -> str:
    return "validated" if judged["agreement"].get(name, {}).get("validated") else "not validated"


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
