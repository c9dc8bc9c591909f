"""One evaluation, top to bottom: read the held-out questions, ask every arm, score, compare, report.

runs/<name>/eval/<stamp>/
  config.json       the resolved config and what it ran against   (written first)
  samples.jsonl     likelihood.jsonl                              (appended as answers come; see eval/samples.py)
  scores.jsonl      every answer with its scores                  (see eval/scoring.py)
  judgements.jsonl  judge.json                                    (only where a judge was asked; see eval/judge/ask.py)
  report.md         report.html
  summary.json      (written last: its presence means complete; see eval/summary.py)

The same command given again continues an evaluation that has no summary.json, or rows that failed, if nothing that
matters has changed.
"""

import asyncio
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from counsel.catalog import resolve
from counsel.cli import Result
from counsel.client import make_async_client
from counsel.errors import UserError
from counsel.files import read_json, sha256_of, write_json, write_jsonl, write_text
from counsel.run import Run, open_run, provenance
from eval.arms import choose, few_shot_examples, served
from eval.ask import EvalInputs, Progress, Question, ask_arm, server_version
from eval.config import EvalConfig, ReportConfig
from eval.likelihood import Renderer
from eval.page import page
from eval.report import judged_markdown, markdown, terminal
from eval.samples import LIKELIHOOD_KEY, SAMPLE_KEY, Key, Row, RowLog, read_rows
from eval.summary import FORMAT, by_topic, paired, summarize_arms, warnings

# What may differ between the first part of an evaluation and its continuation, without changing a row.
_INCIDENTAL = ("run", "url", "concurrency", "timeout_s")


def evaluate(config: EvalConfig) -> Result:
    """Run or continue an evaluation and print its table."""
    started = time.monotonic()
    run = open_run(config.run)
    recipe = run.config()
    inputs = EvalInputs(
        choose_questions(run, config.questions), recipe["system"], few_shot_examples(run.split("train"))
    )
    folder = asyncio.run(_ask(config, run, inputs, Renderer(resolve(recipe["base"]).path)))
    asked_s = time.monotonic() - started
    result = report(ReportConfig(str(folder)))
    print(f"asked in {asked_s:.0f} s, scored in {time.monotonic() - started - asked_s:.0f} s", file=sys.stderr)
    return result


def report(config: ReportConfig) -> Result:
    """Score the rows of an evaluation's folder again, print its table; exit status 1 when rows failed.

    The document is summary.json less `spec`. Raises UserError when rows are missing.
    """
    folder = Path(config.folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{config.folder!r} is no evaluation: it has no config.json; look under runs/<name>/eval/")
    summary = _finish(folder)
    print(terminal(summary))
    print(f"\nreport: {folder / 'report.html'}")
    errors = sum(arm["errors"] for arm in summary["arms"].values())
    if errors:
        print(f"{errors} rows failed; the same evaluation given again asks them once more", file=sys.stderr)
    document = {"folder": str(folder), **{key: value for key, value in summary.items() if key != "spec"}}
    return Result(document, 1 if errors else 0)


def choose_questions(run: Run, n: int) -> list[Question]:
    """The first n held-out questions by hash, so that fewer are always a subset of more; all when n is larger."""
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in run.split("test"):
        by_id[row["question_id"]].append(row)
    if len(by_id) < 2:
        raise UserError(f"run {run.name!r} holds out {len(by_id)} questions; at least 2 are needed for an interval")
    return [
        Question(key, rows[0]["question"], rows[0]["topic"], tuple(row["answer"] for row in rows))
        for key, rows in sorted(by_id.items())[:n]
    ]


async def _ask(config: EvalConfig, run: Run, inputs: EvalInputs, renderer: Renderer) -> Path:
    async with make_async_client(config.url, timeout_s=config.timeout_s) as client:
        try:
            cards = [card.model_dump() for card in (await client.models.list()).data]
            version = await server_version(client)
        except openai.APIError as error:
            raise UserError(f"no answer from {config.url}: {error}; start a server with python -m serve") from error
        server_models = served(cards)
        arms = choose(server_models, run.name, config.models, config.baselines)
        spec = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "base": server_models.base,
            "arms": [arm.name for arm in arms],
            "served": {arm.model: server_models.roots[arm.model] for arm in arms},
            "server_version": version,
            "max_model_len": server_models.max_model_len,
            "template_sha256": renderer.template_sha256,
            "system_prompt": inputs.system,
            "test_sha256": sha256_of(run.path / "data" / "test.jsonl"),
            "train_sha256": sha256_of(run.path / "data" / "train.jsonl"),
            "provenance": provenance(),
        }
        folder = folder_for(run, spec)
        with (
            RowLog(folder / "samples.jsonl", SAMPLE_KEY) as samples,
            RowLog(folder / "likelihood.jsonl", LIKELIHOOD_KEY) as likelihoods,
        ):
            planned = planned_keys(inputs.questions, [arm.name for arm in arms], config.samples, config.references)
            progress = Progress(sum(map(len, planned)), len(samples.done) + len(likelihoods.done))
            for arm in arms:
                await ask_arm(client, arm, inputs, renderer, server_models, config, samples, likelihoods, progress)
    return folder


