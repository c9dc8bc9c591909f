"""Soak: 64 adapters through 4 slots under 16 streams, while adapters come, change and go and a worker is killed once.

    make soak-serve                                   (three minutes of load; about eight in all)
    python -m benchmarks.soak --seconds 60           (a short look)

Every answer is held against PEFT's greedy tokens for the exact version that the reply names. The last line of stdout is
one JSON object:

requests                      answered in full
wrong_answers                 of those, not PEFT's for the version that answered, or of a name that was not asked for
near_ties                     not PEFT's, but first different by a token that lost with PEFT by under 0.001 logits
                              (a server in bfloat16: 0.5)
errors                        by kind: ended with an HTTP error or a broken connection (the kill, names just removed)
lost                          ended without an answer and without an error
restarts                      of the engine, after the kill
rss_growth_mb                 memory of all server processes under load: end, minus half-way from the restart to the end
publish_to_first_token_p50_s  from before publish to the first token of an answer, n loads
first_token_p50_s             the streams' own requests, whose adapters were there all along and wait for a slot as well
publish_unserved              publishes without an answer within 10 s, those cut short by the kill left out
gap_ratio_during_load         longest gap between chunks of a stream that overlaps such a load, over the p99 of all;
                              taken where the server hands them out, since this client is itself held up by its work
gap_ratio_of_a_load_p50       the same for each load by itself; the median
gap_ratio_otherwise           longest gap that overlaps no load, over the same p99
gateway_throughput_ratio      tokens/s through our middleware over past it, on one engine of --gate-model: median of the
                              rounds' own ratios; gateway_throughput_ci95: what the median lies in, by order statistics
gateway_cpu_share             processor time that the middleware adds to the API process per token, over that of the
                              whole server: what it can cost at most where the cores are the limit
gateway_p50_ms                what the middleware adds to the latency of one short request at a time: median over pairs,
                              gateway_p50_ci95_ms: what that lies in
"""

import asyncio
import concurrent.futures
import os
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

from benchmarks.gateway_overhead import PAST_IT, gate_cost, model_process, processes_of
from benchmarks.soak_store import EXACTLY, N_TOKENS, PROMPTS, ROUNDED, Shop, ask
from counsel import store as adapter_store
from counsel.cli import Command, Result, main, option
from counsel.client import make_async_client
from serve.config import ServeConfig
from serve.gateway import App, Gateway
from serve.reply import Message, Send
from serve.request_body import Receive, Scope
from serve.server import Server
from serve.supervise import supervise
from tests.conftest import tiny_config

GATE = f"{Gateway.__module__}.{Gateway.__name__}"
GAPS = "COUNSEL_SOAK_GAPS"
EXACT = {"ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True)
class Soak:
    model: str = option("tiny", "base model; `tiny` is a random Gemma-2, made for the purpose")
    bfloat16: bool = option(False, "serve in bfloat16, as most models are; PEFT, and else the server, in float32")
    seconds: float = option(180.0, "seconds of load, half of it after the kill (the restart itself is not counted)")
    adapters: int = option(64, "adapters published at the start")
    streams: int = option(16, "streams at a time")
    gate_model: str = option("smollm2-135m", "base on which requests go through the middleware and past it")
    rounds: int = option(60, "interleaved rounds through the middleware and past it")
    round_s: float = option(1.0, "seconds of each half of such a round, and what its last answers take")


@dataclass
class Tally:
    """What the streams saw; times are seconds of the monotonic clock."""

    requests: int = 0
    wrong_answers: int = 0
    near_ties: int = 0
    lost: int = 0
    unserved: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    loads: list[tuple[float, float]] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)

    def error(self, error: Exception) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1


class Probe(Gateway):
    """Our middleware, with a way past it and a note of every gap between the chunks that leave it."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self.gaps = os.open(os.environ[GAPS], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and PAST_IT in scope["headers"]:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, self._timed(send))

    def _timed(self, send: Send) -> Send:
        last_s = 0.0

        async def timed(message: Message) -> None:
            nonlocal last_s
            if message.get("body"):
                now_s = time.monotonic()
                if last_s:
                    os.write(self.gaps, f"{now_s} {now_s - last_s}\n".encode())
                last_s = now_s
            await send(message)

        return timed


class Probed(Server):
    """A server with that middleware in the place of ours."""

    @property
    def gaps(self) -> Path:
        return self.config.log_dir / "gaps.txt"

    def command(self) -> tuple[str, ...]:
        os.environ[GAPS] = str(self.gaps.resolve())
        # By its full name: here this module may be __main__.
        return tuple("benchmarks.soak.Probe" if word == GATE else word for word in super().command())


def run(options: Soak) -> Result:
    """Run the soak; the exit status is 1 when an answer was wrong or lost."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        say(f"making {options.adapters} adapters, and asking PEFT what each answers")
        shop = Shop(folder, options.model, options.adapters, ROUNDED if options.bfloat16 else EXACTLY)
        chosen = {"max_loras": 4, "max_cpu_loras": 32, "restarts": 3, "compile": options.model != "tiny"}
        config = tiny_config(folder, shop.base.path, dtype=shop.precision.dtype, **chosen)
        figures: dict[str, Any] = {}
        with Probed(config) as server:
            stop = threading.Event()
            with concurrent.futures.ThreadPoolExecutor() as pool:
                keeper = pool.submit(supervise, server, stop)
                try:
                    figures |= asyncio.run(soak(server, shop, options))
                finally:
                    stop.set()
                keeper.result()
            figures["restarts"] = server.restarts
        gate = ServeConfig(model=options.gate_model, store=str(folder / "none"), logs=str(folder / "gate"), port=0)
        with Probed(gate) as server:
            figures |= asyncio.run(gate_cost(server, _a_long_answer, options.streams, options.rounds, options.round_s))
    return Result(figures, exit_status=int(bool(figures["wrong_answers"] or figures["lost"])))


