"""Our server against stock vLLM, and against our launch with stock LoRA, on this machine: `make bench-serve`.

    python -m benchmarks.serving --quick

Four servers have the same base and 16 random adapters, and llama.cpp's is the fifth where it is installed:

stock      vLLM with its default settings
tuned      our launch with vLLM's own LoRA
no_lora    our launch without LoRA, so that vLLM compiles
ours       our launch and our LoRA

`ours` and `stock` are started twice, alternately, and each start is timed. Our first start compiles if this machine has
never served the model with these settings. While one server is measured the others are stopped (SIGSTOP), so it has the
machine to itself. Rounds visit the servers in alternating order; a ratio is the median of the ratios per round. A
measurement sends all its requests at once, and sends them again when all have ended, until 3 seconds have passed.
Nothing is streamed, every answer has its full length, and no prompt repeats; chats begin with the same system prompt.

Writes <out>/bench.json (every measurement: arm, which is the server, cell, round, tokens_s, of_limit), bench.png, and
each server's log.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from benchmarks import llama_cpp
from benchmarks.limit import Limits, known_shape, measure_limits
from counsel.catalog import Base, resolve, weight_files
from counsel.chat import SYSTEM_PROMPT
from counsel.cli import Command, Result, main, option
from counsel.client import make_async_client
from counsel.errors import UserError
from counsel.files import write_json
from counsel.lora_layers import targets
from counsel.processor import processor
from counsel.run import provenance
from serve.config import ServeConfig
from serve.hardware import detect
from serve.launch import plan
from serve.server import health

ADAPTERS = tuple(f"a{i}" for i in range(16))
LLAMA_CPP = "llama_cpp"
START_S = 900
MEASURED_S = 3.0
WORDS = ("lonely", "since", "we", "moved", "work", "is", "hard", "what", "can", "help", "me", "sleep", "talk", "friend")


@dataclass(frozen=True)
class BenchServing:
    """What to measure, and how often."""

    model: str = option("smollm2-135m", "base model")
    quick: bool = option(False, "one rank and only the cells that the targets need: under 10 minutes")
    rounds: int = option(5, "measurements of each cell on the fast servers (--quick: 3)")
    ranks: tuple[int, ...] = option((8, 16, 64), "ranks of the adapters (--quick: 16)")
    out: str = option("runs/bench-serve", "folder for the results")


class LoadShape(NamedTuple):
    """How long a request and its answer are, and how its prompt begins."""

    prompt_words: int
    new_tokens: int
    opening: str = ""


LOADS = {
    "decode": LoadShape(16, 32),
    # Half of the questions on CounselChat have 46 words or more. Every recipe begins with the system prompt.
    "chat": LoadShape(46, 48, opening=f"{SYSTEM_PROMPT} "),
    "prefill": LoadShape(300, 4),
    "warm-up": LoadShape(16, 2),
}


class Cell(NamedTuple):
    """A load, and how many adapters share it with the base (0: the base alone, -1: one adapter without the base)."""

    adapters: int
    concurrency: int
    load: str = "decode"

    @property
    def name(self) -> str:
        models = {0: "base", -1: "adapter"}.get(self.adapters, f"mixed{self.adapters}")
        return f"{models}_c{self.concurrency}" + ("" if self.load == "decode" else f"_{self.load}")

    def models(self, base: str) -> list[str]:
        """The model of each request of the cell."""
        if self.adapters == 0:
            return [base] * self.concurrency
        if self.adapters == -1:
            return [ADAPTERS[0]] * self.concurrency
        names = [base, *ADAPTERS[: self.adapters]]
        return list(itertools.islice(itertools.cycle(names), self.concurrency))


# The layers that the adapters change: every linear layer of a Llama.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = (Cell(0, 1), Cell(-1, 1), Cell(0, 32), Cell(4, 32), Cell(16, 32))
CHATS = (Cell(0, 32, "chat"), Cell(4, 32, "chat"))
QUICK = (*TARGETS, *CHATS)
FULL = (
    *(
        Cell(adapters, concurrency, load)
        for load in ("decode", "prefill")
        for adapters in (0, -1, 4, 16)
        for concurrency in (1, 8, 32)
        if adapters <= 0 or concurrency > 1
    ),
    *CHATS,
)


CELLS_BY_NAME = {cell.name: cell for cell in (*FULL, *QUICK)}


class Target(Protocol):
    """A server to load: its address without /v1, and the fields that a request for a model needs besides OpenAI's."""

    @property
    def url(self) -> str: ...

    def extra_body(self, model: str) -> dict[str, Any]: ...


