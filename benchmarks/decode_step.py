"""Where the milliseconds of a decode step go, in stock vLLM and in ours: `make bench-step`.

Each server gets two loads: one adapter alone, and the base with 4 adapters at 32 requests. The first pass runs without
a profiler. It measures milliseconds per step of elapsed time (`clock`) and of processor time in each kind of process:

cpu_api          the API process: HTTP, detokenizing
cpu_engine_core  scheduling, handing over; stock's spins while it waits
cpu_worker       the model; its threads spin while they wait for each other, so it counts nearly all of its cores; on
                 few cores our worker runs in the engine core's process

The second pass runs with vLLM's torch profiler, which slows a step by a tenth or more. It measures the worker:

matmul           the model's own products of weights and activations
lora             our one operator per layer; vLLM's own LoRA consists of torch operators and counts there
attention        attention, and writing keys and values into the cache
compiled         compiled code between those (norms, rotary embedding, activation), with the cost of calling it
torch            other torch operators
python           the worker's Python between operators
elsewhere        the worker waits: scheduling, hand-over, HTTP

The last line of stdout is one JSON object: `steps`, by server and load, every value in milliseconds per step.
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
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving import BenchServer, Cell, launches, random_adapters
from counsel.catalog import resolve
from counsel.cli import Command, Result, main, option
from counsel.client import make_async_client
from counsel.files import read_json
from counsel.processor import processor

CELLS = (Cell(-1, 1), Cell(4, 32))
PROFILED_S = 1.0
# An operator has the kind of the first pattern that matches its name.
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
    """Which servers to measure."""

    model: str = option("smollm2-135m", "base model")
    servers: tuple[str, ...] = option(("stock", "ours"), "servers, named as in `python -m benchmarks.serving`")
    tokens: int = option(200, "new tokens of each request")
    out: str = option("runs/bench-step", "folder for adapters, logs and traces")


def bench_step(config: BenchStep) -> Result:
    """Measure each load on each server and print a table."""
    base, out = resolve(config.model), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    launched = launches(base, random_adapters(base, out / "adapters", rank=16), rank=16)
    steps: dict[str, dict[str, dict[str, float]]] = {}
    for name in config.servers:
        argv, env = launched[name]
        traces = out / f"traces-{name}"
        profiler = {"profiler": "torch", "torch_profiler_dir": str(traces.resolve()), "torch_profiler_use_gzip": False,
                    "torch_profiler_with_stack": False}  # fmt: skip
        server = BenchServer(name, [*argv, "--profiler-config", json.dumps(profiler)], env, out / f"{name}.log")
        try:
            for cell in CELLS:
                models = cell.models(base.name)
                asyncio.run(_ask_all(server, models, 16))
                timed = _time_steps(server, models, config.tokens)
                steps.setdefault(name, {})[cell.name] = timed | _profile_steps(server, models, config.tokens, traces)
        finally:
            server.kill()
    _print_table(steps)
    return Result({"processor": str(processor()), "steps": steps})


def by_kind(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds per step by kind, from the events of one thread's trace. An operator excludes what it calls.

    A step begins where a span named execute_context_... begins; events after the last beginning are left out.
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


def _time_steps(server: BenchServer, models: list[str], n_tokens: int) -> dict[str, float]:
    api = psutil.Process(server.process.pid)
    processes = {"api": [api], "engine_core": [], "worker": []}
    for child in api.children(recursive=True):
        # The titles that vLLM sets. Other children, such as a resource tracker, cost nothing.
        kind = {"EngineCore": "engine_core", "Worker": "worker"}.get(child.name().removeprefix("VLLM::"), "api")
        processes[kind].append(child)

    def cpu_s(kind: str) -> float:
        return float(sum(sum(process.cpu_times()[:2]) for process in processes[kind]))

    before, n_before, started_s = {kind: cpu_s(kind) for kind in processes}, _count_steps(server), time.monotonic()
    asyncio.run(_ask_all(server, models, n_tokens))
    clock_s, n_steps = time.monotonic() - started_s, _count_steps(server) - n_before
    figures = {f"cpu_{kind}": (cpu_s(kind) - before[kind]) / n_steps * 1e3 for kind in processes}
    return {"clock": round(clock_s / n_steps * 1e3, 2), **{kind: round(ms, 2) for kind, ms in figures.items()}}


def _profile_steps(server: BenchServer, models: list[str], n_tokens: int, traces: Path) -> dict[str, float]:
    async def ask_and_profile() -> None:
        answers = asyncio.create_task(_ask_all(server, models, n_tokens))
        # By then the prompts are read and the requests decode.
        await asyncio.sleep(1)
        await asyncio.to_thread(_post, server, "/start_profile")
        await asyncio.sleep(PROFILED_S)
        await asyncio.to_thread(_post, server, "/stop_profile")
        await answers

    known = set(traces.glob("*.json"))
    asyncio.run(ask_and_profile())
    # The API process writes a trace too, but it has very few events.
    newest = max(set(traces.glob("*.json")) - known, key=lambda path: path.stat().st_size)
    spans = [event for event in read_json(newest)["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    thread = next(event["tid"] for event in spans if event["name"].startswith("execute_context"))
    return by_kind([event for event in spans if event["tid"] == thread])


async def _ask_all(server: BenchServer, models: list[str], n_tokens: int) -> None:
    async with make_async_client(f"{server.url}/v1", "none") as client:
        await asyncio.gather(
            *(
                client.completions.create(
                    model=model,
                    prompt=f"{i} is lonely",
                    max_tokens=n_tokens,
                    temperature=0,
                    extra_body=server.extra_body(model),
                )
                for i, model in enumerate(models)
            )
        )


def _count_steps(server: BenchServer) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        return steps_in(reply.read().decode())


def steps_in(page: str) -> float:
    """Engine steps since the server started, from its /metrics page: vLLM observes this histogram once per step."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "vllm:iteration_tokens_total_count"
    )


def _post(server: BenchServer, path: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{server.url}{path}", data=b""), timeout=120).close()


def _print_table(steps: dict[str, dict[str, dict[str, float]]]) -> None:
    columns = {f"{cell} {server}": figures for server, cells in steps.items() for cell, figures in cells.items()}
    print(f"{'ms per step':<16}" + "".join(f"{name:>20}" for name in columns))
    for kind in next(iter(columns.values())):
        print(f"{kind:<16}" + "".join(f"{figures[kind]:20.2f}" for figures in columns.values()))


if __name__ == "__main__":
    sys.exit(
        main(
            "benchmarks.decode_step",
            {"": Command(BenchStep, bench_step, "measure where the time of a decode step goes")},
        )
    )
