"""How long an adapter waits beside busy ones, and what its turn costs them: `make bench-turns`.

    python -m benchmarks.adapter_turns --model smollm2-135m

For 2 and for 8 slots: as many adapters as slots under 24 closed loops in all, and one more asked every two seconds. Two
servers: `unbounded` keeps vLLM's rule, which lets newer requests of adapters in slots overtake an older one; `turns` is
this project's, at --adapter-wait-s. Rounds go through the two in turn, forth and back; while one is measured the other
stands still. The last line of stdout is one JSON object: for each number of slots, the worst and the median time to the
first token of the cold adapter, and the tokens/s, `turns` over `unbounded`, as the median of the rounds' own ratios.
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

ARMS = ("unbounded", "turns")
NEVER_S = 1e9
STREAMS = 24
HOT_TOKENS, COLD_TOKENS = 64, 4
BETWEEN_S = 2.0


@dataclass(frozen=True)
class BenchTurns:
    """What is measured, and for how long."""

    model: str = option("smollm2-135m", "base model")
    slots: tuple[int, ...] = option((2, 8), "slots of the servers")
    adapter_wait_s: float = option(2.0, "bound of the server with turns")
    seconds: float = option(40.0, "length of one measurement")
    rounds: int = option(3, "measurements of each server")
    out: str = option("runs/bench-turns", "folder for adapters, logs and figures")


class Measured(NamedTuple):
    """Output tokens per second of all answers, and the cold adapter's times to a first token."""

    tokens_s: float
    cold_ttft_s: list[float]


def bench_turns(config: BenchTurns) -> Result:
    """Measure both servers for each number of slots; print a table."""
    base, out = resolve(config.model), Path(config.out)
    folders = random_adapters(base, out / "adapters", rank=16)
    for name, folder in zip(ADAPTERS, folders, strict=True):
        adapter_store.publish(out / "store", name, folder, base)
    summary: dict[str, dict[str, Any]] = {}
    for slots in config.slots:
        servers = {
            arm: Server(
                ServeConfig(
                    model=config.model, store=str(out / "store"), logs=str(out / "logs" / arm), port=0, max_loras=slots,
                    max_cpu_loras=len(ADAPTERS), max_lora_rank=16, max_model_len=512, kv_cache_memory_gb=1.0,
                    max_num_seqs=32, adapter_wait_s=config.adapter_wait_s if arm == "turns" else NEVER_S,
                )
            )
            for arm in ARMS
        }  # fmt: skip
        found: dict[str, list[Measured]] = {arm: [] for arm in ARMS}
        try:
            for server in servers.values():
                server.start()
                _signal(server, signal.SIGSTOP)
            for turn in range(config.rounds):
                for arm in ARMS if turn % 2 else ARMS[::-1]:
                    _signal(servers[arm], signal.SIGCONT)
                    found[arm].append(asyncio.run(_measure(servers[arm].base_url, slots, config.seconds)))
                    _signal(servers[arm], signal.SIGSTOP)
                    waits = ", ".join(f"{wait:.2f}" for wait in found[arm][-1].cold_ttft_s)
                    print(f"{slots} slots {arm:<10}{found[arm][-1].tokens_s:7.1f} tok/s  cold {waits}", file=sys.stderr)
        finally:
            for server in servers.values():
                server.kill()
        summary[str(slots)] = _summary(found)
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
            asked_s = time.monotonic()
            first_s: float | None = None
            async for _ in await client.completions.create(
                model=ADAPTERS[slots], prompt=f"cold at {asked_s}", max_tokens=COLD_TOKENS, stream=True,
                extra_body={"ignore_eos": True},
            ):  # fmt: skip
                first_s = first_s or time.monotonic()
            waits.append((first_s or time.monotonic()) - asked_s)
            await asyncio.sleep(BETWEEN_S)

    async with client:
        await asyncio.gather(cold(), *(hot(ADAPTERS[i % slots], i) for i in range(STREAMS)))
    return Measured(tokens / seconds, waits)


def _summary(found: dict[str, list[Measured]]) -> dict[str, Any]:
    ratios = [ours.tokens_s / rule.tokens_s for ours, rule in zip(found["turns"], found["unbounded"], strict=True)]
    waits = {arm: [wait for measured in found[arm] for wait in measured.cold_ttft_s] for arm in ARMS}
    return {
        "tokens_s": {arm: round(statistics.median(measured.tokens_s for measured in found[arm]), 1) for arm in ARMS},
        "tokens_s_turns_vs_unbounded": round(statistics.median(ratios), 3),
        "cold_ttft_s_worst": {arm: round(max(waits[arm]), 2) for arm in ARMS},
        "cold_ttft_s_median": {arm: round(statistics.median(waits[arm]), 2) for arm in ARMS},
        "cold_n": {arm: len(waits[arm]) for arm in ARMS},
    }


def _signal(server: Server, number: signal.Signals) -> None:
    # Every process of the server's own group.
    if server.pid:
        os.killpg(server.pid, number)


def _print_table(summary: dict[str, dict[str, Any]]) -> None:
    print(f"{'slots':>5}  {'server':<10}{'tok/s':>8}{'cold worst s':>14}{'median s':>10}{'n':>5}")
    for slots, row in summary.items():
        for arm in ARMS:
            worst, median = row["cold_ttft_s_worst"][arm], row["cold_ttft_s_median"][arm]
            print(f"{slots:>5}  {arm:<10}{row['tokens_s'][arm]:8.1f}{worst:14.2f}{median:10.2f}{row['cold_n'][arm]:5}")


if __name__ == "__main__":
    sys.exit(
        main("benchmarks.adapter_turns", {"": Command(BenchTurns, bench_turns, "measure an adapter's wait for a slot")})
    )
