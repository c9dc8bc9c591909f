"""Soak: 64 adapters through 4 slots under 16 streams, while adapters come, change and go and a worker is killed once.

    make soak-serve                                   (three minutes of load; about six in all)
    python -m tests.soak_serve --seconds 60           (a short look)

Every answer is held against PEFT's greedy tokens for the exact version that the reply names. The last line of stdout is
one JSON object:

requests                      answered in full
wrong_answers                 of those, not PEFT's
errors                        ended with an HTTP error or a broken connection (the kill, and names just removed)
lost                          ended without an answer and without an error
restarts                      of the engine, after the kill
rss_growth_mb                 memory of all server processes: end, minus half-way between the restart and the end
publish_to_first_token_p50_s  from before publish to the first token of an answer, n loads
gap_ratio_during_load         longest gap between tokens in a running stream while an adapter loads, over their p99 gap
gateway_throughput_ratio      tokens/s through our middleware over the same engine without it, interleaved
gateway_p50_ms                what the middleware adds to the median latency of one short request at a time
"""

import asyncio
import contextlib
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil

from serve.client import make_async_client
from serve.server import Server
from serve.supervise import supervise
from tests.conftest import tiny_config
from tests.greedy import greedy_answers
from tests.tiny import tiny_adapter, tiny_base
from train import store as shelves
from train.catalog import Base, resolve
from train.command import Command, Result, main, option

