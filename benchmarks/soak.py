"""Soak: 64 adapters share 4 slots under 16 streams, while adapters are published, replaced and removed, and the worker
is killed once.

    make soak-serve                                   (three minutes of load; about eight in all)
    python -m benchmarks.soak --seconds 60           (a shorter run)

Every answer is compared with PEFT's greedy tokens for the exact version that the reply names. The last line of stdout
is one JSON object:

requests                      answered in full
wrong_answers                 of those, answers that differ from PEFT's, or came from a model that was not asked
near_ties                     answers whose first different token lost with PEFT by less than 0.001 logits (0.5 on a
                              server in bfloat16); not counted as wrong
errors                        requests that ended in an HTTP error or a broken connection (by the kill, or for a name
                              just removed), by kind
lost                          requests that ended without an answer and without an error
restarts                      restarts of the engine, after the kill
processor                     the CPU, with the extension that decides its speed
rss_growth_mb                 memory of all server processes at the end of the load, minus that halfway between the
                              restart and the end
publish_to_first_token_p50_s  from just before publish to the first token of an answer; publish_to_first_token_n: how
                              many such loads
first_token_p50_s             time to first token of the streams' requests, whose adapters also wait for a slot
publish_unserved              publishes without an answer within 10 s, except those that the kill interrupted
gap_p99_s                     p99 of the gaps between chunks of a stream, taken in the server, because this client's own
                              work delays it
gap_ratio_during_load         longest gap that overlaps such a load, over that p99
gap_ratio_of_a_load_p50       the same for each load; the median
gap_ratio_otherwise           longest gap that overlaps no load, over that p99
gateway_throughput_ratio      tokens/s through the gateway over tokens/s around it, on one engine of --gateway-model:
                              median of the ratios per round, of which there are gateway_rounds;
                              gateway_throughput_ci95: its confidence interval; gateway_throughput_range
gateway_cpu_share             processor time per token that the gateway adds to the API process, over the whole
                              server's: the most it can cost where the cores are the limit
gateway_p50_ms                latency that the gateway adds to one short request at a time: median over
                              gateway_latency_n pairs; gateway_p50_ci95_ms: its confidence interval
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

from benchmarks.gateway_overhead import BYPASS, gateway_cost, model_process, processes_of
from benchmarks.soak_store import EXACTLY, N_TOKENS, PROMPTS, ROUNDED, SoakStore, messages
from counsel import store as adapter_store
from counsel.cli import Command, Result, main, option
from counsel.client import make_async_client
from counsel.processor import processor
from serve.config import ServeConfig
from serve.gateway import App, Gateway
from serve.reply import Message, Send
from serve.request_body import Receive, Scope
from serve.server import Server
from serve.supervise import supervise
from tests.conftest import tiny_config

GATEWAY = f"{Gateway.__module__}.{Gateway.__name__}"
GAPS = "COUNSEL_SOAK_GAPS"
EXACT = {"ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True)
class Soak:
    """What to serve, and how much load to put on it."""

    model: str = option("tiny", "base model; `tiny` is a random Gemma-2 made for this run")
    bfloat16: bool = option(False, "serve in bfloat16, as most models are, instead of float32 (PEFT stays in float32)")
    seconds: float = option(180.0, "seconds of load, half of them after the kill, without the restart itself")
    adapters: int = option(64, "adapters published at the start")
    streams: int = option(16, "concurrent streams")
    gateway_model: str = option("smollm2-135m", "base on which the cost of the gateway is measured")
    rounds: int = option(60, "rounds through the gateway and around it")
    round_s: float = option(1.0, "seconds of each half of such a round; answers in progress then finish")


@dataclass
class Tally:
    """What the streams and the churn count. Times are seconds of the monotonic clock."""

    requests: int = 0
    wrong_answers: int = 0
    near_ties: int = 0
    lost: int = 0
    unserved: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    loads: list[tuple[float, float]] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)

    def count_error(self, error: Exception) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1


class ProbedGateway(Gateway):
    """The gateway with a bypass, which also writes down every gap between the chunks that it sends."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self.gaps = os.open(os.environ[GAPS], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and BYPASS in scope["headers"]:
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


class ProbedServer(Server):
    """A server with ProbedGateway in place of the gateway."""

    @property
    def gaps(self) -> Path:
        return self.config.log_dir / "gaps.txt"

    def command(self) -> tuple[str, ...]:
        os.environ[GAPS] = str(self.gaps.resolve())
        # A literal name, because this module may be __main__.
        return tuple("benchmarks.soak.ProbedGateway" if word == GATEWAY else word for word in super().command())


