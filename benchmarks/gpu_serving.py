"""The serving half of the GPU proof: right answers in mixed batches, hot load, churn, speed, first tokens, drain.

The load and its figures are those of benchmarks/serving.py, without its rounds: a proof has minutes, so each figure is
one measurement of at least MEASURED_S seconds, and ratios compare two servers that ran one after the other.
"""

import asyncio
import concurrent.futures
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai

from benchmarks.gpu_models import (
    HOT,
    LATER,
    RANK,
    SERVED,
    adapter_folder,
    fill_store,
    publish,
    served_base,
    store_of,
)
from benchmarks.gpu_reference import Answer, Reference
from benchmarks.serving import ADAPTERS, BenchServer, Cell, tokens_per_s
from benchmarks.steps import Figures, Rows
from counsel import store as adapter_store
from counsel.catalog import Base
from counsel.client import make_async_client, make_client
from serve.config import ServeConfig
from serve.server import Server

PROMPTS = ("i feel lonely since we moved", "work is hard", "what can help me sleep", "talk to a friend")
N_TOKENS = 24
EXACT = {"ignore_eos": True, "return_token_ids": True}
# Half of the card's memory stays free for PEFT's two copies of the model.
GPU_SHARE = "0.5"


class Load(NamedTuple):
    """How hard to push: concurrencies of the throughput cells, seconds of each, and numbers of timed streams."""

    concurrencies: tuple[int, ...]
    measured_s: float
    streams: tuple[int, ...]


FULL, SMALL = Load((1, 32, 128, 256), 3.0, (1, 32)), Load((1, 4), 0.1, (1, 4))


class Address(NamedTuple):
    """A running server as benchmarks.serving loads it. url: without /v1."""

    url: str

    def extra_body(self, model: str) -> dict[str, Any]:
        return {"ignore_eos": True}


def serve_ours(work: Path, rows: Rows, load: Load, device: str) -> None:
    """Every step that needs our server, on one start of it; the last stops it."""
    base = served_base(work)
    # A stopped run may have left it in the middle of the churn.
    fill_store(work)
    config = ServeConfig(
        model=str(base.path), store=str(store_of(work)), logs=str(work / "logs"), port=0, max_loras=SERVED,
        # Fewer than there are adapters in the end, so that some are dropped and fetched again.
        max_cpu_loras=SERVED + 1, max_lora_rank=RANK, max_model_len=2048, leave_s=0.0, drain_s=60.0, queued=1024,
        **_for_device(device),
    )  # fmt: skip
    with Server(config, quiet=True) as server:
        url = server.base_url.removesuffix("/v1")
        weights: dict[str, str | None] = {base.name: None} | {f"a{n}": f"a{n}" for n in range(SERVED)}
        reference: list[Reference] = []

        def peft() -> Reference:
            if not reference:
                reference.append(Reference(base.path, {name: adapter_folder(work, name) for name in ADAPTERS[:11]}))
            return reference[0]

        rows.run("answers", lambda: answers(url, weights, peft()) | {"ready_s": round(server.ready_s, 1)})
        rows.run("hot_load", lambda: hot_load(url, work, peft()))
        rows.run("churn", lambda: churn(url, work, base, peft()))
        rows.run("throughput", lambda: throughput(Address(url), base.name, load))
        rows.run("first_token", lambda: first_token(url, base.name, load))
        rows.run("drain", lambda: drain(server, base.name, 16))


def serve_bare(work: Path, rows: Rows, load: Load, device: str) -> None:
    """The same load on vLLM as it comes: its own command line, its defaults, the adapters named at the start."""
    base = served_base(work)
    named = [f"a{n}={adapter_folder(work, f'a{n}')}" for n in range(SERVED)]
    options = _for_device(device)
    argv = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(base.path),
            "--served-model-name", base.name, "--max-model-len", "2048", "--enable-lora",
            "--max-loras", str(SERVED), "--max-lora-rank", str(RANK), "--lora-modules", *named]  # fmt: skip
    if device == "cuda":
        argv += ["--gpu-memory-utilization", GPU_SHARE]
    else:
        argv += ["--kv-cache-memory-bytes", str(int(options["kv_cache_memory_gb"] * 2**30)), "--enforce-eager"]
    server = BenchServer("bare vLLM", argv, {"VLLM_PLUGINS": ""}, work / "bare.log")
    try:
        rows.run("bare_throughput", lambda: throughput(server, base.name, load) | {"ready_s": round(server.ready_s, 1)})
    finally:
        server.kill()


def _for_device(device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"vllm_args": f"--gpu-memory-utilization {GPU_SHARE}"}
    return {"dtype": "bfloat16", "kv_cache_memory_gb": 0.1, "compile": False}


def ask(url: str, models: Sequence[str], api_key: str = "") -> list[Answer]:
    """Each prompt to each model, all at once, in an order that puts different models next to each other."""
    client = make_client(f"{url}/v1", api_key)

    def one(model: str, prompt: str) -> Answer:
        reply = client.completions.create(
            model=model, prompt=prompt, max_tokens=N_TOKENS, temperature=0, logprobs=1, extra_body=EXACT
        )
        choice: Any = reply.choices[0]
        return Answer(model, choice.prompt_token_ids, choice.token_ids, choice.logprobs.token_logprobs)

    asked = [(model, prompt) for prompt in PROMPTS for model in models]
    with client, concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda pair: one(*pair), asked))


