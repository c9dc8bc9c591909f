"""Stock vLLM, the tuned launch with stock LoRA, and ours, on this machine: `make bench-serve`.

    python -m benchmarks.serving --quick

Four servers of one base and 16 random adapters: `stock` (vLLM as it starts), `tuned` (our launch, vLLM's LoRA),
`no_lora` (our launch, LoRA off, so that vLLM compiles) and `ours`; and llama.cpp's, where it is installed. `ours` and
`stock` are started twice, in turn and timed: our first start compiles when this machine never served the model like
that. While one server is measured the others are stopped (SIGSTOP), so each has the machine. Rounds go through the arms
in turn, forth and back; a ratio is the median of the rounds' own ratios. Each measurement asks all its requests at
once, and again when all have ended, until 3 seconds have passed. Nothing is streamed, every answer has its full length,
and no prompt repeats; those of chats open with the same system prompt.

Writes <out>/bench.json (every measurement: arm, cell, round, tokens_s), bench.png, and each server's log.
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
from typing import Any, NamedTuple, Self

from benchmarks import llama_cpp as bench_llama_cpp
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
class BenchConfig:
    """What is measured, and how often."""

    model: str = option("smollm2-135m", "base model")
    quick: bool = option(False, "one rank, the cells the targets need, under 10 minutes")
    rounds: int = option(5, "times each cell of the fast arms is measured (--quick: 3)")
    ranks: tuple[int, ...] = option((8, 16, 64), "adapter ranks (--quick: 16)")
    out: str = option("runs/bench-serve", "folder for the results")


class Load(NamedTuple):
    """How long a request and its answer are, and what its prompt opens with."""

    prompt_words: int
    new_tokens: int
    opening: str = ""


LOADS = {
    "decode": Load(16, 32),
    # Half of the questions on CounselChat have 46 words or more; every recipe opens with the system prompt.
    "chat": Load(46, 48, opening=f"{SYSTEM_PROMPT} "),
    "prefill": Load(300, 4),
    "warm-up": Load(16, 2),
}


class Cell(NamedTuple):
    """How many adapters share a load with the base (0: base only, -1: one adapter and no base), and what load."""

    adapters: int
    concurrency: int
    load: str = "decode"

    @property
    def name(self) -> str:
        who = {0: "base", -1: "adapter"}.get(self.adapters, f"mixed{self.adapters}")
        return f"{who}_c{self.concurrency}" + ("" if self.load == "decode" else f"_{self.load}")

    def models(self, base: str) -> list[str]:
        """The model each of the cell's requests asks for."""
        if self.adapters == 0:
            return [base] * self.concurrency
        if self.adapters == -1:
            return [ADAPTERS[0]] * self.concurrency
        names = [base, *ADAPTERS[: self.adapters]]
        return list(itertools.islice(itertools.cycle(names), self.concurrency))


# What its adapters change: every linear layer of a Llama.
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


class Arm:
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
        """Note under the arm's name how long its start took."""
        ready_s.setdefault(self.name, []).append(self.ready_s)
        return self

    def extra(self, model: str) -> dict[str, Any]:
        """Beyond OpenAI's fields: every answer has its full length, and llama.cpp knows adapters by number."""
        if self.name != LLAMA_CPP:
            return {"ignore_eos": True}
        # The base is asked for in so many words: by default all adapters were seen to be computed.
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


def bench(config: BenchConfig) -> Result:
    """Measure every cell on every arm; print a table; the last line holds the ratios the targets are about."""
    base, out = resolve(config.model), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    ranks, rounds = ((16,), 3) if config.quick else (config.ranks, config.rounds)
    rows: list[dict[str, Any]] = []
    ready: dict[str, list[float]] = {}
    for rank in ranks:
        folders = random_adapters(base, out / "adapters", rank)
        arms: list[Arm] = []
        try:
            planned = launches(base, folders, rank)
            peer = bench_llama_cpp.server_argv(base, folders, len(detect().cpus), out)
            if peer:
                planned[LLAMA_CPP] = peer, {}
            for name in ("ours", "stock"):
                Arm(name, *planned[name], out / f"{name}-r{rank}-first.log").record(ready).kill()
            for name, (argv, env) in planned.items():
                arms.append(Arm(name, argv, env, out / f"{name}-r{rank}.log").record(ready))
                arms[-1].pause()
            rows += _measure(arms, base.name, QUICK if config.quick else FULL, rank, rounds)
        finally:
            for arm in arms:
                arm.kill()
    summary = ratios(rows, ready)
    report = {"config": vars(config), "ready_s": ready, "summary": summary, "rows": rows, **provenance()}
    write_json(out / "bench.json", report)
    _print_table(rows)
    _plot(rows, out / "bench.png")
    return Result({"processor": str(processor()), **summary})


