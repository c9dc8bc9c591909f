"""Let a model judge the answers of two arms: which answer of each pair helps more, and which criteria each one meets.

    python -m eval judge gentle --url http://127.0.0.1:8001/v1 --model big-judge --arms base,gentle

judgements.jsonl, in the evaluation's folder: one request per line, appended as replies arrive
| key | meaning |
|---|---|
| `judge` | the model asked |
| `asked` | SHA-256 of the rest of the request (eval.judge.rubric.Ask): equal requests are sent once and share a row |
| `kind`, `question_id` | `preference` or `rubric`, and the question |
| `model`, `server_version` | what the judge's server reports; null if the request failed or it reports none |
| `text` | the reply; it is parsed again whenever findings are made |
| `finish_reason`, `prompt_tokens`, `completion_tokens`, `latency_s`, `attempts`, `error` | as in samples.jsonl |

These rows are a cache: requests that have a row are not sent again, and another judge, answer or prompt makes another
key. After a kill or a failure, the same command sends what is missing. judge.json (see eval/judge/findings.py) and the
reports show the latest judging; to see an earlier one, run its command again, which costs no requests.
"""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import openai

from counsel.cli import Result
from counsel.client import make_async_client
from counsel.errors import UserError
from counsel.files import write_json
from counsel.run import open_run, provenance
from eval.ask import sample_fields
from eval.config import JudgeConfig
from eval.finish import write_reports
from eval.folders import finished, read_summary
from eval.judge.agreement import read_labels
from eval.judge.findings import findings, judge_warnings, unmatched
from eval.judge.items import Item, answers, not_judged, plan_items
from eval.judge.rubric import prompts_sha256
from eval.questions import choose_questions
from eval.report import judged_terminal
from eval.requests import Progress, attempt, run_bounded, server_version
from eval.samples import Row, RowLog, read_rows

JUDGEMENT_KEY = ("judge", "asked")


def judge(config: JudgeConfig) -> Result:
    """Ask what is missing, write judge.json and the reports, print the findings; exit status 1 if requests failed."""
    folder = finished(config.folder)
    summary = read_summary(folder)
    arms = choose_arms(config.arms, summary)
    labels = read_labels(Path(config.labels), folder.name) if config.labels else {}
    questions = choose_questions(open_run(str(folder.parent.parent)), summary["spec"]["config"]["questions"])
    scores = read_rows(folder / "scores.jsonl")
    texts = {arm: answers(scores, arm) for arm in arms}
    items = plan_items(questions, texts, config.max_tokens)
    with RowLog(folder / "judgements.jsonl", JUDGEMENT_KEY) as log:
        asyncio.run(ask_missing(config, items, log))
        replies = [log.done[config.model, item.ask.sha256] for item in items]
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
    document["warnings"] = judge_warnings(document, failure)
    write_json(folder / "judge.json", document)
    write_reports(folder, summary, questions, scores)
    print(judged_terminal(document))
    print(f"\nreport: {folder / 'report.html'}")
    result = {key: value for key, value in document.items() if key != "provenance"}
    return Result({"folder": str(folder), **result}, 1 if document["counts"]["failed"] else 0)


def choose_arms(given: Sequence[str], summary: Mapping[str, Any]) -> tuple[str, str]:
    """The two arms to judge. Yardsticks are allowed: `human` against `shuffled` shows whether a judge is of use."""
    arms, base = summary["arms"], summary["spec"]["base"]
    adapters = [name for name, arm in arms.items() if arm["kind"] == "adapter"]
    if not given and (len(adapters) != 1 or base not in arms):
        raise UserError(
            f"this evaluation does not have the base and exactly one adapter; choose two of --arms {', '.join(arms)}"
        )
    first, second = (base if name == "base" else name for name in given or (base, *adapters))
    for name in (first, second):
        if name not in arms:
            raise UserError(f"this evaluation has no arm {name!r}; it has {', '.join(arms)}")
    if first == second:
        raise UserError(f"arms is {','.join(given)!r}, which is {first!r} twice; give two different ones")
    return first, second


async def ask_missing(config: JudgeConfig, items: Sequence[Item], log: RowLog) -> None:
    """Send the requests that `log` lacks. If it lacks none, the judge's server need not run."""
    missing = {item.ask.sha256: item for item in items if (config.model, item.ask.sha256) not in log.done}
    cached = len({item.ask.sha256 for item in items}) - len(missing)
    if cached:
        print(f"{cached} of {cached + len(missing)} judgements exist already", file=sys.stderr)
    if not missing:
        return
    progress = Progress(cached + len(missing), cached)
    async with make_async_client(config.url, timeout_s=config.timeout_s) as client:
        try:
            version = await server_version(client)
        except openai.APIConnectionError as error:
            raise UserError(
                f"no answer from {config.url}: {error}; start the judge's server, or give its --url"
            ) from error

        async def ask(sha256: str, item: Item) -> None:
            outcome = await attempt(lambda: client.chat.completions.create(model=config.model, **item.ask.body))
            row: Row = {
                "judge": config.model,
                "asked": sha256,
                "kind": item.kind,
                "question_id": item.answer.question_id,
                "model": getattr(outcome.response, "model", None),
                "server_version": version,
            }
            log.append(row | sample_fields(outcome))
            progress.step(config.model)

        await run_bounded([partial(ask, sha256, item) for sha256, item in missing.items()], config.concurrency)
