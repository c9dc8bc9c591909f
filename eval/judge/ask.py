"""Let a model judge the answers of two arms: which of each pair helps more, and which criteria each one meets.

    python -m eval judge gentle --url http://127.0.0.1:8001/v1 --model big-judge --arms base,gentle

judgements.jsonl, beside the evaluation's other rows: one request a line, added as replies come
| key | meaning |
|---|---|
| `judge` | the model asked |
| `asked` | SHA-256 of all else that was sent (eval.judge.rubric.Ask): equal requests are sent once and share a row |
| `kind`, `question_id` | `preference` or `rubric`, and of which question |
| `model`, `server_version` | who answered, as its server says; null when failed, or not said |
| `text` | the reply, read anew whenever the findings are made |
| `finish_reason`, `prompt_tokens`, `completion_tokens`, `latency_s`, `attempts`, `error` | as in samples.jsonl |

The rows are the cache: what they hold is not asked again, and another judge, answer or wording makes another key. Given
again after a kill or a failure, the command sends what is missing. judge.json (see eval/judge/findings.py) and the
section in the reports show the latest judging; an earlier one comes back by giving its command again, at no cost.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import openai

from counsel.cli import Result
from counsel.client import make_async_client
from counsel.errors import UserError
from counsel.files import read_json, write_json
from counsel.run import open_run, provenance
from eval.ask import Progress, Question, attempt, run_bounded, sample_fields, server_version
from eval.compare import finished
from eval.config import JudgeConfig
from eval.evaluate import choose_questions, write_reports
from eval.judge.agreement import Target, calibrate, read_labels
from eval.judge.findings import Pair, preference, rubric, warnings
from eval.judge.rubric import (
    PREFERENCE,
    RUBRIC,
    TIE,
    Ask,
    ask_preference,
    ask_rubric,
    parse_preference,
    parse_rubric,
    prompts_sha256,
)
from eval.report import judged_terminal
from eval.samples import Row, RowLog, read_rows
from eval.summary import FORMAT
from eval.text_stats import words

JUDGEMENT_KEY = ("judge", "asked")


class Item(NamedTuple):
    """One request and what it is about: one answer (`rubric`), or two of the same sample number in the order shown."""

    kind: str
    question_id: str
    sample: int
    arms: tuple[str, ...]
    ask: Ask


def judge(config: JudgeConfig) -> Result:
    """Ask what is missing, write judge.json and the reports, print the findings; exit status 1 when requests failed."""
    folder = finished(config.folder)
    summary = read_json(folder / "summary.json")
    if summary["format"] != FORMAT:
        raise UserError(f"{str(folder)!r} was made by another version; first give python -m eval report {folder}")
    arms = choose_arms(config.arms, summary)
    labels = read_labels(Path(config.labels), folder.name) if config.labels else {}
    questions = choose_questions(open_run(str(folder.parent.parent)), summary["spec"]["config"]["questions"])
    scores = read_rows(folder / "scores.jsonl")
    texts = {arm: answers(scores, arm) for arm in arms}
    items = plan_items(questions, texts, config.max_tokens)
    with RowLog(folder / "judgements.jsonl", JUDGEMENT_KEY) as log:
        asyncio.run(ask_missing(config, items, log))
        rows = {asked: row for (name, asked), row in log.done.items() if name == config.model}
    replies = [rows[item.ask.sha256] for item in items]
    document: dict[str, Any] = {
        "judge": config.model,
        "model": sorted({row["model"] for row in replies if row["model"]}),
        "server_version": sorted({row["server_version"] for row in replies if row["server_version"]}),
        "url": config.url,
        "prompts_sha256": prompts_sha256(),
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "arms": list(arms),
        **findings(items, replies, texts, labels, config.seed),
        "provenance": provenance(),
    }
    document["labels_unmatched"] = unmatched(labels, texts)
    document["counts"]["not_judged"] = {arm: not_judged(scores, arm) for arm in arms}
    failure = next((row["error"] for row in replies if row["error"] is not None), None)
    document["warnings"] = warnings(document, failure)
    write_json(folder / "judge.json", document)
    write_reports(folder, summary, questions, scores)
    print(judged_terminal(document))
    print(f"\nreport: {folder / 'report.html'}")
    shown = {key: value for key, value in document.items() if key != "provenance"}
    return Result({"folder": str(folder), **shown}, 1 if document["counts"]["failed"] else 0)


def choose_arms(given: Sequence[str], summary: Mapping[str, Any]) -> tuple[str, str]:
    """The two arms to judge; yardsticks such as `human` or `shuffled` too, by which a judge can be told from a coin."""
    known, base = summary["arms"], summary["spec"]["base"]
    adapters = [name for name, found in known.items() if found["kind"] == "adapter"]
    if not given and (len(adapters) != 1 or base not in known):
        raise UserError(
            f"this evaluation has no single adapter beside its base; choose two with --arms: {', '.join(known)}"
        )
    first, second = (base if name == "base" else name for name in given or (base, *adapters))
    for name in (first, second):
        if name not in known:
            raise UserError(f"this evaluation has no arm {name!r}; it has {', '.join(known)}")
    if first == second:
        raise UserError(f"arms is {','.join(given)!r}, which is {first!r} twice; give two different ones")
    return first, second


def answers(scores: Sequence[Row], arm: str) -> dict[tuple[str, int], str]:
    """An arm's answers by question and sample, without those that failed or have no words."""
    mine = [row for row in scores if row["arm"] == arm and row["error"] is None and words(row["text"])]
    return {(row["question_id"], row["sample"]): row["text"] for row in mine}