class BenchServer:
    """One server under test, in its own process group."""

    def __init__(self, name: str, argv: list[str], env: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        started_s = time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*argv, "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        while health(self.url, within_s=2) != "up":
            if self.process.poll() is not None or time.monotonic() - started_s > START_S:
                self.kill()
                raise UserError(f"the {name} server did not start; see {log}")
            time.sleep(0.1)
        self.ready_s = time.monotonic() - started_s
        print(f"{name}: ready after {self.ready_s:.1f} s", file=sys.stderr)

    def record(self, ready_s: dict[str, list[float]]) -> Self:
        """Add the time of this start to `ready_s`, under the server's name; return the server."""
        ready_s.setdefault(self.name, []).append(self.ready_s)
        return self

    def extra_body(self, model: str) -> dict[str, Any]:
        """Fields that OpenAI's API lacks: ignore_eos, for answers of full length, and llama.cpp's adapter number."""
        if self.name != LLAMA_CPP:
            return {"ignore_eos": True}
        # Scale 0 selects the base. Without this field llama.cpp was seen to compute all adapters.
        chosen = (ADAPTERS.index(model), 1.0) if model in ADAPTERS else (0, 0.0)
        return {"ignore_eos": True, "lora": [{"id": chosen[0], "scale": chosen[1]}]}

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def bench_serving(config: BenchServing) -> Result:
    """Measure every cell on every server and print a table; the last line has the ratios that the targets name."""
    base, out = resolve(config.model), Path(config.out)
    shape = known_shape(base.path)
    out.mkdir(parents=True, exist_ok=True)
    ranks, rounds = ((16,), 3) if config.quick else (config.ranks, config.rounds)
    rows: list[dict[str, Any]] = []
    ready: dict[str, list[float]] = {}
    for rank in ranks:
        folders = random_adapters(base, out / "adapters", rank)
        servers: list[BenchServer] = []
        try:
            planned = launches(base, folders, rank)
            llama_cpp_argv = llama_cpp.server_argv(base, folders, len(detect().cpus), out)
            if llama_cpp_argv:
                planned[LLAMA_CPP] = llama_cpp_argv, {}
            for name in ("ours", "stock"):
                BenchServer(name, *planned[name], out / f"{name}-r{rank}-first.log").record(ready).kill()
            for name, (argv, env) in planned.items():
                servers.append(BenchServer(name, argv, env, out / f"{name}-r{rank}.log").record(ready))
                servers[-1].pause()
            rows += measure(servers, base.name, QUICK if config.quick else FULL, rank, rounds)
        finally:
            for server in servers:
                server.kill()
    limits = measure_limits(shape)
    for row in rows:
        row["of_limit"] = round(row["tokens_s"] / cell_limit(limits, CELLS_BY_NAME[row["cell"]], row["rank"]), 3)
    summary = ratios(rows, ready)
    report = {"config": vars(config), "ready_s": ready, "summary": summary, "rows": rows, **provenance()}
    write_json(out / "bench.json", report)
    _print_table(rows)
    _plot(rows, out / "bench.png")
    return Result({"processor": str(processor()), **summary})


def launches(base: Base, adapters: list[Path], rank: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Each server's command line and environment. All have the same context and KV cache, so that they fit together."""
    entry = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    named = [f"{name}={folder}" for name, folder in zip(ADAPTERS, adapters, strict=True)]
    lora = ["--enable-lora", "--max-loras", str(len(adapters)), "--max-cpu-loras", str(len(adapters)),
            "--max-lora-rank", str(rank), "--lora-modules", *named]  # fmt: skip
    same = ["--model", str(base.path), "--served-model-name", base.name, "--max-model-len", "2048",
            "--kv-cache-memory-bytes", str(1 << 30)]  # fmt: skip
    config = ServeConfig(max_loras=len(adapters), max_cpu_loras=len(adapters), max_lora_rank=rank, max_model_len=2048)
    ours = plan(config, base, detect(), (rank,), targets(base.path))
    tuned = [*list(ours.argv[3:]), *same]
    without = [*same, *("--block-size", "32"), *("--max-num-seqs", "64"), *("--max-num-batched-tokens", "512")]
    stock_plugins = {"VLLM_PLUGINS": ""}
    return {
        "ours": ([*entry, *tuned, *lora], {**ours.env, "VLLM_PLUGINS": "counsel_platform,counsel_cpu_ops"}),
        "stock": ([*entry, *same, *lora], stock_plugins),
        "tuned": ([*entry, *tuned, *lora], {**ours.env, **stock_plugins}),
        "no_lora": ([*entry, *without], {**ours.env, **stock_plugins}),
    }


def measure(
    servers: list[BenchServer], base: str, cells: tuple[Cell, ...], rank: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per server, cell and round. All servers are stopped before and after; round 0 warms up, without rows."""
    rows = []
    for turn in range(rounds + 1):
        for cell, server in itertools.product(cells, servers if turn % 2 else servers[::-1]):
            name = server.name
            # vLLM's own LoRA is slow: there is time for only one round of it, except for the targets' cells.
            once = name == "tuned" or (name == "stock" and cell not in TARGETS)
            if (name == "no_lora" and cell.adapters) or (once and turn > 1):
                continue
            if turn == 0 and name in ("stock", "tuned"):
                cell = cell._replace(load="warm-up")
            server.resume()
            tokens_s = asyncio.run(tokens_per_s(server, cell, base, seed=turn, at_least_s=MEASURED_S if turn else 0.0))
            server.pause()
            if turn:
                rows.append({"arm": name, "rank": rank, "cell": cell.name, "round": turn, "tokens_s": tokens_s})
                print(f"r{rank} round {turn} {cell.name:<16} {name:<8} {tokens_s:7.1f} tok/s", file=sys.stderr)
    return rows


async def tokens_per_s(server: Target, cell: Cell, base: str, seed: int, at_least_s: float) -> float:
    """New tokens per second over the whole load; for the prefill load, prompt tokens."""
    # Prompts differ between rounds and cells, so that a prefix cache holds only their opening.
    words, load = random.Random(f"{cell.name} {seed}"), LOADS[cell.load]
    counted, started_s = 0, time.perf_counter()
    async with make_async_client(f"{server.url}/v1", "none") as client:
        while not counted or time.perf_counter() - started_s < at_least_s:
            replies = await asyncio.gather(
                *(
                    client.completions.create(
                        model=model,
                        prompt=load.opening + " ".join(words.choices(WORDS, k=load.prompt_words)),
                        max_tokens=load.new_tokens,
                        temperature=0,
                        extra_body=server.extra_body(model),
                    )
                    for model in cell.models(base)
                )
            )
            usages = [reply.usage for reply in replies if reply.usage]
            counted += sum(u.prompt_tokens if cell.load == "prefill" else u.completion_tokens for u in usages)
        return counted / (time.perf_counter() - started_s)


def cell_limit(limits: Limits, cell: Cell, rank: int) -> float:
    """Tokens per second that no server can exceed here (benchmarks/limit.py). A word is at least one token."""
    load, adapters = LOADS[cell.load], len(set(cell.models("")) - {""})
    if cell.load == "prefill":
        return limits.prefill_tokens_s()
    return limits.load_tokens_s(cell.concurrency, load.prompt_words, load.new_tokens, adapters, rank)


def ratios(rows: list[dict[str, Any]], ready_s: dict[str, list[float]]) -> dict[str, float | None]:
    """The ratios that have targets, at rank 16 (or at the first rank measured), each a median over rounds."""
    rank = 16 if any(row["rank"] == 16 for row in rows) else rows[0]["rank"]

    def by_round(server: str, cell: str) -> dict[int, float]:
        matching = [row for row in rows if (row["arm"], row["cell"], row["rank"]) == (server, cell, rank)]
        return {row["round"]: row["tokens_s"] for row in matching}

    def ratio(over: tuple[str, str], under: tuple[str, str]) -> float | None:
        top, bottom = by_round(*over), by_round(*under)
        values = [top[turn] / bottom[turn] for turn in top.keys() & bottom.keys()]
        return round(statistics.median(values), 3) if values else None

    return {
        "mixed4_c32_vs_stock": ratio(("ours", "mixed4_c32"), ("stock", "mixed4_c32")),
        "mixed4_c32_chat_vs_stock": ratio(("ours", "mixed4_c32_chat"), ("stock", "mixed4_c32_chat")),
        "mixed4_c32_chat_vs_base": ratio(("ours", "mixed4_c32_chat"), ("ours", "base_c32_chat")),
        "mixed4_c32_prefill_vs_stock": ratio(("ours", "mixed4_c32_prefill"), ("stock", "mixed4_c32_prefill")),
        "mixed4_c32_vs_tuned": ratio(("ours", "mixed4_c32"), ("tuned", "mixed4_c32")),
        "mixed4_c32_vs_base": ratio(("ours", "mixed4_c32"), ("ours", "base_c32")),
        "mixed16_c32_vs_base": ratio(("ours", "mixed16_c32"), ("ours", "base_c32")),
        "base_vs_no_lora": ratio(("ours", "base_c32"), ("no_lora", "base_c32")),
        "adapter_c1_vs_base_no_lora": ratio(("ours", "adapter_c1"), ("no_lora", "base_c1")),
        "mixed4_c32_vs_llama_cpp": ratio(("ours", "mixed4_c32"), (LLAMA_CPP, "mixed4_c32")),
        "adapter_c1_vs_llama_cpp": ratio(("ours", "adapter_c1"), (LLAMA_CPP, "adapter_c1")),
        "ready_vs_stock": round(statistics.median(ready_s["ours"][1:]) / statistics.median(ready_s["stock"]), 3),
        "ready_first_vs_stock": round(ready_s["ours"][0] / statistics.median(ready_s["stock"]), 3),
    }


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[int, str, str], list[float]]:
    """Tokens per second of each round, by rank, cell and server."""
    grouped: dict[tuple[int, str, str], list[float]] = {}
    for row in rows:
        grouped.setdefault((row["rank"], row["cell"], row["arm"]), []).append(row["tokens_s"])
    return grouped


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'rank':>4}  {'cell':<20}{'server':<10}{'tok/s':>8}{'of limit':>10}  (lowest to highest, n)")
    shares = {(row["rank"], row["cell"], row["arm"], row["tokens_s"]): row["of_limit"] for row in rows}
    for (rank, cell, server), values in _grouped(rows).items():
        spread = f"({min(values):.0f} to {max(values):.0f}, n={len(values)})"
        share = shares[rank, cell, server, statistics.median_low(values)]
        print(f"{rank:>4}  {cell:<20}{server:<10}{statistics.median(values):8.1f}{share:>10.2f}  {spread}")


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rank = rows[0]["rank"]
    grouped = {key[1:]: values for key, values in _grouped(rows).items() if key[0] == rank}
    cells = list(dict.fromkeys(cell for cell, _ in grouped))
    servers = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(7, len(cells)), 4))
    width = 0.8 / len(servers)
    for i, server in enumerate(servers):
        shown = [(at, grouped[cell, server]) for at, cell in enumerate(cells) if (cell, server) in grouped]
        positions = [at + width * (i - (len(servers) - 1) / 2) for at, _ in shown]
        axes.bar(positions, [statistics.median(values) for _, values in shown], width, label=server)
    axes.set_xticks(range(len(cells)), cells, rotation=30, ha="right")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"adapters of rank {rank}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def random_adapters(base: Base, folder: Path, rank: int) -> list[Path]:
    """Make one adapter for each name in ADAPTERS, in `folder`; return their folders."""
    return [_random_adapter(base, folder / f"r{rank}-{i}", rank, seed=i) for i in range(len(ADAPTERS))]


def _random_adapter(base: Base, folder: Path, rank: int, seed: int) -> Path:
    """A small random LoRA on every linear layer of `base`: its answers are noise, its cost is real."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator, weights = torch.Generator().manual_seed(seed), {}
    for file in weight_files(base.path):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if key.split(".")[-2] in TARGET_MODULES:
                    n_out, n_in = tensors.get_slice(key).get_shape()
                    stem = f"base_model.model.{key.removesuffix('.weight')}"
                    weights[f"{stem}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator) * n_in**-0.5
                    weights[f"{stem}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator) * 0.01
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGET_MODULES),
                 "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.hub_id}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(
        main(
            "benchmarks.serving",
            {"": Command(BenchServing, bench_serving, "measure LoRA serving against stock vLLM, on this machine")},
        )
    )
