"""Did a change make serving slower? Ours over stock vLLM's, in about three minutes: `make bench-quick`.

    python -m benchmarks.quick

Run it before and after a change and compare the ratios, which mean the same on a machine that is busier today; a time
does not. Both servers have the same base and 16 random adapters of rank 16 and are measured in turn, while the other is
stopped. A ratio is the median over the rounds; `ranges` has its lowest and highest. A ratio that moved within the
ranges of both runs says nothing: make bench-serve measures more.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving import BenchServer, Cell, launches, measure, random_adapters
from counsel.catalog import resolve
from counsel.cli import Command, Result, main, option
from counsel.processor import processor
from counsel.values import PositiveInt

RANK = 16
RATIOS = {
    "base_c1_vs_stock": Cell(0, 1),
    "adapter_c1_vs_stock": Cell(-1, 1),
    "base_c32_vs_stock": Cell(0, 32),
    "mixed4_c32_vs_stock": Cell(4, 32),
}
SERVERS = ("ours", "stock")


@dataclass(frozen=True)
class BenchQuick:
    """The model, and how often each load is measured."""

    model: str = option("smollm2-135m", "base model")
    rounds: PositiveInt = option(3, "measurements of each load on each server")
    out: str = option("runs/bench-quick", "folder for adapters and logs")


def bench_quick(config: BenchQuick) -> Result:
    """Start ours and stock, measure both in turn, and give the ratios."""
    base, out = resolve(config.model), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    planned = launches(base, random_adapters(base, out / "adapters", RANK), RANK)
    servers: list[BenchServer] = []
    try:
        for name in SERVERS:
            servers.append(BenchServer(name, *planned[name], out / f"{name}.log"))
            servers[-1].pause()
        rows = measure(servers, base.name, tuple(RATIOS.values()), RANK, config.rounds)
        ready_s = {server.name: server.ready_s for server in servers}
    finally:
        for server in servers:
            server.kill()
    speeds = {(row["arm"], row["cell"], row["round"]): row["tokens_s"] for row in rows}
    figures, ranges = {}, {}
    for key, cell in RATIOS.items():
        ratios = [speeds["ours", cell.name, n] / speeds["stock", cell.name, n] for n in range(1, config.rounds + 1)]
        figures[key] = round(statistics.median(ratios), 3)
        ranges[key] = [round(min(ratios), 3), round(max(ratios), 3)]
    figures["ready_vs_stock"] = round(ready_s["ours"] / ready_s["stock"], 3)
    return Result({"processor": str(processor()), **figures, "ranges": ranges, "rounds": config.rounds})


if __name__ == "__main__":
    sys.exit(
        main(
            "benchmarks.quick",
            {"": Command(BenchQuick, bench_quick, "ratios to stock vLLM, for before and after a change")},
        )
    )
