"""What the crisis gate costs: the same load with it and without it, alternately on one engine.

    make bench-gate                                   (both models; about 15 minutes)
    python -m benchmarks.gate --models smollm2-135m --rounds 6

Streams talk: each asks in turns of one conversation of random words, then begins another, so no text repeats and a
request brings its earlier turns along. Answers have 48 to 208 tokens, 128 on average, never end early, and are
streamed. The last line of stdout is one JSON object: `processor`, `streams`, and in `models`, by model:

throughput_ratio      tokens/s with the gate over without it: median of the ratios per round, of which there are
                      `rounds`; throughput_ci95 and throughput_range: of those ratios
tokens_s              without the gate: median of the rounds
first_token_ms        added to the first token while `streams` run: difference of the medians of all requests;
                      first_token_n: of how many, with the gate
first_token_c1_ms     added to the first token of one request at a time: median over first_token_c1_n pairs;
                      first_token_c1_ci95_ms: its confidence interval
cpu_share             processor time per token that the gate adds to the API process, over the whole server's without
                      it: the most it can cost where the cores are the limit; it differs less between rounds
cpu_ms_per_request    the processor time that it adds to one request
"""

import asyncio
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from benchmarks.gateway_overhead import HalfRound, cpu_s, cpu_share, median_interval
from counsel.cli import Command, Result, main, option
from counsel.client import make_async_client
from counsel.processor import processor
from counsel.values import PositiveFloat, PositiveInt, check_bounds
from serve.config import ServeConfig
from serve.gateway import Gateway, RequestLog, Service
from serve.reply import Reply
from serve.request_body import Receive, Scope
from serve.server import Server
from tests.conftest import tiny_config
from tests.tiny import tiny_base

GATEWAY = f"{Gateway.__module__}.{Gateway.__name__}"
# A request with this header finds the gate off.
UNGATED = (b"x-no-gate", b"1")
ARMS: Mapping[str, Mapping[str, str]] = {"on": {}, "off": {UNGATED[0].decode(): UNGATED[1].decode()}}
WARM_UP_ROUNDS = 1
TURNS = 3
LEAST_TOKENS, MOST_TOKENS = 48, 208
# Half of the questions on CounselChat have 46 words or more; what follows in a conversation is shorter.
FIRST_WORDS, LATER_WORDS = (10, 90), (4, 30)
_TEXT = (
    "i my the a to and of in me is was with for he she they we you at on about when how what so but not feel work "
    "friend mother husband week night school house sleep money always never because told think want know talk time "
    "years day back phone tired angry lonely upset worried partner job class dinner weekend family sister argue help"
)
WORDS = _TEXT.split()


@dataclass(frozen=True)
class BenchGate:
    """What to measure, and how often."""

    models: tuple[str, ...] = option(("tiny", "smollm2-135m"), "base models; `tiny` is a random Gemma-2")
    streams: PositiveInt = option(16, "concurrent streams")
    rounds: PositiveInt = option(8, "rounds with the gate and without it")
    round_s: PositiveFloat = option(15.0, "seconds of each half of a round; answers in progress then finish")
    pairs: PositiveInt = option(60, "requests one at a time with the gate, and as many without it")

    def __post_init__(self) -> None:
        check_bounds(self)


class SwitchedGateway(Gateway):
    """The gateway, whose gate is off for requests with the header UNGATED."""

    async def _generate(
        self, service: Service, request_log: RequestLog, scope: Scope, receive: Receive, reply: Reply
    ) -> None:
        if UNGATED in scope["headers"]:
            service = dataclasses.replace(service, safety=None)
        await super()._generate(service, request_log, scope, receive, reply)


class SwitchedServer(Server):
    """A server with SwitchedGateway in place of the gateway."""

    def command(self) -> tuple[str, ...]:
        # A literal name, because this module may be __main__.
        return tuple("benchmarks.gate.SwitchedGateway" if word == GATEWAY else word for word in super().command())


@dataclass
class Arm:
    """What was measured with the gate, or without it."""

    halves: list[HalfRound] = field(default_factory=list)
    requests: int = 0
    first_tokens_s: list[float] = field(default_factory=list)


def run(options: BenchGate) -> Result:
    """Measure each model; the exit status is 0 whatever the figures are."""
    models = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch, SwitchedServer(_config(Path(scratch), name)) as server:
            models[name] = asyncio.run(measure(server, options))
        print(name, models[name], file=sys.stderr, flush=True)
    return Result({"processor": str(processor()), "streams": options.streams, "models": models})


def _config(folder: Path, model: str) -> ServeConfig:
    if model == "tiny":
        base = tiny_base(folder / "tiny")
        return tiny_config(folder, base, safety="on", max_model_len=1024, kv_cache_memory_gb=0.5, max_num_seqs=32)
    return ServeConfig(model=model, store=str(folder / "none"), logs=str(folder / "logs"), port=0, safety="on")


