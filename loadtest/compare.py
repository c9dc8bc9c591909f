"""`python -m loadtest compare A B`: whether B is faster, slower, or not shown to differ, with confidence intervals.

B is better or worse in a metric if it differs from A by more than the margin, beyond the confidence interval: two runs
of one server always differ a little, and enough requests would show it. The intervals come from a block bootstrap over
time (loadtest/blocks.py), are widened as in Student's t when blocks are few, and hold for all metrics together, because
eight metrics are eight chances to be wrong. They are for differences, not ratios, because A may have had no errors. Two
runs of the same plan are compared block by block, so that the plan's own variation cancels out. A metric whose requests
depend on each other for too long shows "?".

Latencies are over the requests that were due after the warm-up and whose client stays to the end. Throughput is over
the replies that ended in the window that the rates of the run use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counsel.cli import Result, argument, option
from counsel.files import read_json
from counsel.report.tables import text_table
from counsel.values import PositiveFloat, Seed, ShareBelowOne, check_bounds
from loadtest.blocks import MIN_BLOCKS, Statistic, Values, number_of_blocks, point, resampled
from loadtest.metrics import LATENCIES, measured, rounded
from loadtest.records import FAILED, RequestRecord
from loadtest.results import Results, read_results
from loadtest.scenario import Scenario
from loadtest.verdict import EXIT_STATUS
from loadtest.window import Window
from loadtest.workload import Arrival

_RESAMPLES = 1000
# The keys that define the offered load. The others say where it goes, how it is sent, and what is expected.
_LOAD_KEYS = (
    "arrivals", "rate", "burstiness", "trace", "trace_speed", "concurrency", "mix", "base_share", "cold_share",
    "output_tokens", "ignore_eos", "no_system_prompt", "prompt_words", "unique_prompts", "turns", "think_s",
    "long_share", "long_words", "cancel_share", "cancel_after_s", "temperature", "churn_s",
)  # fmt: skip


class ComparedMetric(NamedTuple):
    """A metric of a run: the value of each request (None: it has none), and the statistic over them."""

    name: str
    value_of: Callable[[RequestRecord], float | None]
    statistic: Statistic
    less_is_better: bool


class MetricDifference(NamedTuple):
    """A metric in both runs, B/A with its interval, and what that shows: better, worse, neither ("-") or "?".

    `blocks` is the number of blocks that each run was cut into; fewer than 8 show nothing.
    """

    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    shows: str
    blocks: int


class RunData(NamedTuple):
    """A finished run: all records, the time in which arrivals were due, and the window of its rates."""

    records: Sequence[RequestRecord]
    due: Window
    ended: Window


@dataclass(frozen=True)
class Compare:
    """Which two runs, and how the blocks are cut."""

    a: str = argument("results directory of the baseline run")
    b: str = argument("results directory of the run to judge")
    block_s: PositiveFloat | None = option(
        None, "length of a block", shown="as long as the requests of the run depend on each other"
    )
    margin: ShareBelowOne = option(0.05, "smallest relative difference that counts; 0: any that can be shown")
    seed: Seed = option(0, "seed of the bootstrap")

    def __post_init__(self) -> None:
        check_bounds(self)


def compare_runs(options: Compare) -> Result:
    """Print each metric of both runs. Exit 0 if B is not worse in any, 3 if it is, 4 if neither can be shown."""
    folders = (Path(options.a), Path(options.b))
    verdicts = {str(folder): read_json(folder / "summary.json")["verdict"] for folder in folders}
    a, b = (read_results(folder) for folder in folders)
    paired = not a.scenario.closed and _load_shape(a.plan) == _load_shape(b.plan)
    compared = differences(run_data(a), run_data(b), options.block_s, options.margin, options.seed, paired=paired)
    reasons = [f"{folder} is an invalid run" for folder, verdict in verdicts.items() if verdict == "invalid"]
    unlike = different_load(a.scenario, b.scenario)
    verdict = "invalid" if reasons else "different loads" if unlike else _verdict(compared)
    print(text_table(_cells(compared), 1))
    print(f"block bootstrap, 95 % for all metrics together; differences below {options.margin:.0%} do not count")
    print("both runs have the same plan and are compared block by block" if paired else
          "the runs have different plans, which adds uncertainty; use the same --seed to avoid it")  # fmt: skip
    for text in unlike:
        print(f"different load: {text}")
    if any(difference.shows == "?" for difference in compared):
        print(f"?: the run has fewer than {MIN_BLOCKS} independent blocks; run longer, or below saturation")
    for reason in reasons:
        print(f"invalid: {reason}")
    print(f"verdict: {verdict}")
    document = {"verdict": verdict, "paired": paired, "different": unlike,
                "differences": [difference._asdict() for difference in compared]}  # fmt: skip
    return Result(rounded(document), EXIT_STATUS[verdict])


def run_data(results: Results) -> RunData:
    """The records of a run and the times over which they are compared."""
    warmup_s = results.scenario.warmup_s
    if results.scenario.closed:
        due = Window(warmup_s, max([warmup_s, *(record.due_s for record in results.records)]))
    else:
        due = Window(warmup_s, results.arrivals_end_s)
    return RunData(results.records, due, results.window)


def different_load(a: Scenario, b: Scenario) -> list[str]:
    """How the offered loads of two scenarios differ, one string per key; none if they are the same."""
    names = [name for name in _LOAD_KEYS if getattr(a, name) != getattr(b, name)]
    shaped = "(" in a.rate and not a.closed and not a.trace
    if shaped and a.duration_s != b.duration_s:
        names.append("duration_s")
    return [f"{name} is {getattr(a, name)!r} in A and {getattr(b, name)!r} in B" for name in names]


def differences(
    a: RunData, b: RunData, block_s: float | None, margin: float, seed: int, *, paired: bool = False
) -> list[MetricDifference]:
    """Every metric of METRICS, compared. `paired`: requests due at the same time in both runs belong together."""
    return [_difference(metric, a, b, block_s, margin, seed, paired) for metric in METRICS]


def _difference(
    metric: ComparedMetric, a: RunData, b: RunData, block_s: float | None, margin: float, seed: int, paired: bool
) -> MetricDifference:
    values = (_values(metric, a), _values(metric, b))
    value_a, value_b = point(values[0], metric.statistic), point(values[1], metric.statistic)
    if value_a is None or value_b is None:
        # One run has no complete reply, so there is nothing to compare.
        return MetricDifference(metric.name, value_a, value_b, None, None, None, "-", 0)
    if block_s is None:
        n = number_of_blocks(values, metric.statistic, paired=paired)
    else:
        n = int(min(each.length_s for each in values) / block_s + 1e-9)
    if n < MIN_BLOCKS:
        return MetricDifference(
            metric.name, value_a, value_b, value_b / value_a if value_a else None, None, None, "?", n
        )
    random = np.random.default_rng(seed)
    picks_a = random.integers(n, size=(_RESAMPLES, n))
    picks_b = picks_a if paired else random.integers(n, size=(_RESAMPLES, n))
    drawn = np.stack(
        [resampled(each, metric.statistic, picks) for each, picks in zip(values, (picks_a, picks_b), strict=True)]
    )
    drawn = drawn[:, ~np.isnan(drawn).any(axis=0)]
    if drawn.shape[1] < 0.95 * _RESAMPLES:
        return MetricDifference(metric.name, value_a, value_b, None, None, None, "-", n)
    in_a, in_b = drawn
    higher = _interval(in_b - (1 + margin) * in_a, value_b - (1 + margin) * value_a, n)[0] > 0
    lower = _interval(in_b - (1 - margin) * in_a, value_b - (1 - margin) * value_a, n)[1] < 0
    shows = "-" if not (higher or lower) else "better" if lower == metric.less_is_better else "worse"
    if not in_a.all() or not value_a:
        return MetricDifference(metric.name, value_a, value_b, None, None, None, shows, n)
    ratio = value_b / value_a
    low, high = _interval(in_b / in_a, ratio, n)
    return MetricDifference(metric.name, value_a, value_b, ratio, max(low, 0.0), high, shows, n)


def _interval(drawn: "np.ndarray", value: float, n: int) -> tuple[float, float]:
    """The 95 % interval for all metrics together (Bonferroni), from the resamples of `value`.

    Resamples of few blocks vary too little, and by how much is itself uncertain: hence sqrt(n / (n - 1)) and t over z.
    """
    from scipy.stats import norm, t

    tail = 0.025 / len(METRICS)
    factor = (n / (n - 1)) ** 0.5 * t.ppf(1 - tail, n - 1) / norm.ppf(1 - tail)
    low, high = np.percentile(drawn, (100 * tail, 100 * (1 - tail)))
    return value - factor * max(value - float(low), 0.0), value + factor * max(float(high) - value, 0.0)


def _values(metric: ComparedMetric, run: RunData) -> Values:
    """The value of each request for a metric, and when, within the time that the metric covers."""
    if metric.statistic == Statistic():
        window = run.ended
        counted = [(record.last_s or 0.0, record) for record in window.ended(run.records)]
    else:
        window = run.due
        counted = [(record.due_s, record) for record in measured(run.records, window.begin_s) if record.stays]
    pairs = [
        (at_s - window.begin_s, value) for at_s, record in counted if (value := metric.value_of(record)) is not None
    ]
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    return Values(table[:, 0], table[:, 1], window.length_s)


def _percentile(name: str, percent: int) -> ComparedMetric:
    latency = LATENCIES[f"{name}_s"]
    return ComparedMetric(
        f"{name}_p{percent}_s",
        lambda record: latency(record) if record.ok else None,
        Statistic(percent),
        less_is_better=True,
    )


METRICS = (
    *(_percentile(name, percent) for name in ("ttft", "tpot", "e2e") for percent in (50, 90)),
    ComparedMetric("error_rate", lambda record: float(record.outcome in FAILED), Statistic(mean=True), True),
    ComparedMetric("tokens_per_s", lambda record: float(record.completion_tokens or 0), Statistic(), False),
)


def _verdict(compared: Sequence[MetricDifference]) -> str:
    shown = {difference.shows for difference in compared}
    if "worse" in shown:
        return "worse"
    return "cannot tell" if "?" in shown else "better" if "better" in shown else "no difference"


def _load_shape(plan: Sequence[Arrival]) -> list[tuple[Any, ...]]:
    """A plan without the names of its models, to find the same load on other models."""
    return [(each.due_s, len(each.prompts), each.max_tokens, each.think_s, each.cancel_s) for each in plan]


def _cells(compared: Sequence[MetricDifference]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("metric", "A", "B", "B/A", "from", "to", "blocks", "B is")]
    for difference in compared:
        numbers = (f"{value:.4g}" if isinstance(value, float | int) else "-" for value in difference[1:6])
        lines.append((difference.metric, *numbers, str(difference.blocks), difference.shows))
    return lines
