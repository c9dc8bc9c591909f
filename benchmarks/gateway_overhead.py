"""What the gateway costs: requests through it and around it, alternately on one engine (keys: benchmarks/soak.py).

One engine's throughput differs between rounds by far more than the gateway could cost. The processor time of the API
process does not: where the cores are the limit, the gateway's share of it is what it costs in throughput.
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

# A request with this header bypasses the gateway, on a server started with benchmarks.soak.ProbedGateway.
BYPASS = (b"x-bypass-gateway", b"1")
WARM_UP_ROUNDS = 2
SHORT_REQUESTS = 400

Answer = Callable[[openai.AsyncOpenAI, str], Awaitable[int]]


class HalfRound(NamedTuple):
    """One half of a round: its tokens and length, and processor seconds of the API process and of all processes."""

    n_tokens: int
    clock_s: float
    api_s: float
    server_s: float


async def gateway_cost(server: Server, answer: Answer, streams: int, rounds: int, round_s: float) -> dict[str, Any]:
    """Measure tokens/s, processor time and latency with the gateway and without it.

    `answer` asks a model for one long streamed answer and returns its number of tokens; `streams` run concurrently.
    """
    loads: dict[str, list[HalfRound]] = {"gateway": [], "bypass": []}
    headers = {"gateway": {}, "bypass": {BYPASS[0].decode(): BYPASS[1].decode()}}
    order = list(loads)
    for number in range(-WARM_UP_ROUNDS, rounds):
        # The order alternates from round to round.
        order.reverse()
        for path in order:
            # A new client each time, because the server closes connections that were idle for five seconds.
            async with make_async_client(server.base_url) as client:
                load = await _load(server, client.with_options(default_headers=headers[path]), answer, streams, round_s)
            if number >= 0:
                loads[path].append(load)
    ratios = [
        (gateway.n_tokens / gateway.clock_s) / (bypass.n_tokens / bypass.clock_s)
        for gateway, bypass in zip(loads["gateway"], loads["bypass"], strict=True)
    ]
    async with make_async_client(server.base_url) as client:
        clients = {path: client.with_options(default_headers=headers[path]) for path in headers}
        # Alternately, so that a slow phase of the machine slows both.
        pairs = [
            [await _latency_s(clients[path], server.base.name) for path in ("gateway", "bypass")]
            for _ in range(SHORT_REQUESTS)
        ]
    added_s = [gateway_s - bypass_s for gateway_s, bypass_s in pairs]
    return {
        "gateway_throughput_ratio": round(statistics.median(ratios), 3),
        "gateway_throughput_ci95": [round(bound, 3) for bound in median_interval(ratios)],
        "gateway_throughput_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "gateway_rounds": len(ratios),
        "gateway_cpu_share": round(cpu_share(loads["gateway"], loads["bypass"]), 4),
        "gateway_p50_ms": round(statistics.median(added_s) * 1e3, 2),
        "gateway_p50_ci95_ms": [round(bound * 1e3, 2) for bound in median_interval(added_s)],
        "gateway_latency_n": len(added_s),
    }


def cpu_share(gateway: list[HalfRound], bypass: list[HalfRound]) -> float:
    """Processor time per token that the gateway adds to the API process, over the whole server's without it."""
    n_gateway, n_bypass = (sum(load.n_tokens for load in loads) for loads in (gateway, bypass))
    added_s = sum(load.api_s for load in gateway) / n_gateway - sum(load.api_s for load in bypass) / n_bypass
    return added_s / (sum(load.server_s for load in bypass) / n_bypass)


def median_interval(values: list[float]) -> tuple[float, float]:
    """A confidence interval of 95 % or more for the median, whatever the distribution of the values.

    By order statistics: the number of n values below the median is binomial (n, 1/2). With fewer than six values the
    interval is their range.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    outside = int(binom.ppf(0.025, len(ordered), 0.5))
    below = max(0, outside - 1 if binom.cdf(outside, len(ordered), 0.5) > 0.025 else outside)
    return ordered[below], ordered[-1 - below]


def processes_of(server: Server) -> list[psutil.Process]:
    """All processes of a running server, the API process first."""
    assert server.pid is not None
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


def model_process(processes: list[psutil.Process]) -> psutil.Process:
    """The process that holds the model, found by the title that vLLM gives it: the engine core, or its worker."""
    return [process for process in processes if process.name().startswith("VLLM::")][-1]


async def _load(server: Server, client: openai.AsyncOpenAI, answer: Answer, streams: int, round_s: float) -> HalfRound:
    before_s, start_s = cpu_s(server), time.monotonic()

    async def stream() -> int:
        n_tokens = 0
        while time.monotonic() < start_s + round_s:
            n_tokens += await answer(client, server.base.name)
        return n_tokens

    n_tokens = sum(await asyncio.gather(*(stream() for _ in range(streams))))
    # Until the last token, because the last answers are counted in full.
    clock_s = time.monotonic() - start_s
    api_s, *others_s = (after - before for after, before in zip(cpu_s(server), before_s, strict=True))
    return HalfRound(n_tokens, clock_s, api_s, api_s + sum(others_s))


async def _latency_s(client: openai.AsyncOpenAI, model: str) -> float:
    """Seconds of one short request, with no other running."""
    start_s = time.perf_counter()
    await client.completions.create(model=model, prompt="sleep", max_tokens=1)
    return time.perf_counter() - start_s


def cpu_s(server: Server) -> list[float]:
    """Processor seconds of each process so far, the API process first."""
    return [sum(process.cpu_times()[:2]) for process in processes_of(server)]