async def measure(server: Server, options: BenchGate) -> dict[str, Any]:
    """Rounds at `streams`, then pairs of single requests."""
    arms = {name: Arm() for name in ARMS}
    order = list(ARMS)
    for number in range(-WARM_UP_ROUNDS, options.rounds):
        # The order alternates from round to round.
        order.reverse()
        for name in order:
            arm = Arm() if number < 0 else arms[name]
            await _half(server, arm, ARMS[name], options, seed=2 * number + (name == "on"))
            if number >= 0:
                last = arm.halves[-1]
                print(f"{number} {name} {last.n_tokens / last.clock_s:.1f} tokens/s", file=sys.stderr, flush=True)
    on, off = arms["on"], arms["off"]
    ratios = [_tokens_s(a) / _tokens_s(b) for a, b in zip(on.halves, off.halves, strict=True)]
    added_s = await _pairs(server, options.pairs)
    return {
        "throughput_ratio": round(statistics.median(ratios), 3),
        "throughput_ci95": [round(bound, 3) for bound in median_interval(ratios)],
        "throughput_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(ratios),
        "tokens_s": round(statistics.median(map(_tokens_s, off.halves)), 1),
        "first_token_ms": round(
            1e3 * (statistics.median(on.first_tokens_s) - statistics.median(off.first_tokens_s)), 1
        ),
        "first_token_n": len(on.first_tokens_s),
        "first_token_c1_ms": round(statistics.median(added_s) * 1e3, 1),
        "first_token_c1_ci95_ms": [round(bound * 1e3, 1) for bound in median_interval(added_s)],
        "first_token_c1_n": len(added_s),
        "cpu_share": round(cpu_share(on.halves, off.halves), 4),
        "cpu_ms_per_request": round(1e3 * (_api_s_per_request(on) - _api_s_per_request(off)), 1),
    }


async def _half(server: Server, arm: Arm, headers: Mapping[str, str], options: BenchGate, seed: int) -> None:
    before_s, start_s = cpu_s(server), time.monotonic()

    async def stream(client: openai.AsyncOpenAI, rng: random.Random) -> int:
        n_tokens, talk = 0, _conversation(client, server.base.name, rng)
        while time.monotonic() < start_s + options.round_s:
            tokens, first_s = await anext(talk)
            n_tokens += tokens
            arm.requests += 1
            arm.first_tokens_s.append(first_s)
        return n_tokens

    # A new client each time, because the server closes connections that were idle for five seconds.
    async with make_async_client(server.base_url) as client:
        client = client.with_options(default_headers=headers)
        rngs = [random.Random(f"{seed} {number}") for number in range(options.streams)]
        n_tokens = sum(await asyncio.gather(*(stream(client, rng) for rng in rngs)))
    # Until the last token, because the last answers are counted in full.
    clock_s = time.monotonic() - start_s
    api_s, *others_s = (after - before for after, before in zip(cpu_s(server), before_s, strict=True))
    arm.halves.append(HalfRound(n_tokens, clock_s, api_s, api_s + sum(others_s)))


async def _pairs(server: Server, n: int) -> list[float]:
    """Seconds that the gate adds to the first token of one request at a time, alternately with and without it."""
    added_s = []
    async with make_async_client(server.base_url) as client:
        talks = {
            name: _conversation(client.with_options(default_headers=headers), server.base.name, random.Random(name), 8)
            for name, headers in ARMS.items()
        }
        order = list(talks)
        for _ in range(n):
            order.reverse()
            first_s = {name: (await anext(talks[name]))[1] for name in order}
            added_s.append(first_s["on"] - first_s["off"])
    return added_s


async def _conversation(
    client: openai.AsyncOpenAI, model: str, rng: random.Random, n_tokens: int = 0
) -> AsyncIterator[tuple[int, float]]:
    """Talk without end, TURNS turns at a time: of each answer its tokens, and the seconds to the first."""
    while True:
        messages: list[Any] = []
        for turn in range(TURNS):
            words = " ".join(rng.choices(WORDS, k=rng.randint(*(LATER_WORDS if turn else FIRST_WORDS))))
            messages.append({"role": "user", "content": f"{words}."})
            tokens, first_s, text, start_s = (
                n_tokens or rng.randint(LEAST_TOKENS, MOST_TOKENS),
                0.0,
                "",
                time.monotonic(),
            )
            chunks = await client.chat.completions.create(
                model=model,
                messages=messages,
                max_completion_tokens=tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for chunk in chunks:
                said = chunk.choices[0].delta.content if chunk.choices else None
                if said and not first_s:
                    first_s = time.monotonic() - start_s
                text += said or ""
            yield tokens, first_s or time.monotonic() - start_s
            # Random weights may say anything; a short answer is what a conversation needs.
            messages.append({"role": "assistant", "content": text[:200]})


def _tokens_s(half: HalfRound) -> float:
    return half.n_tokens / half.clock_s


def _api_s_per_request(arm: Arm) -> float:
    return sum(half.api_s for half in arm.halves) / arm.requests


if __name__ == "__main__":
    sys.exit(main("benchmarks.gate", {"": Command(BenchGate, run, "measure what the crisis gate costs")}))
