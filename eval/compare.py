"""Compare models that were evaluated apart: other runs, other seeds, other adapters, on the questions they share.

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
from counsel.files import read_json
from counsel.run import open_run
from eval.config import CompareConfig
from eval.metrics import METRICS
from eval.report import p_text, table, with_interval
from eval.samples import Row, read_rows
from eval.summary import paired, shared_likelihoods, summarize_arms

# What two evaluations must have in common for their difference to be the models'.
SETTINGS = ("format", "max_tokens", "temperature", "top_p", "samples", "references", "questions", "system_prompt")


class Side(NamedTuple):
    """One arm of one finished evaluation, and the label it goes by here."""

    label: str
    folder: Path
    arm: str
    summary: dict[str, Any]


def compare(config: CompareConfig) -> Result:
    """Print each side's metrics, and its paired difference from the first side, Holm-corrected over all of them.

    All of it is on what every side has: values of other questions differ by the questions.
    """
    sides = told_apart([side(text) for text in config.sides])
    if len(sides) < 2 or len({one.label for one in sides}) < len(sides):
        raise UserError(f"sides is {','.join(config.sides)!r}; give two or more different ones, such as one,two:base")
    first = sides[0]
    for other in sides[1:]:
        if other.summary["spec"]["test_sha256"] != first.summary["spec"]["test_sha256"]:
            raise UserError(
                f"{other.label} and {first.label} have different held-out rows: no paired comparison is right"
            )
    labels = [one.label for one in sides]
    scores = shared_scores([row for one in sides for row in labelled(one, "scores.jsonl")], labels)
    likelihoods = shared_likelihoods([row for one in sides for row in labelled(one, "likelihood.jsonl")], labels)
    arms = summarize_arms(labels, first.label, [], scores, likelihoods, config.seed)
    differences = paired(scores, likelihoods, [(label, first.label) for label in labels[1:]], config.seed)
    if not all(arms[label]["metrics"] for label in labels):
        raise UserError(f"{', '.join(labels)} have no question in common; evaluate them on the same ones")
    print(table(_rows(labels, arms, differences)))
    print(f"\ndifferences are from {first.label}; p: paired permutation test, Holm-corrected over the primary metrics")
    found = unlike(sides)
    print("".join(f"\n! {warning}" for warning in found), end="\n" if found else "")
    metrics = {label: arms[label]["metrics"] for label in labels}
    return Result(
        {"sides": labels, "metrics": metrics, "differences": differences, "spread": spread(metrics), "warnings": found}
    )


def side(text: str) -> Side:
    """Read `RUN`, `FOLDER`, `RUN:ARM` or `FOLDER:ARM`: a run means its latest finished evaluation.

    Without an arm it is the only adapter of that evaluation; with several, UserError lists them.
    """
    where, _, arm = text.partition(":")
    folder = finished(where)
    summary = read_json(folder / "summary.json")
    adapters = [name for name, found in summary["arms"].items() if found["kind"] == "adapter"]
    if not arm and len(adapters) != 1:
        raise UserError(
            f"{text!r} holds {len(adapters)} adapters; choose with {where}:ARM from {', '.join(summary['arms'])}"
        )
    arm = arm or adapters[0]
    if arm == "base":
        arm = summary["spec"]["base"]
    if arm not in summary["arms"]:
        raise UserError(f"{str(folder)!r} has no arm {arm!r}; it has {', '.join(summary['arms'])}")
    return Side(f"{summary['run']}:{arm}", folder, arm, summary)


def told_apart(sides: Sequence[Side]) -> list[Side]:
    """The sides, with the evaluation's stamp in the label where two have the same run and arm."""
    times = Counter(one.label for one in sides)
    return [
        one._replace(label=f"{one.summary['run']}/{one.summary['stamp']}:{one.arm}") if times[one.label] > 1 else one
        for one in sides
    ]


def unlike(sides: Sequence[Side]) -> list[str]:
    """In what else than the model the sides differ: each such setting makes a difference of its own."""
    asked = [{**one.summary["spec"]["config"], **one.summary["spec"], "format": one.summary["format"]} for one in sides]
    found = []
    for name in SETTINGS:
        values = [json.dumps(settings.get(name)) for settings in asked]
        if len(set(values)) > 1:
            shown = ", ".join(f"{one.label} {value:.80}" for one, value in zip(sides, values, strict=True))
            found.append(f"the sides were evaluated with different {name}: {shown}")
    return found


def shared_scores(rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """The rows with each metric only on the questions for which every side has it."""
    has: dict[str, dict[str, set[str]]] = {metric: {label: set() for label in labels} for metric in METRICS}
    for row in rows:
        for metric, value in (row["scores"] or {}).items():
            if value is not None:
                has[metric][row["arm"]].add(row["question_id"])
    common = {metric: set.intersection(*each.values()) for metric, each in has.items()}
    return [
        row | {"scores": {name: row["scores"].get(name) for name in METRICS if row["question_id"] in common[name]}}
        for row in rows
        if row["scores"] is not None
    ]


def finished(where: str) -> Path:
    """The folder of a finished evaluation: `where` itself, or the latest one of the run that it names."""
    if (Path(where) / "summary.json").is_file():
        return Path(where)
    folders = sorted(path.parent for path in (open_run(where).path / "eval").glob("*/summary.json"))
    if not folders:
        raise UserError(f"run {where!r} has no finished evaluation; make one with python -m eval --run {where}")
    return folders[-1]


def labelled(one: Side, file: str) -> list[Row]:
    """The rows of one arm, under its label."""
    return [row | {"arm": one.label} for row in read_rows(one.folder / file) if row["arm"] == one.arm]


def spread(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each metric over the sides: across seeds, what training itself varies."""
    shared = [name for name in METRICS if all(name in found for found in metrics.values())]
    values = {name: [found[name]["value"] for found in metrics.values()] for name in shared}
    return {name: {"mean": statistics.mean(each), "sd": statistics.stdev(each)} for name, each in values.items()}


def _rows(labels: list[str], arms: dict[str, Any], differences: list[dict[str, Any]]) -> list[list[str]]:
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
