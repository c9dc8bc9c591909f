"""Compare arms of different evaluations (other runs, seeds or adapters) on the questions that all of them share.

python -m eval compare seed-1,seed-2,seed-3
python -m eval compare gentle:gentle,gentle:smollm2-135m,runs/direct/eval/20260101T000000Z:direct
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from counsel.cli import Result
from counsel.errors import UserError
from counsel.report.tables import text_table
from eval.config import CompareConfig
from eval.folders import finished, read_summary
from eval.metrics import METRICS
from eval.report import p_text, with_interval
from eval.samples import Row, read_rows
from eval.summary import OLD_ROWS, has_old_rows, paired, shared_likelihoods, summarize_arms

# Sides that differ in one of these differ by more than the model.
SETTINGS = (
    "max_tokens", "temperature", "top_p", "repetition_penalty", "samples", "references", "questions", "system_prompt",
)  # fmt: skip


class Side(NamedTuple):
    """One arm of one finished evaluation, and its label in the comparison."""

    label: str
    folder: Path
    arm: str
    summary: dict[str, Any]


def compare(config: CompareConfig) -> Result:
    """Print each side's metrics and its paired difference from the first side, Holm-corrected over all sides.

    All values are over the questions that every side has: other questions would give other values.
    """
    sides = unique_labels([side(text) for text in config.sides])
    if len(sides) < 2 or len({one.label for one in sides}) < len(sides):
        raise UserError(f"sides is {','.join(config.sides)!r}; give two or more different ones, such as one,two:base")
    first = sides[0]
    for other in sides[1:]:
        if other.summary["spec"]["test_sha256"] != first.summary["spec"]["test_sha256"]:
            raise UserError(
                f"{other.label} and {first.label} have different held-out rows, so they cannot be paired; evaluate "
                "both on the same data"
            )
    labels = [one.label for one in sides]
    scores = shared_scores([row for one in sides for row in labeled_rows(one, "scores.jsonl")], labels)
    likelihoods = shared_likelihoods([row for one in sides for row in labeled_rows(one, "likelihood.jsonl")], labels)
    arms = summarize_arms(labels, first.label, [], scores, likelihoods, config.seed)
    differences = paired(scores, likelihoods, [(label, first.label) for label in labels[1:]], config.seed)
    if not all(arms[label]["metrics"] for label in labels):
        raise UserError(f"{', '.join(labels)} have no question in common; evaluate them on the same ones")
    print(text_table(_rows(labels, arms, differences)))
    print(f"\ndifferences are from {first.label}; p: paired permutation test, Holm-corrected over the primary metrics")
    warnings = [*old_rows(sides), *different_settings(sides)]
    print("".join(f"\n! {warning}" for warning in warnings), end="\n" if warnings else "")
    metrics = {label: arms[label]["metrics"] for label in labels}
    return Result(
        {"sides": labels, "metrics": metrics, "differences": differences, "spread": spread(metrics),
         "warnings": warnings}
    )  # fmt: skip


def side(text: str) -> Side:
    """Read `RUN`, `FOLDER`, `RUN:ARM` or `FOLDER:ARM`; a run means its latest finished evaluation.

    The default arm is the only adapter of the evaluation; UserError lists the arms if there are several adapters.
    """
    where, _, arm = text.partition(":")
    folder = finished(where)
    summary = read_summary(folder)
    adapters = [name for name, each in summary["arms"].items() if each["kind"] == "adapter"]
    if not arm and len(adapters) != 1:
        raise UserError(
            f"{text!r} has {len(adapters)} adapters; choose with {where}:ARM from {', '.join(summary['arms'])}"
        )
    arm = arm or adapters[0]
    if arm == "base":
        arm = summary["spec"]["base"]
    if arm not in summary["arms"]:
        raise UserError(f"{str(folder)!r} has no arm {arm!r}; it has {', '.join(summary['arms'])}")
    return Side(f"{summary['run']}:{arm}", folder, arm, summary)


def unique_labels(sides: Sequence[Side]) -> list[Side]:
    """The sides; where two have the same run and arm, their labels include the evaluation's stamp."""
    times = Counter(one.label for one in sides)
    return [
        one._replace(label=f"{one.summary['run']}/{one.summary['stamp']}:{one.arm}") if times[one.label] > 1 else one
        for one in sides
    ]


def old_rows(sides: Sequence[Side]) -> list[str]:
    """A warning for each side whose rows an earlier version asked for."""
    return [f"{one.label}: {OLD_ROWS}" for one in sides if has_old_rows(one.summary["spec"])]


def different_settings(sides: Sequence[Side]) -> list[str]:
    """A warning for each setting that differs between the sides."""
    # Evaluations of earlier versions had no penalty.
    settings = [{"repetition_penalty": 1.0, **one.summary["spec"]["config"], **one.summary["spec"]} for one in sides]
    warnings = []
    for name in SETTINGS:
        values = [json.dumps(each.get(name)) for each in settings]
        if len(set(values)) > 1:
            listed = ", ".join(f"{one.label} {value:.80}" for one, value in zip(sides, values, strict=True))
            warnings.append(f"the sides were evaluated with different {name}: {listed}")
    return warnings


def shared_scores(rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """The rows, with each metric only on the questions for which every side has it."""
    scored: dict[str, dict[str, set[str]]] = {metric: {label: set() for label in labels} for metric in METRICS}
    for row in rows:
        for metric, value in (row["scores"] or {}).items():
            if value is not None:
                scored[metric][row["arm"]].add(row["question_id"])
    common = {metric: set.intersection(*by_label.values()) for metric, by_label in scored.items()}
    return [
        row | {"scores": {name: row["scores"].get(name) for name in METRICS if row["question_id"] in common[name]}}
        for row in rows
        if row["scores"] is not None
    ]


def labeled_rows(one: Side, file: str) -> list[Row]:
    """The rows of a side's arm, with the label in place of the arm's name."""
    return [row | {"arm": one.label} for row in read_rows(one.folder / file) if row["arm"] == one.arm]


def spread(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each metric over the sides; over seeds, the variation of training itself."""
    shared = [name for name in METRICS if all(name in by_name for by_name in metrics.values())]
    values = {name: [by_name[name]["value"] for by_name in metrics.values()] for name in shared}
    return {name: {"mean": statistics.mean(each), "sd": statistics.stdev(each)} for name, each in values.items()}


def _rows(labels: list[str], arms: dict[str, Any], differences: list[dict[str, Any]]) -> list[list[str]]:
    """The table: one row per metric; the first side's value, then value, difference and p of each other side."""
    changes = {(row["arm"], row["metric"]): row for row in differences}
    rows = [["", labels[0], *(cell for label in labels[1:] for cell in (label, "difference", "p"))]]
    for name, metric in METRICS.items():
        cells = [metric.title, with_interval(arms[labels[0]]["metrics"].get(name), metric.digits)]
        for label in labels[1:]:
            change = changes.get((label, name))
            cells += [
                with_interval(arms[label]["metrics"].get(name), metric.digits),
                with_interval(change, metric.digits, sign="+"),
                p_text(change) if change else "",
            ]
        if any(cells[1:]):
            rows.append(cells)
    return rows