def run(options: Soak) -> Result:
    """Run the soak; the exit status is 1 if an answer was wrong or lost."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log(f"making {options.adapters} adapters, with PEFT's answers for each")
        store = SoakStore(folder, options.model, options.adapters, ROUNDED if options.bfloat16 else EXACTLY)
        settings = {"max_loras": 4, "max_cpu_loras": 32, "restarts": 3, "compile": options.model != "tiny"}
        config = tiny_config(folder, store.base.path, dtype=store.precision.dtype, **settings)
        figures: dict[str, Any] = {}
        with ProbedServer(config) as server:
            stop = threading.Event()
            with concurrent.futures.ThreadPoolExecutor() as pool:
                keeper = pool.submit(supervise, server, stop)
                try:
                    figures |= asyncio.run(soak(server, store, options))
                finally:
                    stop.set()
                keeper.result()
            figures |= {"restarts": server.restarts, "processor": str(processor())}
        config = ServeConfig(
            model=options.gateway_model, store=str(folder / "none"), logs=str(folder / "gateway"), port=0, safety="off"
        )
        with ProbedServer(config) as server:
            figures |= asyncio.run(gateway_cost(server, _ask_long, options.streams, options.rounds, options.round_s))
    return Result(figures, exit_status=int(bool(figures["wrong_answers"] or figures["lost"])))


async def soak(server: ProbedServer, store: SoakStore, options: Soak) -> dict[str, Any]:
    """Run streams, churn and one kill; return the results."""
    tally, over = Tally(), asyncio.Event()
    streams = [asyncio.create_task(stream(server, store, tally, over, seed)) for seed in range(options.streams)]
    churning = asyncio.create_task(churn(server, store, tally, over))
    await asyncio.sleep(options.seconds / 2)
    log("killing the engine's worker; the streams keep asking")
    model_process(processes_of(server)).send_signal(signal.SIGKILL)
    async with asyncio.timeout(server.config.start_s):
        await _restarted(server)
    await asyncio.sleep(options.seconds / 4)
    rss_before = _rss_bytes(server)
    await asyncio.sleep(options.seconds / 4)
    rss_growth = _rss_bytes(server) - rss_before
    over.set()
    await asyncio.gather(*streams, churning)
    # (time, length). The last line of a killed server may be incomplete.
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


async def _restarted(server: Server) -> None:
    """Return once the server has stopped answering and answers again."""
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


async def stream(server: Server, store: SoakStore, tally: Tally, over: asyncio.Event, seed: int) -> None:
    """One client: ask a random live adapter (or the base) until the end, and check each answer."""
    rng = random.Random(seed)
    async with make_async_client(server.base_url, timeout_s=60) as client:
        while not over.is_set():
            model, prompt = rng.choice([*store.live, store.base.name]), rng.choice(PROMPTS)
            try:
                answered, ids, finished, first_token_s = await _answer(client, model, prompt)
            except (openai.OpenAIError, OSError) as error:
                tally.count_error(error)
                await asyncio.sleep(0.5)
                continue
            if not finished:
                tally.lost += 1
                continue
            tally.requests += 1
            tally.first_tokens_s.append(first_token_s)
            expected = store.expected.get((answered, prompt)) if answered.split("@")[0] == model else None
            if expected is not None and ids == expected.ids:
                continue
            if expected is not None and expected.is_near_tie(ids, store.precision.near_tie):
                tally.near_ties += 1
                continue
            tally.wrong_answers += 1
            log(f"wrong: asked {model}, {answered} answered {ids}, PEFT {expected and expected.ids}")


async def _answer(client: openai.AsyncOpenAI, model: str, prompt: str) -> tuple[str, list[int], bool, float]:
    """Which model answered, the tokens, whether it finished, and seconds to the first token (0.0: none came)."""
    answered, ids, finished, start_s, first_token_s = "", list[int](), False, time.monotonic(), 0.0
    chunks = await client.chat.completions.create(
        model=model,
        messages=messages(prompt),  # type: ignore[arg-type]
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


async def churn(server: Server, store: SoakStore, tally: Tally, over: asyncio.Event) -> None:
    """Every two seconds publish a new name, replace one or remove one; time each new version until its first token."""
    rng, number = random.Random(99), 0
    async with make_async_client(server.base_url, timeout_s=60) as client:
        while not over.is_set():
            await asyncio.sleep(2)
            number += 1
            if number % 3 == 0:
                store.remove(rng.choice(store.live))
                continue
            name = f"new{number}" if number % 3 == 1 else rng.choice(store.live)
            start_s = time.monotonic()
            await asyncio.to_thread(store.publish, name)
            version = adapter_store.find(store.path, name).id
            try:
                async with asyncio.timeout(10):
                    while await _current_version(client, name) != version:
                        await asyncio.sleep(0.02)
                    answered = (await client.completions.create(model=name, prompt="sleep", max_tokens=1)).model
            except TimeoutError:
                tally.unserved += 1
            except openai.APIError as error:
                tally.count_error(error)
            else:
                tally.loads.append((start_s, time.monotonic()))
                tally.wrong_answers += answered != version


async def _current_version(client: openai.AsyncOpenAI, name: str) -> str | None:
    """The version that the server serves under a name; None if it does not serve the name."""
    try:
        return (await client.models.retrieve(name)).root  # type: ignore[attr-defined]
    except openai.NotFoundError:
        return None


async def _ask_long(client: openai.AsyncOpenAI, model: str) -> int:
    """Ask for a long answer; return its number of tokens."""
    await _answer(client, model, PROMPTS[0])
    return N_TOKENS


def _rss_bytes(server: Server) -> int:
    return sum(process.memory_info().rss for process in processes_of(server))


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main("benchmarks.soak", {"": Command(Soak, run, "soak a server with many adapters")}))