N_TOKENS = 24
PROMPTS = ("i feel lonely since we moved", "work is hard what can help me sleep")
EXACT = {"ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True)
class Soak:
    model: str = option("tiny", "base model; `tiny` is a random Gemma-2, made for the purpose")
    seconds: float = option(180.0, "seconds of load, half of it after the kill (the restart itself is not counted)")
    adapters: int = option(64, "adapters published at the start")
    streams: int = option(16, "streams at a time")
    rounds: int = option(3, "interleaved rounds with and without the middleware")
    round_s: float = option(8.0, "seconds of each such round")


@dataclass
class Tally:
    """What the streams saw; times are seconds of the monotonic clock."""

    requests: int = 0
    wrong_answers: int = 0
    lost: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    loads: list[tuple[float, float]] = field(default_factory=list)

    def error(self, error: Exception) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1


class Bare(Server):
    """The same server without our middleware."""

    def command(self) -> tuple[str, ...]:
        return self.plan().argv


class Shop:
    """The adapters on disk, the store, and what PEFT says for each exact version."""

    def __init__(self, folder: Path, model: str, n: int) -> None:
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        # Tiny products gain nothing from a second thread, and lose much where cores are shared.
        torch.set_num_threads(1)
        self.folder, self.store = folder, folder / "store"
        self.base: Base = resolve(str(tiny_base(folder / "tiny")) if model == "tiny" else model)
        self.expected: dict[tuple[str, str], list[int]] = {}
        self.live: list[str] = []
        self._n_made = 0
        for prompt, ids in self._answers(None).items():
            self.expected[self.base.name, prompt] = ids
        # Those published later reuse contents, but never for the same name twice in a row.
        self.spare = [self.make() for _ in range(n + 8)]
        for number in range(n):
            self.publish(f"adapter{number}")

    def make(self) -> tuple[Path, dict[str, list[int]]]:
        self._n_made += 1
        path = tiny_adapter(self.base.path, self.folder / str(self._n_made), seed=self._n_made)
        return path, self._answers(path)

    def _answers(self, path: Path | None) -> dict[str, list[int]]:
        asked = [_ask(prompt) for prompt in PROMPTS]
        return dict(zip(PROMPTS, greedy_answers(self.base.path, path, asked, N_TOKENS), strict=True))

    def publish(self, name: str) -> None:
        path, answers = self.spare.pop(0)
        manifest = shelves.publish(self.store, name, path, self.base)
        for prompt, ids in answers.items():
            self.expected[manifest.id, prompt] = ids
        self.spare.append((path, answers))
        if name not in self.live:
            self.live.append(name)

    def remove(self, name: str) -> None:
        self.live.remove(name)
        shelves.remove(self.store, name)


def run(options: Soak) -> Result:
    """Run the soak; the exit status is 1 when an answer was wrong or lost."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        say(f"making {options.adapters} adapters, and asking PEFT what each answers")
        shop = Shop(folder, options.model, options.adapters)
        config = tiny_config(folder, shop.base.path, slots=4, host_adapters=32, restarts=3)
        figures: dict[str, Any] = {}
        with Server(config) as server:
            stop = threading.Event()
            restarts: list[int] = []
            keeper = threading.Thread(target=lambda: restarts.append(supervise(server, stop)))
            keeper.start()
            try:
                figures |= asyncio.run(soak(server, shop, options))
            finally:
                stop.set()
                keeper.join()
            figures["restarts"] = restarts[0]
            with Bare(tiny_config(folder / "bare", shop.base.path)) as bare:
                figures |= asyncio.run(compare(server, bare, shop.base.name, options))
    return Result(figures, exit_status=int(bool(figures["wrong_answers"] or figures["lost"])))


async def soak(server: Server, shop: Shop, options: Soak) -> dict[str, Any]:
    """Load, churn and one kill; return the figures."""
    tally, over = Tally(), asyncio.Event()
    streams = [asyncio.create_task(stream(server, shop, tally, over, seed)) for seed in range(options.streams)]
    churning = asyncio.create_task(churn(server, shop, tally, over))
    await asyncio.sleep(options.seconds / 2)
    say("killing the engine's worker; the streams go on asking")
    _worker(server).send_signal(signal.SIGKILL)
    await _back(server)
    await asyncio.sleep(options.seconds / 4)
    rss_before = _rss_bytes(server)
    await asyncio.sleep(options.seconds / 4)
    over.set()
    await asyncio.gather(*streams, churning)
    p99_gap_s = _quantile([gap for _, gap in tally.gaps], 0.99)
    # A gap counts when it ended in the window of a load.
    longest_s = max(gap for start, first in tally.loads for at, gap in tally.gaps if start <= at <= first)
    return {
        "requests": tally.requests,
        "wrong_answers": tally.wrong_answers,
        "errors": tally.errors,
        "lost": tally.lost,
        "rss_growth_mb": round((_rss_bytes(server) - rss_before) / 1e6, 1),
        "publish_to_first_token_p50_s": round(statistics.median(first - start for start, first in tally.loads), 3),
        "publish_to_first_token_n": len(tally.loads),
        "gap_p99_s": round(p99_gap_s, 4),
        "gap_ratio_during_load": round(longest_s / p99_gap_s, 2),
    }


async def _back(server: Server) -> None:
    async with make_async_client(server.base_url) as client:
        was_up = True
        while True:
            try:
                await client.models.list()
            except openai.OpenAIError:
                was_up = False
            else:
                if not was_up:
                    return
            await asyncio.sleep(0.2)


async def stream(server: Server, shop: Shop, tally: Tally, over: asyncio.Event, seed: int) -> None:
    """One caller: ask a random live adapter (or the base) again and again, and judge each answer."""
    chance = random.Random(seed)
    async with make_async_client(server.base_url, timeout_s=60) as client:
        while not over.is_set():
            model, prompt = chance.choice([*shop.live, shop.base.name]), chance.choice(PROMPTS)
            try:
                answered, ids, finished = await _answer(client, model, prompt, tally)
            except (openai.OpenAIError, OSError) as error:
                tally.error(error)
                await asyncio.sleep(0.5)
                continue
            if not finished:
                tally.lost += 1
                continue
            tally.requests += 1
            if answered.split("@")[0] != model or ids != shop.expected.get((answered, prompt)):
                tally.wrong_answers += 1
                say(f"wrong: asked {model}, {answered} said {ids}")


async def _answer(client: openai.AsyncOpenAI, model: str, prompt: str, tally: Tally) -> tuple[str, list[int], bool]:
    answered, ids, finished, last_s = "", list[int](), False, 0.0
    chunks = await client.chat.completions.create(
        model=model,
        messages=_ask(prompt),  # type: ignore[arg-type]
        max_completion_tokens=N_TOKENS,
        temperature=0,
        stream=True,
        extra_body=EXACT,
    )
    async for chunk in chunks:
        answered = chunk.model
        for choice in chunk.choices:
            ids += getattr(choice, "token_ids", None) or []
            finished = finished or choice.finish_reason is not None
        now_s = time.monotonic()
        if last_s:
            tally.gaps.append((now_s, now_s - last_s))
        last_s = now_s
    return answered, ids, finished


async def churn(server: Server, shop: Shop, tally: Tally, over: asyncio.Event) -> None:
    """Every two seconds publish a new name, replace one or remove one; time each new version to its first token."""
    chance, number = random.Random(99), 0
    async with make_async_client(server.base_url, timeout_s=60) as client:
        while not over.is_set():
            await asyncio.sleep(2)
            number += 1
            if number % 3 == 0:
                shop.remove(chance.choice(shop.live))
                continue
            name = f"new{number}" if number % 3 == 1 else chance.choice(shop.live)
            start_s = time.monotonic()
            await asyncio.to_thread(shop.publish, name)
            wanted = shelves.find(shop.store, name).id
            with contextlib.suppress(openai.APIError):
                while time.monotonic() < start_s + 10:
                    with contextlib.suppress(openai.NotFoundError):
                        reply = await client.completions.create(model=name, prompt="sleep", max_tokens=1)
                        if reply.model == wanted:
                            tally.loads.append((start_s, time.monotonic()))
                            break
                    await asyncio.sleep(0.02)


async def compare(gated: Server, bare: Server, model: str, options: Soak) -> dict[str, Any]:
    """Tokens/s and single-request latency with and without the middleware, in turns."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    latencies_s: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.rounds):
        for is_gated, server in ((True, gated), (False, bare)):
            async with make_async_client(server.base_url) as client:
                end_s = time.monotonic() + options.round_s
                workers = [asyncio.create_task(_tokens(client, model, end_s)) for _ in range(options.streams)]
                rates[is_gated].append(sum(await asyncio.gather(*workers)) / options.round_s)
                for _ in range(100):
                    start_s = time.perf_counter()
                    await client.completions.create(model=model, prompt="sleep", max_tokens=1)
                    latencies_s[is_gated].append(time.perf_counter() - start_s)
    medians = {is_gated: statistics.median(values) for is_gated, values in rates.items()}
    added_s = statistics.median(latencies_s[True]) - statistics.median(latencies_s[False])
    return {
        "gateway_throughput_ratio": round(medians[True] / medians[False], 3),
        "tokens_per_s_with": [round(rate) for rate in rates[True]],
        "tokens_per_s_without": [round(rate) for rate in rates[False]],
        "gateway_p50_ms": round(added_s * 1e3, 2),
        "gateway_latency_n": len(latencies_s[True]),
    }


async def _tokens(client: openai.AsyncOpenAI, model: str, end_s: float) -> int:
    n_tokens = 0
    while time.monotonic() < end_s:
        await _answer(client, model, PROMPTS[0], Tally())
        n_tokens += N_TOKENS
    return n_tokens


def _ask(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _processes(server: Server) -> list[psutil.Process]:
    assert server.pid is not None
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


def _worker(server: Server) -> psutil.Process:
    """The process that runs the model: the largest."""
    return max(_processes(server)[1:], key=lambda process: process.memory_info().rss)


def _rss_bytes(server: Server) -> int:
    return sum(process.memory_info().rss for process in _processes(server))


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main("tests.soak_serve", {"": Command(Soak, run, "soak a server with many adapters")}))
