"""What answering a Batch file without a server costs, compared with vLLM's plain `LLM.generate`.

    python -m benchmarks.offline --run counselchat         (`make bench-eval` includes it)

Two engines of the run's base are started with the same settings, which serve/launch.py chooses. While one works the
other is stopped (SIGSTOP), so it has the machine to itself. A round asks both the same: held-out questions under the
run's system prompt, greedy answers of a fixed length, end of sequence ignored.

    generate   one call of LLM.generate on token ids rendered beforehand
    batch      what `python -m eval batch --base` does: messages in, one row per answer in the answers' file

The order alternates and the questions change from round to round. If the run holds out too few questions they repeat,
and both engines may find them in the prefix cache. A round's ratio is batch over generate, in tokens per second.
offline_vs_generate is the median over the rounds. Neither the first round, which warms up, nor the start of the engines
counts.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counsel.catalog import resolve
from counsel.chat import prompt_messages
from counsel.errors import UserError
from counsel.processor import processor
from counsel.run import open_run
from eval.batch import ENGINE_CONCURRENCY, Ask, answer_all, engine_answers, engine_for
from eval.config import BatchConfig
from eval.questions import choose_questions
from eval.requests import Progress
from eval.samples import Row, RowLog
from serve.offline import OfflineEngine
from serve.offline_process import own_stdout
from serve.server import reason_in

GENERATE = "--generate"


def offline_vs_generate(run_name: str, prompts: int = 64, tokens: int = 64, rounds: int = 5) -> dict[str, Any]:
    """Measure `rounds` rounds of `prompts` answers with `tokens` tokens each; return the results."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_compare(run_name, prompts, tokens, rounds, Path(folder)))


async def _compare(run_name: str, prompts: int, tokens: int, rounds: int, folder: Path) -> dict[str, Any]:
    run = open_run(run_name)
    recipe = run.config()
    base = resolve(recipe["base"])
    held_out = [prompt_messages(each.question, recipe["system"]) for each in choose_questions(run, sys.maxsize)]
    endless = itertools.cycle(held_out)
    batch = BatchConfig("", "", base=recipe["base"], store=str(folder / "store"))
    engine = engine_for(batch, [], folder / "answers.jsonl")
    measured: list[dict[str, float]] = []
    async with engine_answers(engine) as ask:
        assert engine.process is not None
        ours = engine.process.pid
        os.killpg(ours, signal.SIGSTOP)
        bare = Generate(engine, folder)
        try:
            for turn in range(rounds + 1):
                conversations = [next(endless) for _ in range(prompts)]
                speed: dict[str, float] = {}
                for variant in ("generate", "batch") if turn % 2 else ("batch", "generate"):
                    if variant == "generate":
                        speed[variant] = bare.tokens_s(conversations, tokens)
                        continue
                    with _switched(bare.process.pid, ours):
                        answers = folder / f"{turn}.jsonl"
                        speed[variant] = await _batch_tokens_s(ask, base.name, conversations, tokens, answers)
                print(f"round {turn}: {speed} tokens/s", file=sys.stderr)
                measured.append(speed)
        finally:
            os.killpg(bare.process.pid, signal.SIGKILL)
            bare.process.wait()
            os.killpg(ours, signal.SIGCONT)
    counted = measured[1:]
    ratios = [speed["batch"] / speed["generate"] for speed in counted]
    return {
        "offline_vs_generate": round(statistics.median(ratios), 3),
        "offline_vs_generate_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "offline_rounds": rounds,
        "offline_tokens_s": round(statistics.median(speed["batch"] for speed in counted), 1),
        "generate_tokens_s": round(statistics.median(speed["generate"] for speed in counted), 1),
    }


@contextlib.contextmanager
def _switched(running: int, stopped: int) -> Iterator[None]:
    """Stop one process group and continue another; the reverse at the end."""
    os.killpg(running, signal.SIGSTOP)
    os.killpg(stopped, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(stopped, signal.SIGSTOP)
        os.killpg(running, signal.SIGCONT)


async def _batch_tokens_s(ask: Ask, model: str, conversations: list[Any], tokens: int, answers: Path) -> float:
    """New tokens per second of the batch command, from the first request to the last row in the file."""
    fields = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    requests: list[Row] = [
        {"custom_id": str(number), "url": "/v1/chat/completions", "body": {**fields, "messages": messages}}
        for number, messages in enumerate(conversations)
    ]
    started_s = time.perf_counter()
    with RowLog(answers, ("custom_id",)) as log:
        await answer_all(ask, requests, log, Progress(len(requests), 0), ENGINE_CONCURRENCY)
    duration_s = time.perf_counter() - started_s
    return sum(row["response"]["body"]["usage"]["completion_tokens"] for row in log.done.values()) / duration_s


class Generate:
    """A child process with vLLM's LLM class, with the flags and environment of `engine`."""

    def __init__(self, engine: OfflineEngine, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(engine.base.path)
        self.log = folder / "generate.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.offline", GENERATE, *engine.flags()],
                env={**os.environ, **engine.plan().env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._read() == "ready"

    def tokens_s(self, conversations: list[Any], tokens: int) -> float:
        """New tokens per second inside one call of LLM.generate."""
        texts = [
            self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations
        ]
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"ids": ids, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return float(self._read())

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the engine of LLM.generate ended: {reason_in(self.log)}")
        return json.loads(line)


def generate(flags: list[str]) -> None:
    """Run the child of `Generate`: read requests from stdin, write tokens per second to stdout."""
    answers = own_stdout()

    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serve.vllm_api import make_arg_parser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in request["ids"]]
        params = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
        started_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        duration_s = time.perf_counter() - started_s
        n_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps(n_tokens / duration_s), file=answers, flush=True)


def main() -> None:
    if GENERATE in sys.argv[1:2]:
        generate(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run whose base answers its held-out questions")
    parser.add_argument("--prompts", type=int, default=64, help="per round (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="per answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="besides the warm-up (default: 5)")
    given = parser.parse_args()
    figures = offline_vs_generate(given.run, given.prompts, given.tokens, given.rounds)
    print(json.dumps({**figures, "processor": str(processor())}))


if __name__ == "__main__":
    main()