def unmatched(labels: Iterable[Target], texts: Mapping[str, Mapping[tuple[str, int], str]]) -> int:
    """How many labelled answers and pairs are none of those judged here: another arm, question or sample."""
    return sum(not all((key, sample) in texts.get(arm, {}) for arm in arms) for _, key, sample, arms in labels)


def not_judged(scores: Sequence[Row], arm: str) -> dict[str, int]:
    """How many of an arm's answers failed, and how many have no words."""
    mine = [row for row in scores if row["arm"] == arm]
    failed = sum(row["error"] is not None for row in mine)
    return {"error": failed, "empty": len(mine) - failed - len(answers(scores, arm))}


def plan_items(
    questions: Sequence[Question], texts: Mapping[str, Mapping[tuple[str, int], str]], max_tokens: int
) -> list[Item]:
    """Every request of a judging: each answer by the rubric, each pair of one sample number in both orders.

    Two equal answers are a tie whoever judges, and are not asked about.
    """
    asked = {question.question_id: question.question for question in questions}
    first, second = texts
    items = [
        Item("rubric", key, sample, (arm,), ask_rubric(asked[key], text, max_tokens))
        for arm in texts
        for (key, sample), text in sorted(texts[arm].items())
    ]
    for key, sample in sorted(set(texts[first]) & set(texts[second])):
        if texts[first][key, sample] == texts[second][key, sample]:
            continue
        for one, other in ((first, second), (second, first)):
            shown = ask_preference(asked[key], texts[one][key, sample], texts[other][key, sample], max_tokens)
            items.append(Item(PREFERENCE, key, sample, (one, other), shown))
    return items


def findings(
    items: Sequence[Item],
    replies: Sequence[Row],
    texts: Mapping[str, Mapping[tuple[str, int], str]],
    labels: Mapping[Target, Sequence[Hashable]],
    seed: int,
) -> dict[str, Any]:
    """Counts, preference, rubric and agreement from the replies; entry i of `replies` answers entry i of `items`."""
    met: dict[Target, bool] = {}
    places: dict[tuple[str, int, tuple[str, ...]], str | None] = {}
    counts = Counter(asked=len(items), failed=0, unreadable=0, cut=0)
    for item, row in zip(items, replies, strict=True):
        verdict: Any = None
        if row["error"] is not None:
            counts["failed"] += 1
        else:
            verdict = parse_rubric(row["text"]) if item.kind == "rubric" else parse_preference(row["text"])
            counts["unreadable"] += verdict is None
            counts["cut"] += verdict is None and row["finish_reason"] == "length"
        if item.kind == PREFERENCE:
            places[item.question_id, item.sample, item.arms] = verdict
        elif verdict is not None:
            met |= {(name, item.question_id, item.sample, item.arms): verdict[name] for name in RUBRIC}
    first, second = texts
    pairs = [
        Pair(key, sample, (texts[first][key, sample], texts[second][key, sample]),
             (place, places[key, sample, (second, first)]))
        for (key, sample, shown), place in places.items() if shown == (first, second)
    ]  # fmt: skip
    pairs += [Pair(*at, (text, text), (TIE, TIE)) for at, text in texts[first].items() if texts[second].get(at) == text]
    judged: dict[Target, Hashable] = {
        (PREFERENCE, pair.question_id, pair.sample, tuple(sorted(texts))):
            TIE if pair.winner is None else (first, second)[pair.winner]
        for pair in pairs if pair.winners is not None and pair.texts[0] != pair.texts[1]
    }  # fmt: skip
    agreement = calibrate(labels, judged | met, seed)
    return {
        "counts": dict(counts),
        "preference": preference(pairs, seed),
        "rubric": rubric((first, second), met, seed),
        "agreement": {name: each._asdict() for name, each in agreement.items()},
    }


async def ask_missing(config: JudgeConfig, items: Sequence[Item], log: RowLog) -> None:
    """Send what `log` lacks; a judge whose replies are all there need not be running."""
    missing = {item.ask.sha256: item for item in items if (config.model, item.ask.sha256) not in log.done}
    known = len({item.ask.sha256 for item in items}) - len(missing)
    if known:
        print(f"{known} of {known + len(missing)} judgements are there already", file=sys.stderr)
    if not missing:
        return
    progress = Progress(known + len(missing), known)
    async with make_async_client(config.url, timeout_s=config.timeout_s) as client:
        try:
            version = await server_version(client)
        except openai.APIConnectionError as error:
            raise UserError(
                f"no answer from {config.url}: {error}; start the judge's server, or give its --url"
            ) from error

        async def one(asked: str, item: Item) -> None:
            outcome = await attempt(lambda: client.chat.completions.create(model=config.model, **item.ask.body))
            row: Row = {"judge": config.model, "asked": asked, "kind": item.kind, "question_id": item.question_id}
            row |= {"model": getattr(outcome.response, "model", None), "server_version": version}
            log.append(row | sample_fields(outcome))
            progress.step(config.model)

        await run_bounded([partial(one, asked, item) for asked, item in missing.items()], config.concurrency)
