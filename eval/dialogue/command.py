"""`eval dialogue`: base and adapters talk with the same scripted people, and are compared turn by turn.

runs/<name>/dialogue/<stamp>/
config.json      the resolved config and the server it ran against   (written first)
dialogues.jsonl  appended as dialogues end; see eval/dialogue/play.py
report.md        report.html
summary.json     written last; see eval/dialogue/findings.py

The same command continues dialogues that were interrupted, and has those again that failed.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import openai

from counsel.cli import Result
from counsel.client import list_models_async, make_async_client
from counsel.errors import UserError
from counsel.files import read_json, write_json, write_text
from counsel.run import Run, open_run, provenance
from eval.arms import choose
from eval.config import DialogueConfig
from eval.dialogue.findings import summarize_dialogues
from eval.dialogue.page import dialogue_page, dialogue_text
from eval.dialogue.person import PERSONAS, TURNS
from eval.dialogue.play import DIALOGUE_KEY, Talks, planned_dialogues
from eval.folders import folder_for
from eval.requests import Progress, server_version
from eval.samples import RowLog, read_rows

# Of summary.json and config.json.
DIALOGUE_FORMAT = 1


def dialogue(config: DialogueConfig) -> Result:
    """Have the dialogues, print the findings by turn; exit status 1 if dialogues failed."""
    run = open_run(config.run)
    folder = asyncio.run(_talk(config, run))
    summary = _finish(folder, run)
    print(dialogue_text(summary))
    print(f"\nreport: {folder / 'report.html'}")
    errors = sum(arm["errors"] for arm in summary["arms"].values())
    if errors:
        print(f"{errors} dialogues failed; run the same command again to have them once more", file=sys.stderr)
    document = {"folder": str(folder), **{key: value for key, value in summary.items() if key != "spec"}}
    return Result(document, 1 if errors else 0)


async def _talk(config: DialogueConfig, run: Run) -> Path:
    """Have the dialogues that the folder lacks; return the folder."""
    async with contextlib.AsyncExitStack() as clients:
        client = await clients.enter_async_context(make_async_client(config.url, timeout_s=config.timeout_s))
        person = None
        if config.person_model:
            url = config.person_url or config.url
            person = await clients.enter_async_context(make_async_client(url, timeout_s=config.timeout_s))
            offered = (await list_models_async(person)).roots
            if config.person_model not in offered:
                raise UserError(
                    f"person_model is {config.person_model!r}; the server at {url} has {', '.join(offered)}"
                )
        server_models = await list_models_async(client)
        try:
            version = await server_version(client)
        except openai.APIError as error:
            raise UserError(f"no answer from {config.url}: {error}; start a server with python -m serve") from error
        arms = choose(server_models, run.name, config.models, baselines=False)
        system = run.config()["system"]
        spec: dict[str, Any] = {
            "format": DIALOGUE_FORMAT,
            "config": dataclasses.asdict(config),
            "base": server_models.base,
            "arms": [arm.name for arm in arms],
            "served": {arm.model: server_models.roots[arm.model] for arm in arms},
            "system_prompt": system,
            "personas_sha256": hashlib.sha256(PERSONAS.read_bytes()).hexdigest(),
            "server_version": version,
            "provenance": provenance(),
        }
        folder = folder_for(run, spec, "dialogue")
        with RowLog(folder / "dialogues.jsonl", DIALOGUE_KEY) as log:
            progress = Progress(len(arms) * config.dialogues * TURNS, len(log.done) * TURNS, "turns")
            talks = Talks(client, person, server_models, system, config, log, progress)
            for arm in arms:
                await talks.talk(arm)
    return folder


def _finish(folder: Path, run: Run) -> dict[str, Any]:
    """Score the dialogues in `folder`; write the reports and, last, summary.json. Return the summary."""
    from eval.dialogue.measures import turn_scores
    from eval.similarity import Encoder

    spec = read_json(folder / "config.json")
    order = {key: at for at, key in enumerate(
        key for arm in spec["arms"] for key in planned_dialogues(arm, spec["config"]["dialogues"])
    )}  # fmt: skip
    # Rows are in the order of arrival, which differs between runs.
    rows = sorted(read_rows(folder / "dialogues.jsonl"), key=lambda row: order[tuple(row[key] for key in DIALOGUE_KEY)])
    scores = turn_scores(rows, Encoder())
    summary: dict[str, Any] = {
        "format": DIALOGUE_FORMAT,
        "run": run.name,
        "stamp": folder.name,
        **summarize_dialogues(rows, scores, spec["arms"], spec["base"], spec["config"]["seed"]),
        "spec": spec,
    }
    write_text(folder / "report.md", dialogue_text(summary, markdown=True))
    write_text(folder / "report.html", dialogue_page(summary, rows))
    write_json(folder / "summary.json", summary)
    return summary
