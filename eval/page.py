"""report.html of an evaluation: the findings, and a browser of every answer.

`page.html` extends the project's base page. The browser is drawn by its script from the JSON that the page carries.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counsel.report import render, section
from eval.charts import forest
from eval.metrics import METRICS, PRIMARY
from eval.questions import Question
from eval.report import (
    ARMS_NOTE,
    COUNTS_NOTE,
    TEST_NOTE,
    TURNS_TITLE,
    all_arms,
    base_of,
    beside,
    by_turn,
    compared,
    counts,
    evaluation_finding,
    judged_lead,
    judged_tables,
    label,
    lead,
    result,
    turns_note,
    with_interval,
)
from eval.samples import Row

if TYPE_CHECKING:
    from markupsafe import Markup

# What the browser shows below an answer, and what it can order questions by.
_SHOWN = ("similarity_max", "question_similarity", "rouge_1", "chrf", "copied", "words")
_ORDERS = ("similarity_max", "words")
_TOPIC_METRICS = ("bits_per_byte", "similarity_max")


def evaluation_page(
    summary: Mapping[str, Any], questions: Sequence[Question], scores: Sequence[Row], judged: Mapping[str, Any] | None
) -> str:
    """The HTML text of a finished evaluation; `judged` is judge.json, None when no judge was asked."""
    models = [name for name, arm in summary["arms"].items() if arm["kind"] != "yardstick"]
    base = base_of(summary)
    return render(
        "page.html",
        Path(__file__).parent,
        title=f"Evaluation of {summary['run']}",
        finding=evaluation_finding(summary),
        verdict="",
        warnings=[*summary["warnings"], *(judged["warnings"] if judged else [])],
        sections=[
            *_comparisons(summary),
            section("Every arm", all_arms(summary), note=ARMS_NOTE),
            *([section(TURNS_TITLE, by_turn(summary), note=turns_note(summary))] if "turns" in summary else []),
            *_topics(summary, models),
            *_judged(judged),
            *_method(summary),
        ],
        topics=sorted({question.topic for question in questions} - {""}),
        shown={name: name in models for name in [*summary["arms"], "references"]},
        orders=[(arm, metric, METRICS[metric].title) for arm in models if arm != base for metric in _ORDERS],
        base=base,
        data={
            "questions": [question._asdict() for question in questions],
            "scores": scores,
            "base": base,
            "seen": summary["seen"],
            "metrics": [[name, METRICS[name].title, min(2, METRICS[name].digits)] for name in _SHOWN],
        },
        spec=json.dumps({"spec": summary["spec"], "judge": judged}, ensure_ascii=False, indent=2),
    )


def _comparisons(summary: Mapping[str, Any]) -> "list[Markup]":
    """For each adapter: its differences from the base as a chart and as a table."""
    base = str(base_of(summary))
    sections = []
    for name, changes in compared(summary).items():
        heading, *rows = beside(summary, name)
        cells = [[*heading, "detectable", "result"]]
        for row, change in zip(rows, changes, strict=True):
            digits = METRICS[change["metric"]].digits
            detectable = "" if change["mde"] is None else f"{change['mde']:.{digits}f}"
            cells.append([*row, detectable, _colored(result(change))])
        chart = forest(changes, name, base)
        sections.append(
            section(
                f"{name} compared with {base}",
                *([chart] if chart else []),
                cells,
                note=f"{TEST_NOTE} * and result: significant at 5 %. Detectable: the smallest true difference that "
                "this many questions would show with 80 % power. Chart: each difference in units of its standard "
                "deviation over questions, with its 95 % interval, not corrected.",
            )
        )
    return sections


def _colored(text: str) -> str:
    from markupsafe import Markup

    return Markup('<span class="{}">{}</span>').format(text, text) if text else ""


def _topics(summary: Mapping[str, Any], models: Sequence[str]) -> "list[Markup]":
    """One line per topic; no section when no topic has enough questions."""
    if not summary["topics"]:
        return []
    heading = ["topic", "questions", *(f"{arm}: {METRICS[name].title}" for arm in models for name in _TOPIC_METRICS)]
    cells = [heading]
    for topic, arms in summary["topics"].items():
        n = max(arms.get(arm, {}).get("similarity_max", {}).get("n", 0) for arm in models)
        values = [with_interval(arms.get(arm, {}).get(name), 3) for arm in models for name in _TOPIC_METRICS]
        cells.append([topic, str(n), *values])
    return [section("By topic", cells, note="Not tested: among this many slices, some differ by chance.")]


def _judged(judged: Mapping[str, Any] | None) -> "list[Markup]":
    if judged is None:
        return []
    return [section(f"Judged by {judged['judge']}", *judged_tables(judged), note=judged_lead(judged))]


def _method(summary: Mapping[str, Any]) -> "list[Markup]":
    primary = ", ".join(METRICS[name].title for name in PRIMARY)
    metrics = [("metric", "what it measures, and what it does not show")]
    metrics += [(label(name), metric.note) for name, metric in METRICS.items()]
    return [
        section(
            "How it was measured",
            counts(summary),
            note=f"{lead(summary)} Made {summary['stamp']}. {COUNTS_NOTE} Primary metrics: {primary}. "
            "No expert rated these answers.",
        ),
        section("Metrics and their limits", metrics),
    ]