async def soak(server: Probed, shop: Shop, options: Soak) -> dict[str, Any]:
    """Load, churn and one kill; return the figures."""
    tally, over = Tally(), asyncio.Event()
    streams = [asyncio.create_task(stream(server, shop, tally, over, seed)) for seed in range(options.streams)]
    churning = asyncio.create_task(churn(server, shop, tally, over))
    await asyncio.sleep(options.seconds / 2)
    say("killing the engine's worker; the streams go on asking")
    model_process(processes_of(server)).send_signal(signal.SIGKILL)
    async with asyncio.timeout(server.config.start_s):
        await _back(server)
    await asyncio.sleep(options.seconds / 4)
    rss_before = _rss_bytes(server)
    await asyncio.sleep(options.seconds / 4)
    rss_growth = _rss_bytes(server) - rss_before
    over.set()
    await asyncio.gather(*streams, churning)
    # (when, how long): the last line of a server that was killed may be torn.
    lines = [line.split() for line in server.gaps.read_text().splitlines()]
    gaps = [(float(line[0]), float(line[1])) for line in lines if len(line) == 2]
    p99_gap_s = _quantile([gap for _, gap in gaps], 0.99)
    longest = [
        max((gap for at, gap in gaps if at >= start and at - gap <= first), default=0.0) for start, first in tally.loads
    ]
    otherwise = max(
        gap for at, gap in gaps if not any(at >= start and at - gap <= first for start, first in tally.loads)
    )
    return {
        "requests": tally.requests,
        "wrong_answers": tally.wrong_answers,
        "near_ties": tally.near_ties,
        "errors": tally.errors,
        "lost": tally.lost,
        "rss_growth_mb": round(rss_growth / 1e6, 1),
        "publish_to_first_token_p50_s": round(statistics.median(first - start for start, first in tally.loads), 3),
        "publish_to_first_token_n": len(tally.loads),
        "first_token_p50_s": round(statistics.median(tally.first_tokens_s), 3),
        "publish_unserved": tally.unserved,
        "gap_p99_s": round(p99_gap_s, 4),
        "gap_ratio_during_load": round(max(longest) / p99_gap_s, 2),
        "gap_ratio_of_a_load_p50": round(statistics.median(longest) / p99_gap_s, 2),
        "gap_ratio_otherwise": round(otherwise / p99_gap_s, 2),
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
                answered, ids, finished, first_token_s = await _answer(client, model, prompt)
            except (openai.OpenAIError, OSError) as error:
                tally.error(error)
                await asyncio.sleep(0.5)
                continue
            if not finished:
                tally.lost += 1
                continue
            tally.requests += 1
            tally.first_tokens_s.append(first_token_s)
            wanted = shop.expected.get((answered, prompt)) if answered.split("@")[0] == model else None
            if wanted is not None and ids == wanted.ids:
                continue
            if wanted is not None and wanted.is_near_tie(ids, shop.precision.near_tie):
                tally.near_ties += 1
                continue
            tally.wrong_answers += 1
            say(f"wrong: asked {model}, {answered} said {ids}, PEFT {wanted and wanted.ids}")


async def _answer(client: openai.AsyncOpenAI, model: str, prompt: str) -> tuple[str, list[int], bool, float]:
    """Who answered, the tokens, whether to the end, and seconds to the first token (0.0: none came)."""
    answered, ids, finished, start_s, first_token_s = "", list[int](), False, time.monotonic(), 0.0
    chunks = await client.chat.completions.create(
        model=model,
        messages=ask(prompt),  # type: ignore[arg-type]
        max_completion_tokens=N_TOKENS,
        temperature=0,
        stream=True,
        extra_body=EXACT,
    )
    async for chunk in chunks:  # type: ignore[union-attr]
        answered = chunk.model
        for choice in chunk.choices:
            ids += getattr(choice, "token_ids", None) or []
            finished = finished or choice.finish_reason is not None
        if ids and not first_token_s:
            first_token_s = time.monotonic() - start_s
    return answered, ids, finished, first_token_s


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
            wanted = adapter_store.find(shop.store, name).id
            try:
                async with asyncio.timeout(10):
                    while await _meaning(client, name) != wanted:
                        await asyncio.sleep(0.02)
                    answered = (await client.completions.create(model=name, prompt="sleep", max_tokens=1)).model
            except TimeoutError:
                tally.unserved += 1
            except openai.APIError as error:
                tally.error(error)
            else:
                tally.loads.append((start_s, time.monotonic()))
                tally.wrong_answers += answered != wanted


async def _meaning(client: openai.AsyncOpenAI, name: str) -> str | None:
    """Which version a name means to the server; None while it knows none."""
    try:
        return (await client.models.retrieve(name)).root  # type: ignore[attr-defined]
    except openai.NotFoundError:
        return None


async def _a_long_answer(client: openai.AsyncOpenAI, model: str) -> int:
    """Ask for one; how many tokens it has."""
    await _answer(client, model, PROMPTS[0])
    return N_TOKENS


def _rss_bytes(server: Server) -> int:
    return sum(process.memory_info().rss for process in processes_of(server))


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main("benchmarks.soak", {"": Command(Soak, run, "soak a server with many adapters")}))
