"""Where the milliseconds of a decode step go, in vLLM as it starts and in ours: `make bench-step`.

For each server, one adapter alone, and base with 4 adapters at 32 requests. First without a profiler: milliseconds a
step on the clock, and of processor time in each of vLLM's processes: the API process (HTTP, detokenizing), the engine
core (scheduling, handing over; stock's spins while it waits) and the worker (the model; its threads spin while they
wait for each other, so it counts nearly all of its cores; on few cores ours is in the engine core's process). Then with
vLLM's torch profiler, which slows a step by a tenth or more, what the worker does:

matmul          the model's own products of weights and activations
lora            ours: the one operator a layer; vLLM's own LoRA is torch operators, and counted there
attention       attention, and writing keys and values into the cache
compiled        compiled code between those (norms, rotary embedding, activation), with the cost of calling it
torch           other torch operators
python          the worker's Python between operators
elsewhere       the worker waits: scheduling, hand-over, HTTP

The last line of stdout is one JSON object: `steps`, by arm and load, every figure in milliseconds a step.
"""

import asyncio
import json
import re
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving import Arm, Cell, launches, random_adapters
from counsel.catalog import resolve
from counsel.cli import Command, Result, main, option
from counsel.client import make_async_client
from counsel.files import read_json
from counsel.processor import processor

CELLS = (Cell(-1, 1), Cell(4, 32))
PROFILED_S = 1.0
# First match counts, by the operator's name.
KINDS = (
    ("matmul", re.compile(r"_C::onednn_mm")),
    ("lora", re.compile(r"vllm::counsel_lora_linear")),
    ("attention", re.compile(r"_C::.*(attn|attention|slot_mapping|get_scheduler_metadata)")),
    ("compiled", re.compile(r"## Call CompiledFxGraph")),
    ("torch", re.compile(r"(aten|_C)::")),
    ("python", re.compile(r"")),
)


@dataclass(frozen=True)
class BenchStep:
    """Which servers are looked into."""

    model: str = option("smollm2-135m", "base model")
    arms: tuple[str, ...] = option(("stock", "ours"), "servers of `python -m benchmarks.serving`")
    tokens: int = option(200, "new tokens of each request")
    out: str = option("runs/bench-step", "folder for adapters, logs and traces")


def bench_step(config: BenchStep) -> Result:
    """Measure each load on each server; print a table."""
    base, out = resolve(config.model), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    launched = launches(base, random_adapters(base, out / "adapters", rank=16), rank=16)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in config.arms:
        argv, env = launched[name]
        traces = out / f"traces-{name}"
        profiler = {"profiler": "torch", "torch_profiler_dir": str(traces.resolve()), "torch_profiler_use_gzip": False,
                    "torch_profiler_with_stack": False}  # fmt: skip
        arm = Arm(name, [*argv, "--profiler-config", json.dumps(profiler)], env, out / f"{name}.log")
        try:
            for cell in CELLS:
                models = cell.models(base.name)
                asyncio.run(_answer(arm, models, 16))
                on_the_clock = _clocked(arm, models, config.tokens)
                found.setdefault(name, {})[cell.name] = on_the_clock | _profiled(arm, models, config.tokens, traces)
        finally:
            arm.kill()
    _print_table(found)
    return Result({"processor": str(processor()), "steps": found})


def by_kind(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a step by kind, from the events of one thread's trace: each operator without what it calls.

    A step begins where a span called execute_context_... does; what comes after the last beginning is left out.
    """
    events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    begins = [event["ts"] for event in events if event["name"].startswith("execute_context")]
    alone, running = Counter[str](), list[tuple[float, str]]()
    for event in events:
        if not begins[0] <= event["ts"] < begins[-1]:
            continue
        while running and running[-1][0] <= event["ts"]:
            running.pop()
        kind = next(kind for kind, pattern in KINDS if pattern.match(event["name"]))
        alone[kind] += event["dur"]
        alone[running[-1][1] if running else "elsewhere"] -= event["dur"]
        running.append((event["ts"] + event["dur"], kind))
    alone["elsewhere"] += begins[-1] - begins[0]
    n_steps = len(begins) - 1
    return {kind: round(alone[kind] / 1e3 / n_steps, 2) for kind in [*dict(KINDS), "elsewhere"]}


def _clocked(arm: Arm, models: list[str], n_tokens: int) -> dict[str, float]:
    api = psutil.Process(arm.process.pid)
    processes = {"api": [api], "engine_core": [], "worker": []}
    for child in api.children(recursive=True):
        # vLLM names its processes so; what else it starts (a resource tracker) costs nothing.
        kind = {"EngineCore": "engine_core", "Worker": "worker"}.get(child.name().removeprefix("VLLM::"), "api")
        processes[kind].append(child)

    def spent_s(kind: str) -> float:
        return float(sum(sum(process.cpu_times()[:2]) for process in processes[kind]))

    before, n_before, started_s = {kind: spent_s(kind) for kind in processes}, _steps(arm), time.monotonic()
    asyncio.run(_answer(arm, models, n_tokens))
    clock_s, n_steps = time.monotonic() - started_s, _steps(arm) - n_before
    figures = {f"cpu_{kind}": (spent_s(kind) - before[kind]) / n_steps * 1e3 for kind in processes}
    return {"clock": round(clock_s / n_steps * 1e3, 2), **{kind: round(ms, 2) for kind, ms in figures.items()}}


def _profiled(arm: Arm, models: list[str], n_tokens: int, traces: Path) -> dict[str, float]:
    async def answer_and_profile() -> None:
        answering = asyncio.create_task(_answer(arm, models, n_tokens))
        # Past the prompts.
        await asyncio.sleep(1)
        await asyncio.to_thread(_post, arm, "/start_profile")
        await asyncio.sleep(PROFILED_S)
        await asyncio.to_thread(_post, arm, "/stop_profile")
        await answering

    known = set(traces.glob("*.json"))
    asyncio.run(answer_and_profile())
    # The API process leaves a trace as well, with hardly an event in it.
    newest = max(set(traces.glob("*.json")) - known, key=lambda path: path.stat().st_size)
    spans = [event for event in read_json(newest)["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    thread = next(event["tid"] for event in spans if event["name"].startswith("execute_context"))
    return by_kind([event for event in spans if event["tid"] == thread])


async def _answer(arm: Arm, models: list[str], n_tokens: int) -> None:
    async with make_async_client(f"{arm.url}/v1", "none") as client:
        await asyncio.gather(
            *(
                client.completions.create(
                    model=model,
                    prompt=f"{i} is lonely",
                    max_tokens=n_tokens,
                    temperature=0,
                    extra_body=arm.extra(model),
                )
                for i, model in enumerate(models)
            )
        )


def _steps(arm: Arm) -> float:
    with urllib.request.urlopen(f"{arm.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:iteration_tokens_total_count"))


def _post(arm: Arm, path: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{arm.url}{path}", data=b""), timeout=120).close()


def _print_table(found: dict[str, dict[str, dict[str, float]]]) -> None:
    columns = {f"{cell} {arm}": figures for arm, cells in found.items() for cell, figures in cells.items()}
    print(f"{'ms a step':<16}" + "".join(f"{name:>20}" for name in columns))
    for kind in next(iter(columns.values())):
        print(f"{kind:<16}" + "".join(f"{figures[kind]:20.2f}" for figures in columns.values()))


if __name__ == "__main__":
    sys.exit(
        main("benchmarks.decode_step", {"": Command(BenchStep, bench_step, "see where a decode step's time goes")})
    )