def launches(base: Base, adapters: list[Path], rank: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Each arm's command line and environment. All have the same context and key-value memory, to fit side by side."""
    entry = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    named = [f"{name}={folder}" for name, folder in zip(ADAPTERS, adapters, strict=True)]
    lora = ["--enable-lora", "--max-loras", str(len(adapters)), "--max-cpu-loras", str(len(adapters)),
            "--max-lora-rank", str(rank), "--lora-modules", *named]  # fmt: skip
    same = ["--model", str(base.path), "--served-model-name", base.name, "--max-model-len", "2048",
            "--kv-cache-memory-bytes", str(1 << 30)]  # fmt: skip
    config = ServeConfig(max_loras=len(adapters), max_cpu_loras=len(adapters), max_lora_rank=rank, max_model_len=2048)
    made = plan(config, base, detect(), (rank,), targets(base.path))
    tuned = [*list(made.argv[3:]), *same]
    without = [*same, *("--block-size", "32"), *("--max-num-seqs", "64"), *("--max-num-batched-tokens", "512")]
    stock_plugins = {"VLLM_PLUGINS": ""}
    return {
        "ours": ([*entry, *tuned, *lora], {**made.env, "VLLM_PLUGINS": "counsel_platform,counsel_cpu_ops"}),
        "stock": ([*entry, *same, *lora], stock_plugins),
        "tuned": ([*entry, *tuned, *lora], {**made.env, **stock_plugins}),
        "no_lora": ([*entry, *without], {**made.env, **stock_plugins}),
    }


def _measure(arms: list[Arm], base: str, cells: tuple[Cell, ...], rank: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for turn in range(rounds + 1):
        for cell, arm in itertools.product(cells, arms if turn % 2 else arms[::-1]):
            # vLLM's own LoRA is slow: beyond the cells the targets are about, one round of it is what time allows.
            once = arm.name == "tuned" or (arm.name == "stock" and cell not in TARGETS)
            if (arm.name == "no_lora" and cell.adapters) or (once and turn > 1):
                continue
            if turn == 0 and arm.name in ("stock", "tuned"):
                cell = cell._replace(load="warm-up")
            arm.resume()
            tokens_s = asyncio.run(_tokens_per_s(arm, cell, base, seed=turn, at_least_s=MEASURED_S if turn else 0.0))
            arm.pause()
            if turn:
                rows.append({"arm": arm.name, "rank": rank, "cell": cell.name, "round": turn, "tokens_s": tokens_s})
                print(f"r{rank} round {turn} {cell.name:<16} {arm.name:<8} {tokens_s:7.1f} tok/s", file=sys.stderr)
    return rows


async def _tokens_per_s(arm: Arm, cell: Cell, base: str, seed: int, at_least_s: float) -> float:
    """New tokens per second over the whole load; of the prefill load, prompt tokens."""
    # Neither another round nor another cell may leave the prompt, but for its opening, in a prefix cache.
    words, load = random.Random(f"{cell.name} {seed}"), LOADS[cell.load]
    counted, started_s = 0, time.perf_counter()
    async with make_async_client(f"{arm.url}/v1", "none") as client:
        while not counted or time.perf_counter() - started_s < at_least_s:
            replies = await asyncio.gather(
                *(
                    client.completions.create(
                        model=model,
                        prompt=load.opening + " ".join(words.choices(WORDS, k=load.prompt_words)),
                        max_tokens=load.new_tokens,
                        temperature=0,
                        extra_body=arm.extra(model),
                    )
                    for model in cell.models(base)
                )
            )
            usages = [reply.usage for reply in replies if reply.usage]
            counted += sum(u.prompt_tokens if cell.load == "prefill" else u.completion_tokens for u in usages)
        return counted / (time.perf_counter() - started_s)


def ratios(rows: list[dict[str, Any]], ready_s: dict[str, list[float]]) -> dict[str, float | None]:
    """The figures the targets are about, at rank 16 (or the only rank), each a median over rounds."""
    rank = 16 if any(row["rank"] == 16 for row in rows) else rows[0]["rank"]

    def by_round(arm: str, cell: str) -> dict[int, float]:
        found = [row for row in rows if (row["arm"], row["cell"], row["rank"]) == (arm, cell, rank)]
        return {row["round"]: row["tokens_s"] for row in found}

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


def _medians(rows: list[dict[str, Any]]) -> dict[tuple[int, str, str], list[float]]:
    grouped: dict[tuple[int, str, str], list[float]] = {}
    for row in rows:
        grouped.setdefault((row["rank"], row["cell"], row["arm"]), []).append(row["tokens_s"])
    return grouped


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'rank':>4}  {'cell':<20}{'arm':<9}{'tok/s':>8}  (lowest to highest, n)")
    for (rank, cell, arm), values in _medians(rows).items():
        spread = f"({min(values):.0f} to {max(values):.0f}, n={len(values)})"
        print(f"{rank:>4}  {cell:<20}{arm:<9}{statistics.median(values):8.1f}  {spread}")


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rank = rows[0]["rank"]
    grouped = {key[1:]: values for key, values in _medians(rows).items() if key[0] == rank}
    cells = list(dict.fromkeys(cell for cell, _ in grouped))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(7, len(cells)), 4))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        shown = [(at, grouped[cell, arm]) for at, cell in enumerate(cells) if (cell, arm) in grouped]
        places = [at + width * (i - (len(arms) - 1) / 2) for at, _ in shown]
        axes.bar(places, [statistics.median(values) for _, values in shown], width, label=arm)
    axes.set_xticks(range(len(cells)), cells, rotation=30, ha="right")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"adapters of rank {rank}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def random_adapters(base: Base, folder: Path, rank: int) -> list[Path]:
    """One for each name of ADAPTERS, made in `folder`."""
    return [_random_adapter(base, folder / f"r{rank}-{i}", rank, seed=i) for i in range(len(ADAPTERS))]


def _random_adapter(base: Base, folder: Path, rank: int, seed: int) -> Path:
    """A LoRA over every linear layer of `base`, small and random: its text is noise, its cost real."""
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
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGET_MODULES),
                 "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.hub_id}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main("benchmarks.serving", {"": Command(BenchConfig, bench, "measure LoRA serving on this machine")}))
