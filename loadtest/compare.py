"""`python -m loadtest compare A B`: is B faster, slower, or not shown to differ, with intervals that respect time.

Requests close in time share a queue, so they are no independent draws: an interval over requests would be far too
narrow. The bootstrap here draws whole blocks of time, each run on its own, and asks how much B/A moves.

B is worse or better in a metric when it differs from A by more than the margin, beyond the doubt of the intervals: two
runs of one server always differ by something, and enough requests would show it. The intervals hold for all metrics
together, so that a look at eight of them is no eight chances to be wrong. The judgement is on differences, not ratios,
so that errors where there were none are seen too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loadtest.figures import LATENCIES, measured, rounded
from loadtest.rows import FAILED, Row, read_rows
from loadtest.scenario import read_scenario
from loadtest.table import aligned
from train.command import Result, argument, option
from train.errors import UserError
from train.files import read_json

Block = Sequence[Row]
_RESAMPLES = 1000
_FEWEST_BLOCKS = 8


class Metric(NamedTuple):
    """A figure of many rows: what each row adds (None: nothing), and what they make in so many seconds."""

    name: str
    of_row: Callable[[Row], float | None]
    of_all: "Callable[[np.ndarray, float], float]"
    less_is_better: bool


class Difference(NamedTuple):
    """A metric of both runs, B/A with its interval, and what that shows: better, worse, or neither ("-")."""

    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    shows: str


@dataclass(frozen=True)
class Compare:
    """Which two runs, and how the blocks are cut."""

    a: str = argument("results directory of the run to compare with")
    b: str = argument("results directory of the run in question")
    block_s: float = option(5.0, "length of a block; longer than requests depend on each other")
    margin: float = option(0.05, "part by which B must differ at least; 0: any difference that can be shown")
    seed: int = option(0, "seed of the bootstrap")


def compare(options: Compare) -> Result:
    """Print each metric of both runs; exit 0 when B is nowhere worse, 1 when it is, 2 when a run is invalid."""
    if options.block_s <= 0:
        raise UserError(f"block_s is {options.block_s:g}; it must be above 0")
    if not 0 <= options.margin < 1:
        raise UserError(f"margin is {options.margin:g}; it must be from 0 to below 1")
    summaries = [read_json(Path(run) / "summary.json") for run in (options.a, options.b)]
    a, b = (_blocks(Path(run), options.block_s) for run in (options.a, options.b))
    found = differences(a, b, options.block_s, options.margin, options.seed)
    invalid = [summary["dir"] for summary in summaries if summary["verdict"] == "invalid"]
    shown = {difference.shows for difference in found}
    verdict = (
        "invalid" if invalid else "worse" if "worse" in shown else "better" if "better" in shown else "no difference"
    )
    print(aligned(_cells(found)))
    print(f"{len(a)} and {len(b)} blocks of {options.block_s:g} s; block bootstrap, 95 % for all metrics together; "
          f"differences below {options.margin:.0%} do not count")  # fmt: skip
    for run in invalid:
        print(f"not to be believed: {run} is an invalid run")
    print(f"verdict: {verdict}")
    document = {"verdict": verdict, "differences": [difference._asdict() for difference in found]}
    return Result(rounded(document), {"invalid": 2, "worse": 1}.get(verdict, 0))


def differences(a: Sequence[Block], b: Sequence[Block], block_s: float, margin: float, seed: int) -> list[Difference]:
    """Every metric of METRICS, compared; raises UserError when a run is too short to tell."""
    if min(len(a), len(b)) < _FEWEST_BLOCKS:
        raise UserError(
            f"the runs have {len(a)} and {len(b)} blocks of {block_s:g} s; {_FEWEST_BLOCKS} are needed: "
            "run longer, or give a smaller --block-s"
        )
    random = np.random.default_rng(seed)
    picks = [(random.integers(len(a), size=len(a)), random.integers(len(b), size=len(b))) for _ in range(_RESAMPLES)]
    return [_difference(metric, a, b, block_s, margin, picks) for metric in METRICS]


def cut(rows: Sequence[Row], begin_s: float, end_s: float, block_s: float) -> list[list[Row]]:
    """The rows by the block in which they were due; a last block that would be cut short is left out."""
    n = int((end_s - begin_s) / block_s + 1e-9)
    blocks: list[list[Row]] = [[] for _ in range(n)]
    for row in rows:
        index = int((row.due_s - begin_s) / block_s)
        if 0 <= index < n:
            blocks[index].append(row)
    return blocks


def _difference(
    metric: Metric,
    a: Sequence[Block],
    b: Sequence[Block],
    block_s: float,
    margin: float,
    picks: "list[tuple[np.ndarray, np.ndarray]]",
) -> Difference:
    in_a, in_b = _values(metric, a), _values(metric, b)

    def of(blocks: "Sequence[np.ndarray]") -> float | None:
        values = np.concatenate(blocks)
        return metric.of_all(values, len(blocks) * block_s) if values.size else None

    value_a, value_b = of(in_a), of(in_b)
    drawn = [(of([in_a[i] for i in from_a]), of([in_b[i] for i in from_b])) for from_a, from_b in picks]
    pairs = np.array([(x, y) for x, y in drawn if x is not None and y is not None])
    if value_a is None or value_b is None or len(pairs) < 0.95 * len(picks):
        # Hardly a whole reply in one of them: nothing to hold against the other.
        return Difference(metric.name, value_a, value_b, None, None, None, "-")
    in_draws_a, in_draws_b = pairs.T
    higher = _interval(in_draws_b - (1 + margin) * in_draws_a)[0] > 0
    lower = _interval(in_draws_b - (1 - margin) * in_draws_a)[1] < 0
    shows = "-" if not (higher or lower) else "better" if lower == metric.less_is_better else "worse"
    if not in_draws_a.all():
        return Difference(metric.name, value_a, value_b, None, None, None, shows)
    return Difference(metric.name, value_a, value_b, value_b / value_a, *_interval(in_draws_b / in_draws_a), shows)


def _interval(drawn: "np.ndarray") -> tuple[float, float]:
    """The middle of the resamples, outside which all metrics together are with a probability of 5 % (Bonferroni)."""
    tail = 2.5 / len(METRICS)
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return float(low), float(high)


def _values(metric: Metric, blocks: Sequence[Block]) -> "list[np.ndarray]":
    return [np.array([v for row in block if (v := metric.of_row(row)) is not None], dtype=float) for block in blocks]


def _percentile(name: str, percent: int) -> Metric:
    latency = LATENCIES[f"{name}_s"]
    return Metric(
        f"{name}_p{percent}_s",
        lambda row: latency(row) if row.ok else None,
        lambda values, seconds: float(np.percentile(values, percent)),
        less_is_better=True,
    )


METRICS = (
    *(_percentile(name, percent) for name in ("ttft", "tpot", "e2e") for percent in (50, 90)),
    Metric("error_rate", lambda row: float(row.outcome in FAILED), lambda values, seconds: float(values.mean()), True),
    Metric("tokens_per_s", lambda row: float(row.completion_tokens or 0) if row.ok else 0.0,
           lambda values, seconds: float(values.sum()) / seconds, False),
)  # fmt: skip


def _blocks(directory: Path, block_s: float) -> list[list[Row]]:
    scenario = read_scenario(directory)
    rows = measured(read_rows(directory / "requests.jsonl"), scenario.warmup_s)
    end_s = min(scenario.duration_s, max((row.due_s for row in rows), default=0.0) + block_s)
    return cut(rows, scenario.warmup_s, end_s, block_s)


def _cells(found: Sequence[Difference]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("metric", "A", "B", "B/A", "from", "to", "B is")]
    for difference in found:
        numbers = (f"{value:.4g}" if isinstance(value, float | int) else "-" for value in difference[1:6])
        lines.append((difference.metric, *numbers, difference.shows))
    return lines
