"""How long an adapter waits while others occupy every slot, and what its turn costs them: `make bench-turns`.

    python -m benchmarks.adapter_turns --model smollm2-135m

There is one run with 2 slots (--max-loras 2) and one with 8. 24 closed loops ask as many adapters as there are slots,
and one more adapter, the cold one, is asked every two seconds. Two servers are compared: `unbounded` keeps vLLM's rule,
under which newer requests of loaded adapters overtake an older one; `turns` is this project's rule, with
--adapter-wait-s. Rounds visit the two in alternating order; while one is measured the other is stopped (SIGSTOP). The
last line of stdout is one JSON object: for each number of slots, the worst and the median time to first token of the
cold adapter, and tokens/s of `turns` over `unbounded`, as the median of the ratios per round.
"""

import asyncio
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.serving import ADAPTERS, random_adapters
from counsel import store as adapter_store
from counsel.catalog import resolve
from counsel.cli import Command, Result, main, option
from counsel.client import make_async_client
from counsel.files import write_json
from counsel.processor import processor
from counsel.run import provenance
from serve.config import ServeConfig
from serve.server import Server

VARIANTS = ("unbounded", "turns")
NEVER_S = 1e9
STREAMS = 24
HOT_TOKENS, COLD_TOKENS = 64, 4
BETWEEN_S = 2.0


@dataclass(frozen=True)
class BenchTurns:
    """What to measure, and for how long."""

    model: str = option("smollm2-135m", "base model")
    slots: tuple[int, ...] = option((2, 8), "adapters in one batch (--max-loras of the servers)")
    adapter_wait_s: float = option(2.0, "longest wait for a slot on the server with turns")
    seconds: float = option(40.0, "seconds of one measurement")
    rounds: int = option(3, "measurements of each server")
    out: str = option("runs/bench-turns", "folder for adapters, logs and results")


class Measured(NamedTuple):
    """Output tokens per second over all answers, and the cold adapter's times to first token."""

    tokens_s: float
    cold_ttft_s: list[float]


def bench_turns(config: BenchTurns) -> Result:
    """Measure both servers for each number of slots and print a table."""
    base, out = resolve(config.model), Path(config.out)
    folders = random_adapters(base, out / "adapters", rank=16)
    for name, folder in zip(ADAPTERS, folders, strict=True):
        adapter_store.publish(out / "store", name, folder, base)
    summary: dict[str, dict[str, Any]] = {}
    for slots in config.slots:
        servers = {
            variant: Server(
                ServeConfig(
                    model=config.model, store=str(out / "store"), logs=str(out / "logs" / variant), port=0,
                    max_loras=slots, max_cpu_loras=len(ADAPTERS), max_lora_rank=16, max_model_len=512,
                    max_num_seqs=32, kv_cache_memory_gb=1.0, safety="off",
                    adapter_wait_s=config.adapter_wait_s if variant == "turns" else NEVER_S,
                )
            )
            for variant in VARIANTS
        }  # fmt: skip
        measured: dict[str, list[Measured]] = {variant: [] for variant in VARIANTS}
        try:
            for server in servers.values():
                server.start()
                _signal(server, signal.SIGSTOP)
            for turn in range(config.rounds):
                for variant in VARIANTS if turn % 2 else VARIANTS[::-1]:
                    _signal(servers[variant], signal.SIGCONT)
                    latest = asyncio.run(_measure(servers[variant].base_url, slots, config.seconds))
                    _signal(servers[variant], signal.SIGSTOP)
                    measured[variant].append(latest)
                    waits = ", ".join(f"{wait:.2f}" for wait in latest.cold_ttft_s)
                    print(f"{slots} slots {variant:<10}{latest.tokens_s:7.1f} tok/s  cold {waits}", file=sys.stderr)
        finally:
            for server in servers.values():
                server.kill()
        summary[str(slots)] = _summary(measured)
        write_json(out / "bench.json", {"config": vars(config), "summary": summary, **provenance()})
    _print_table(summary)
    return Result({"processor": str(processor()), "slots": summary})


async def _measure(url: str, slots: int, seconds: float) -> Measured:
    client = make_async_client(url, timeout_s=seconds + 600)
    started_s = time.monotonic()
    stop_s, tokens, waits = started_s + seconds, 0, list[float]()

    async def hot(model: str, stream: int) -> None:
        nonlocal tokens
        while time.monotonic() < stop_s:
            prompt = f"stream {stream} at {time.monotonic()}"
            async for chunk in await client.completions.create(
                model=model, prompt=prompt, max_tokens=HOT_TOKENS, stream=True, extra_body={"ignore_eos": True}
            ):
                if time.monotonic() < stop_s:
                    tokens += len(chunk.choices)

    async def cold() -> None:
        await asyncio.sleep(BETWEEN_S)
        while time.monotonic() < stop_s:
            sent_s = time.monotonic()
            first_s: float | None = None
            async for _ in await client.completions.create(
                model=ADAPTERS[slots], prompt=f"cold at {sent_s}", max_tokens=COLD_TOKENS, stream=True,
                extra_body={"ignore_eos": True},
            ):  # fmt: skip
                first_s = first_s or time.monotonic()
            waits.append((first_s or time.monotonic()) - sent_s)
            await asyncio.sleep(BETWEEN_S)

    async with client:
        await asyncio.gather(cold(), *(hot(ADAPTERS[i % slots], i) for i in range(STREAMS)))
    return Measured(tokens / seconds, waits)


def _summary(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    pairs = zip(measured["turns"], measured["unbounded"], strict=True)
    ratios = [turns.tokens_s / unbounded.tokens_s for turns, unbounded in pairs]
    waits = {variant: [wait for each in measured[variant] for wait in each.cold_ttft_s] for variant in VARIANTS}
    tokens_s = {variant: statistics.median(each.tokens_s for each in measured[variant]) for variant in VARIANTS}
    return {
        "tokens_s": {variant: round(rate, 1) for variant, rate in tokens_s.items()},
        "tokens_s_turns_vs_unbounded": round(statistics.median(ratios), 3),
        "cold_ttft_s_worst": {variant: round(max(waits[variant]), 2) for variant in VARIANTS},
        "cold_ttft_s_median": {variant: round(statistics.median(waits[variant]), 2) for variant in VARIANTS},
        "cold_n": {variant: len(waits[variant]) for variant in VARIANTS},
    }


def _signal(server: Server, number: signal.Signals) -> None:
    # To all processes of the server, which are one group.
    if server.pid:
        os.killpg(server.pid, number)


def _print_table(summary: dict[str, dict[str, Any]]) -> None:
    print(f"{'slots':>5}  {'server':<10}{'tok/s':>8}{'cold worst s':>14}{'median s':>10}{'n':>5}")
    for slots, row in summary.items():
        for variant in VARIANTS:
            worst, median = row["cold_ttft_s_worst"][variant], row["cold_ttft_s_median"][variant]
            tokens_s, n = row["tokens_s"][variant], row["cold_n"][variant]
            print(f"{slots:>5}  {variant:<10}{tokens_s:8.1f}{worst:14.2f}{median:10.2f}{n:5}")


if __name__ == "__main__":
    sys.exit(
        main(
            "benchmarks.adapter_turns",
            {"": Command(BenchTurns, bench_turns, "measure how long an adapter waits for a slot")},
        )
    )
