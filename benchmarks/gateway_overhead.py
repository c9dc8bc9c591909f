"""What our middleware costs: requests through it and past it, in turns on one engine (keys: benchmarks/soak.py).

Rates of one engine differ between rounds by far more than the middleware could take. The processor time of the API
process does not, and where the cores are the limit, what the middleware takes of them is what it costs in throughput.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import openai
import psutil

from counsel.client import make_async_client
from serve.server import Server

# A request with this header goes past the middleware, where the server was started with benchmarks.soak.Probe.
PAST_IT = (b"x-past-the-gate", b"1")
WARM_UP_ROUNDS = 2
SHORT_REQUESTS = 400

Answer = Callable[[openai.AsyncOpenAI, str], Awaitable[int]]


class Load(NamedTuple):
    """One half of a round: tokens answered, how long it took, and processor seconds of the API process and of all."""

    n_tokens: int
    clock_s: float
    api_s: float
    server_s: float


async def gate_cost(server: Server, answer: Answer, streams: int, rounds: int, round_s: float) -> dict[str, Any]:
    """Tokens/s, processor time and latency with the middleware beside those without it.

    `answer` asks a model for one long streamed answer and returns its tokens; `streams` of them run side by side.
    """
    loads: dict[bool, list[Load]] = {True: [], False: []}
    headers = {True: {}, False: {PAST_IT[0].decode(): PAST_IT[1].decode()}}
    order = [True, False]
    for number in range(-WARM_UP_ROUNDS, rounds):
        # Whoever goes first in one round goes second in the next.
        order.reverse()
        for is_gated in order:
            # A new client each time: the server closes connections that rest for five seconds.
            async with make_async_client(server.base_url) as client:
                asking = client.with_options(default_headers=headers[is_gated])
                load = await _load(server, asking, answer, streams, round_s)
            if number >= 0:
                loads[is_gated].append(load)
    ratios = [
        (gated.n_tokens / gated.clock_s) / (past.n_tokens / past.clock_s)
        for gated, past in zip(loads[True], loads[False], strict=True)
    ]
    async with make_async_client(server.base_url) as client:
        sides = {is_gated: client.with_options(default_headers=headers[is_gated]) for is_gated in order}
        # One of each in turn, so that whatever slows the machine for a while slows both.
        pairs = [
            [await _latency_s(sides[is_gated], server.base.name) for is_gated in (True, False)]
            for _ in range(SHORT_REQUESTS)
        ]
    added_s = [gated_s - past_s for gated_s, past_s in pairs]
    return {
        "gateway_throughput_ratio": round(statistics.median(ratios), 3),
        "gateway_throughput_ci95": [round(bound, 3) for bound in median_interval(ratios)],
        "gateway_throughput_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "gateway_rounds": len(ratios),
        "gateway_cpu_share": round(cpu_share(loads[True], loads[False]), 4),
        "gateway_p50_ms": round(statistics.median(added_s) * 1e3, 2),
        "gateway_p50_ci95_ms": [round(bound * 1e3, 2) for bound in median_interval(added_s)],
        "gateway_latency_n": len(added_s),
    }


def cpu_share(gated: list[Load], past: list[Load]) -> float:
    """What the API process spends more per token with the gate, over what the server spends per token past it."""
    n_gated, n_past = (sum(load.n_tokens for load in loads) for loads in (gated, past))
    added_s = sum(load.api_s for load in gated) / n_gated - sum(load.api_s for load in past) / n_past
    return added_s / (sum(load.server_s for load in past) / n_past)


def median_interval(values: list[float]) -> tuple[float, float]:
    """What the median of these draws lies in with a probability of 95 % or more, whatever they are distributed like.

    Order statistics: the chance that k or fewer of n draws are below the median is binomial (n, 1/2). Fewer than six
    draws give their whole range.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    outside = int(binom.ppf(0.025, len(ordered), 0.5))
    below = max(0, outside - 1 if binom.cdf(outside, len(ordered), 0.5) > 0.025 else outside)
    return ordered[below], ordered[-1 - below]


def processes_of(server: Server) -> list[psutil.Process]:
    """All of a running server, the API process first."""
    assert server.pid is not None
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


def model_process(processes: list[psutil.Process]) -> psutil.Process:
    """The one that holds the model, by the title vLLM gives it: the engine core, or the worker below it."""
    return [process for process in processes if process.name().startswith("VLLM::")][-1]


async def _load(server: Server, client: openai.AsyncOpenAI, answer: Answer, streams: int, round_s: float) -> Load:
    before_s, start_s = _spent_s(server), time.monotonic()

    async def stream() -> int:
        n_tokens = 0
        while time.monotonic() < start_s + round_s:
            n_tokens += await answer(client, server.base.name)
        return n_tokens

    n_tokens = sum(await asyncio.gather(*(stream() for _ in range(streams))))
    # To the last token, not to the end that was planned: the last answers are counted whole.
    clock_s = time.monotonic() - start_s
    api_s, *others_s = (after - before for after, before in zip(_spent_s(server), before_s, strict=True))
    return Load(n_tokens, clock_s, api_s, api_s + sum(others_s))


async def _latency_s(client: openai.AsyncOpenAI, model: str) -> float:
    """Of one short request by itself."""
    start_s = time.perf_counter()
    await client.completions.create(model=model, prompt="sleep", max_tokens=1)
    return time.perf_counter() - start_s


def _spent_s(server: Server) -> list[float]:
    """Processor seconds of each process so far, the API process first."""
    return [sum(process.cpu_times()[:2]) for process in processes_of(server)]