def planned_keys(
    questions: Sequence[Question], arms: Sequence[str], samples: int, references: int
) -> tuple[set[Key], set[Key]]:
    """The keys of every row that a finished evaluation holds: of samples.jsonl and of likelihood.jsonl."""
    asked = [(arm, question) for arm in arms for question in questions]
    return (
        {(arm, q.question_id, number) for arm, q in asked for number in range(samples)},
        {(arm, q.question_id, number) for arm, q in asked for number in range(min(len(q.answers), references))},
    )


def folder_for(run: Run, spec: dict[str, Any]) -> Path:
    """The folder of an unfinished evaluation with the same spec, else a new one that holds the spec.

    One whose rows failed counts as unfinished: its summary is taken away, and those rows are asked again.
    """
    for folder in sorted((run.path / "eval").glob("*"), reverse=True):
        if not (folder / "config.json").is_file() or _essence(read_json(folder / "config.json")) != _essence(spec):
            continue
        summary = folder / "summary.json"
        if not summary.exists() or any(arm["errors"] for arm in read_json(summary)["arms"].values()):
            summary.unlink(missing_ok=True)
            print(f"continuing {folder}", file=sys.stderr)
            return folder
    folder = run.path / "eval" / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    if folder.exists():
        raise UserError(f"{str(folder)!r} exists: another evaluation started this second; try again")
    write_json(folder / "config.json", spec)
    return folder


def _essence(spec: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in spec["config"].items() if key not in _INCIDENTAL}
    config["models"] = list(config["models"])
    return {key: value for key, value in spec.items() if key != "provenance"} | {"config": config}


def _finish(folder: Path) -> dict[str, Any]:
    """Score the rows in `folder` and write scores.jsonl, the reports and, last, summary.json; return the summary."""
    from eval.contamination import Contamination
    from eval.scoring import score_rows
    from eval.similarity import Encoder

    spec = read_json(folder / "config.json")
    run = open_run(str(folder.parent.parent))
    questions, arms = choose_questions(run, spec["config"]["questions"]), spec["arms"]
    base, seed = spec["base"], spec["config"]["seed"]
    samples, likelihoods = read_rows(folder / "samples.jsonl"), read_rows(folder / "likelihood.jsonl")
    _refuse_unfinished(folder, questions, spec, samples, likelihoods)
    train_rows = run.split("train")
    scores = score_rows(samples, questions, train_rows, Encoder(), progress=lambda line: print(line, file=sys.stderr))
    training = Contamination(train_rows)
    reasons = {question.question_id: training.reason(question.question, question.answers) for question in questions}
    seen_questions = {key: reason for key, reason in reasons.items() if reason is not None}
    found = summarize_arms(arms, base, samples, scores, likelihoods, seed)
    summary: dict[str, Any] = {
        "format": FORMAT,
        "run": run.name,
        "stamp": folder.name,
        "questions": len(questions),
        "samples_per_question": spec["config"]["samples"],
        "references": sum(len(question.answers) for question in questions),
        "arms": found,
        "differences": paired(scores, likelihoods, [(arm, base) for arm in arms if arm != base], seed),
        "topics": by_topic(arms, {q.question_id: q.topic for q in questions}, scores, likelihoods, seed),
        "seen": seen_questions,
        "warnings": warnings(found, likelihoods, base, seen_questions, spec.get("format") == FORMAT),
        "spec": spec,
    }
    write_jsonl(folder / "scores.jsonl", scores)
    write_reports(folder, summary, questions, scores)
    write_json(folder / "summary.json", summary)
    return summary


def _refuse_unfinished(
    folder: Path,
    questions: Sequence[Question],
    spec: dict[str, Any],
    samples: Sequence[Row],
    likelihoods: Sequence[Row],
) -> None:
    """Raise UserError when a planned row is missing: a summary of the others would pass for the whole."""
    config = spec["config"]
    there = (
        {tuple(row[name] for name in SAMPLE_KEY) for row in samples},
        {tuple(row[name] for name in LIKELIHOOD_KEY) for row in likelihoods},
    )
    planned = planned_keys(questions, spec["arms"], config["samples"], config["references"])
    missing = sum(len(keys - rows) for keys, rows in zip(planned, there, strict=True))
    if missing:
        raise UserError(
            f"{str(folder)!r} lacks {missing} of {sum(map(len, planned))} rows: it was ended before it was done; "
            f"give the same evaluation again (python -m eval --run {config['run']} ...), which goes on where it stopped"
        )


def write_reports(
    folder: Path, summary: dict[str, Any], questions: Sequence[Question], scores: Sequence[dict[str, Any]]
) -> None:
    """Write report.md and report.html, with what a judge found where judge.json is there."""
    judged = read_json(folder / "judge.json") if (folder / "judge.json").is_file() else None
    write_text(folder / "report.md", markdown(summary) + (judged_markdown(judged) if judged else ""))
    write_text(folder / "report.html", page(summary, questions, scores, judged))
