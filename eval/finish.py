"""From an evaluation's rows to its scores, reports and summary. The same rows always give the same numbers."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counsel.cli import Result
from counsel.errors import UserError
from counsel.files import read_json, write_json, write_jsonl, write_text
from counsel.run import open_run
from eval.config import ReportConfig
from eval.conversations import TURN_KEY, HeldOutReply, held_out_replies, turn_findings
from eval.page import evaluation_page
from eval.questions import Question, choose_questions, planned_rows
from eval.report import judged_markdown, markdown, terminal
from eval.samples import LIKELIHOOD_KEY, SAMPLE_KEY, Row, read_rows
from eval.summary import FORMAT, by_topic, paired, summarize_arms, warnings


def report(config: ReportConfig) -> Result:
    """Score the rows of an evaluation's folder again and print its table; exit status 1 if rows failed.

    The document is summary.json without `spec`. Raises UserError when rows are missing.
    """
    folder = Path(config.folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"not an evaluation folder (no config.json): {config.folder!r}; look in runs/<name>/eval/")
    summary = finish(folder)
    print(terminal(summary))
    print(f"\nreport: {folder / 'report.html'}")
    errors = sum(arm["errors"] for arm in summary["arms"].values())
    if errors:
        print(f"{errors} rows failed; run the same evaluation again to ask for them once more", file=sys.stderr)
    document = {"folder": str(folder), **{key: value for key, value in summary.items() if key != "spec"}}
    return Result(document, 1 if errors else 0)


def finish(folder: Path) -> dict[str, Any]:
    """Score the rows in `folder`; write scores.jsonl, the reports and, last, summary.json. Return the summary."""
    from eval.contamination import Contamination
    from eval.scoring import score_rows
    from eval.similarity import Encoder

    spec = read_json(folder / "config.json")
    run = open_run(str(folder.parent.parent))
    questions, arms = choose_questions(run, spec["config"]["questions"]), spec["arms"]
    base, seed = spec["base"], spec["config"]["seed"]
    samples, likelihoods = read_rows(folder / "samples.jsonl"), read_rows(folder / "likelihood.jsonl")
    # Evaluations of conversations by earlier versions have no rows by turn.
    replies = held_out_replies(run, questions) if "replies" in spec else []
    turns = read_rows(folder / "turns.jsonl")
    _refuse_unfinished(folder, questions, replies, spec, samples, likelihoods, turns)
    train_rows = run.split("train")
    scores = score_rows(samples, questions, train_rows, Encoder(), progress=lambda line: print(line, file=sys.stderr))
    training = Contamination(train_rows)
    reasons = {question.question_id: training.reason(question.question, question.answers) for question in questions}
    contaminated = {key: reason for key, reason in reasons.items() if reason is not None}
    by_arm = summarize_arms(arms, base, samples, scores, likelihoods, seed, turns)
    summary: dict[str, Any] = {
        "format": FORMAT,
        "run": run.name,
        "stamp": folder.name,
        "questions": len(questions),
        "samples_per_question": spec["config"]["samples"],
        "references": sum(len(question.answers) for question in questions),
        "arms": by_arm,
        "differences": paired(scores, likelihoods, [(arm, base) for arm in arms if arm != base], seed),
        "topics": by_topic(arms, {q.question_id: q.topic for q in questions}, scores, likelihoods, seed),
        "seen": contaminated,
        **({"turns": turn_findings(turns, arms, base, seed)} if replies else {}),
        "warnings": warnings(by_arm, likelihoods, spec, contaminated, turns),
        "spec": spec,
    }
    write_jsonl(folder / "scores.jsonl", scores)
    write_reports(folder, summary, questions, scores)
    write_json(folder / "summary.json", summary)
    return summary


def write_reports(
    folder: Path, summary: dict[str, Any], questions: Sequence[Question], scores: Sequence[dict[str, Any]]
) -> None:
    """Write report.md and report.html, with the judge's findings if there is a judge.json."""
    judged = _judged(folder)
    write_text(folder / "report.md", markdown(summary) + (judged_markdown(judged) if judged else ""))
    write_text(folder / "report.html", evaluation_page(summary, questions, scores, judged))


def _judged(folder: Path) -> dict[str, Any] | None:
    """judge.json, if there is one. Earlier versions called its warnings `alarms`; all else in it is the same."""
    if not (folder / "judge.json").is_file():
        return None
    document = read_json(folder / "judge.json")
    return document if "warnings" in document else document | {"warnings": document["alarms"]}


def _refuse_unfinished(
    folder: Path,
    questions: Sequence[Question],
    replies: Sequence[HeldOutReply],
    spec: dict[str, Any],
    samples: Sequence[Row],
    likelihoods: Sequence[Row],
    turns: Sequence[Row],
) -> None:
    """Raise UserError when a planned row is missing: a summary of part of the rows would look like the whole."""
    config = spec["config"]
    planned = planned_rows(spec["arms"], questions, config["samples"], config["references"])
    planned_turns = [reply.key(arm) for arm in spec["arms"] for reply in replies]
    missing = sum(
        len(set(keys) - {tuple(row[name] for name in key) for row in rows})
        for keys, key, rows in (
            (planned.samples, SAMPLE_KEY, samples),
            (planned.likelihoods, LIKELIHOOD_KEY, likelihoods),
            (planned_turns, TURN_KEY, turns),
        )
    )
    n_planned = len(planned.samples) + len(planned.likelihoods) + len(planned_turns)
    if missing:
        raise UserError(
            f"{str(folder)!r} lacks {missing} of {n_planned} rows: it was stopped before it finished; run the same "
            f"evaluation again (python -m eval --run {config['run']} ...) to continue it"
        )
