"""One evaluation: read the held-out questions, ask every arm, then score, compare and report (see eval/finish.py).

Its folder is described in eval/folders.py. The same command continues an evaluation that is unfinished or has failed
rows, provided that nothing relevant has changed.
"""

import asyncio
import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import openai

from counsel.catalog import resolve
from counsel.cli import Result
from counsel.client import ServerModels, list_models_async, make_async_client
from counsel.errors import UserError
from counsel.files import sha256_of
from counsel.run import Run, open_run, provenance
from eval.arms import Arm, choose, few_shot_examples
from eval.ask import Asker, EvalInputs
from eval.config import EvalConfig, ReportConfig
from eval.conversations import TURN_KEY, held_out_replies
from eval.finish import report
from eval.folders import folder_for
from eval.likelihood import Renderer
from eval.questions import choose_questions, planned_rows
from eval.requests import Progress, server_version
from eval.samples import LIKELIHOOD_KEY, SAMPLE_KEY, RowLog
from eval.summary import FORMAT


def evaluate(config: EvalConfig) -> Result:
    """Run or continue an evaluation and print its table."""
    started = time.monotonic()
    run = open_run(config.run)
    recipe = run.config()
    questions = choose_questions(run, config.questions)
    inputs = EvalInputs(
        questions, recipe["system"], few_shot_examples(run.split("train")), held_out_replies(run, questions)
    )
    folder = asyncio.run(_ask(config, run, inputs, Renderer(resolve(recipe["base"]).path)))
    asked_s = time.monotonic() - started
    result = report(ReportConfig(str(folder)))
    print(f"asked in {asked_s:.0f} s, scored in {time.monotonic() - started - asked_s:.0f} s", file=sys.stderr)
    return result


async def _ask(config: EvalConfig, run: Run, inputs: EvalInputs, renderer: Renderer) -> Path:
    """Ask for every row that the evaluation's folder lacks; return the folder."""
    async with make_async_client(config.url, timeout_s=config.timeout_s) as client:
        server_models = await list_models_async(client)
        try:
            version = await server_version(client)
        except openai.APIError as error:
            raise UserError(f"no answer from {config.url}: {error}; start a server with python -m serve") from error
        arms = choose(server_models, run.name, config.models, config.baselines)
        spec = _spec(config, run, inputs, renderer, server_models, arms) | {"server_version": version}
        folder = folder_for(run, spec)
        planned = planned_rows([arm.name for arm in arms], inputs.questions, config.samples, config.references)
        with contextlib.ExitStack() as logs:
            samples = logs.enter_context(RowLog(folder / "samples.jsonl", SAMPLE_KEY))
            likelihoods = logs.enter_context(RowLog(folder / "likelihood.jsonl", LIKELIHOOD_KEY))
            turns = logs.enter_context(RowLog(folder / "turns.jsonl", TURN_KEY)) if inputs.replies else None
            progress = Progress(
                len(planned.samples) + len(planned.likelihoods) + len(arms) * len(inputs.replies),
                len(samples.done) + len(likelihoods.done) + (len(turns.done) if turns else 0),
            )
            asker = Asker(client, server_models, renderer, inputs, config, samples, likelihoods, turns, progress)
            for arm in arms:
                await asker.ask(arm)
    return folder


def _spec(
    config: EvalConfig, run: Run, inputs: EvalInputs, renderer: Renderer, server_models: ServerModels, arms: list[Arm]
) -> dict[str, Any]:
    """config.json: the settings, and the content of everything that the rows depend on."""
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "base": server_models.base,
        "arms": [arm.name for arm in arms],
        "served": {arm.model: server_models.roots[arm.model] for arm in arms},
        "max_model_len": server_models.max_model_len,
        "template_sha256": renderer.template_sha256,
        "system_prompt": inputs.system,
        "test_sha256": sha256_of(run.path / "data" / "test.jsonl"),
        "train_sha256": sha256_of(run.path / "data" / "train.jsonl"),
        # Single questions leave the same file as before there were conversations.
        **({"replies": len(inputs.replies)} if inputs.replies else {}),
        "provenance": provenance(),
    }