def answers(url: str, weights: dict[str, str | None], reference: Reference, api_key: str = "") -> Figures:
    """Base and adapters in one batch, against PEFT."""
    return reference.judge(ask(url, list(weights), api_key), weights)


def hot_load(url: str, work: Path, reference: Reference) -> Figures:
    """A new adapter: seconds from its publication to its first token, and whether its answers are its own."""
    started_s = time.monotonic()
    version = publish(work, HOT, HOT)
    first_token_s = _first_answer(url, HOT, version) - started_s
    return answers(url, {HOT: HOT}, reference) | {"publish_to_first_token_s": round(first_token_s, 2)}


def churn(url: str, work: Path, base: Base, reference: Reference) -> Figures:
    """More adapters than the server keeps, one replaced and one removed; then every answer, twice, against PEFT."""
    replaced, removed = LATER
    for name in (HOT, *LATER):
        _first_answer(url, name, publish(work, name, name))
    _first_answer(url, replaced, publish(work, replaced, removed))
    adapter_store.remove(store_of(work), removed)
    _wait_until_gone(url, removed)
    weights: dict[str, str | None] = {base.name: None, HOT: HOT, replaced: removed}
    weights |= {f"a{n}": f"a{n}" for n in range(SERVED)}
    ask(url, list(weights))
    return answers(url, weights, reference) | {"adapters": len(weights) - 1, "kept_in_memory": SERVED + 1}


def throughput(target: Any, base: str, load: Load) -> Figures:
    """Tokens per second by load: the base alone, and the base with 8 adapters, at each concurrency."""
    figures = {}
    for concurrency in load.concurrencies:
        for adapters in (0, SERVED):
            if adapters and concurrency == 1:
                # One request at a time: the base or an adapter, never both.
                adapters = -1
            cell = Cell(adapters, concurrency)
            asyncio.run(tokens_per_s(target, cell._replace(load="warm-up"), base, seed=0, at_least_s=0.0))
            figures[cell.name] = round(
                asyncio.run(tokens_per_s(target, cell, base, seed=1, at_least_s=load.measured_s)), 1
            )
    return {"ok": None, "tokens_s": figures}


def first_token(url: str, base: str, load: Load) -> Figures:
    """Seconds to the first token of streams, base and adapters mixed, by percentile: `first_token_s`."""
    figures = {}
    for streams in load.streams:
        models = Cell(SERVED, streams).models(base)
        seconds = [s for turn in range(4) for s in asyncio.run(_stream_at_once(url, models, turn))]
        figures[f"c{streams}"] = {"n": len(seconds)} | {
            name: round(_percentile(seconds, share), 4) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        }
    return {"ok": None, "first_token_s": figures}


def drain(server: Server, base: str, streams: int) -> Figures:
    """Stop the server while answers are written: each must arrive whole. Not judged if all had ended by then."""
    url = server.base_url.removesuffix("/v1")
    models = Cell(SERVED, streams).models(base)
    running, whole = asyncio.run(_stop_during(server, url, models))
    return {"ok": whole == streams if running else None, "streams": streams, "running": running, "whole": whole}


async def _stop_during(server: Server, url: str, models: Sequence[str]) -> tuple[int, int]:
    """Stop the server once each stream has its first token; how many still run then, and how many end whole."""
    began = [asyncio.Event() for _ in models]

    async def stream(client: openai.AsyncOpenAI, model: str, started: asyncio.Event) -> bool:
        chunks: Any = await client.completions.create(
            model=model, prompt=PROMPTS[0], max_tokens=1000, temperature=0, stream=True, extra_body=EXACT
        )
        finished = False
        async for chunk in chunks:
            started.set()
            finished = finished or any(choice.finish_reason for choice in chunk.choices)
        return finished

    async with make_async_client(f"{url}/v1") as client:
        asked = [asyncio.create_task(stream(client, *pair)) for pair in zip(models, began, strict=True)]
        await asyncio.gather(*(event.wait() for event in began))
        running = sum(not task.done() for task in asked)
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        ended = await asyncio.gather(*asked, return_exceptions=True)
        await stopping
    return running, sum(end is True for end in ended)


async def _stream_at_once(url: str, models: Sequence[str], turn: int) -> list[float]:
    async with make_async_client(f"{url}/v1") as client:

        async def one(number: int, model: str) -> float:
            started_s = time.perf_counter()
            chunks: Any = await client.completions.create(
                model=model, prompt=f"{turn} {number} {PROMPTS[0]}", max_tokens=16, temperature=0, stream=True,
                extra_body=EXACT,
            )  # fmt: skip
            first_s = None
            async for _ in chunks:
                first_s = first_s or time.perf_counter() - started_s
            if first_s is None:
                raise RuntimeError(f"{model} sent no token")
            return first_s

        return await asyncio.gather(*(one(*pair) for pair in enumerate(models)))


def _percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


def _first_answer(url: str, name: str, version: str) -> float:
    """Wait until the server means `version` by `name`, ask for one token, and return the time."""
    with make_client(f"{url}/v1") as client:
        while _meaning(client, name) != version:
            time.sleep(0.02)
        client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=1)
    return time.monotonic()


def _wait_until_gone(url: str, name: str) -> None:
    with make_client(f"{url}/v1") as client:
        while _meaning(client, name) is not None:
            time.sleep(0.02)


def _meaning(client: openai.OpenAI, name: str) -> str | None:
    try:
        return str(client.models.retrieve(name).root)  # type: ignore[attr-defined]
    except openai.NotFoundError:
        return None
