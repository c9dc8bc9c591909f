"""`python -m loadtest compare A B`: is B faster, slower, or not shown to differ, with intervals that respect time.

B is worse or better in a metric when it differs from A by more than the margin, beyond the doubt of the intervals: two
runs of one server always differ by something, and enough requests would show it. The intervals are of a bootstrap over
blocks of time (loadtest/blocks.py), widened as Student's t is where blocks are few, and hold for all metrics together,
so that a look at eight of them is no eight chances to be wrong. The judgement is on differences, not ratios, so that
errors where there were none are seen too. Two runs of one plan are compared block by block: what the plan does to both
is no doubt. A metric whose requests depend on each other for too long shows "?".

Latencies are of the requests that were due after the warm-up and whose client was to stay, throughput is of what ended
in the window of the run's own rates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counsel.cli import Result, argument, option
from counsel.errors import UserError
from counsel.files import read_json
from loadtest.blocks import FEWEST, Figure, Values, number_of_blocks, point, resampled
from loadtest.metrics import LATENCIES, measured, rounded
from loadtest.records import FAILED, Row
from loadtest.results import Results, read_results
from loadtest.scenario import Scenario
from loadtest.table import aligned
from loadtest.verdict import EXIT_STATUS
from loadtest.window import Window
from loadtest.workload import Arrival

_RESAMPLES = 1000
# What makes the load what it is; the rest is where it goes, how it is sent, and what is asked of it.
_LOAD = (
    "arrivals", "rate", "burstiness", "trace", "trace_speed", "concurrency", "mix", "base_share", "cold_share",
    "output_tokens", "ignore_eos", "no_system_prompt", "prompt_words", "unique_prompts", "turns", "think_s",
    "long_share", "long_words", "cancel_share", "cancel_after_s", "temperature", "churn_s",
)  # fmt: skip


class Metric(NamedTuple):
    """A figure of many rows: what each row adds (None: nothing), and what they make."""

    name: str
    of_row: Callable[[Row], float | None]
    figure: Figure
    less_is_better: bool


class Difference(NamedTuple):
    """A metric of both runs, B/A with its interval, and what that shows: better, worse, neither ("-") or "?".

    `blocks`: in how many each run was cut; fewer than 8 show nothing.
    """

    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    shows: str
    blocks: int


class Run(NamedTuple):
    """A finished run: all rows, and the seconds in which arrivals were due and replies are counted."""

    rows: Sequence[Row]
    due: Window
    ended: Window


@dataclass(frozen=True)
class Compare:
    """Which two runs, and how the blocks are cut."""

    a: str = argument("results directory of the run to compare with")
    b: str = argument("results directory of the run in question")
    block_s: float | None = option(
        None, "length of a block (default: as long as the requests of the run depend on each other)"
    )
    margin: float = option(0.05, "part by which B must differ at least; 0: any difference that can be shown")
    seed: int = option(0, "seed of the bootstrap")


def compare(options: Compare) -> Result:
    """Print each metric of both runs; exit 0 when B is nowhere worse, 3 when it is, 4 when that cannot be told."""
    if options.block_s is not None and options.block_s <= 0:
        raise UserError(f"block_s is {options.block_s:g}; it must be above 0")
    if not 0 <= options.margin < 1:
        raise UserError(f"margin is {options.margin:g}; it must be from 0 to below 1")
    folders = (Path(options.a), Path(options.b))
    verdicts = {str(folder): read_json(folder / "summary.json")["verdict"] for folder in folders}
    a, b = (read_results(folder) for folder in folders)
    paired = not a.scenario.closed and _shape(a.plan) == _shape(b.plan)
    found = differences(run_of(a), run_of(b), options.block_s, options.margin, options.seed, paired=paired)
    reasons = [f"{folder} is an invalid run" for folder, verdict in verdicts.items() if verdict == "invalid"]
    unlike = different_load(a.scenario, b.scenario)
    verdict = "invalid" if reasons else "different loads" if unlike else _verdict(found)
    print(aligned(_cells(found)))
    print(f"block bootstrap, 95 % for all metrics together; differences below {options.margin:.0%} do not count")
    print("both runs play one plan and are compared block by block" if paired else
          "the runs play different plans, whose chance adds to the doubt; one --seed would spare that")  # fmt: skip
    for text in unlike:
        print(f"not one load: {text}")
    if any(difference.shows == "?" for difference in found):
        print(f"?: fewer than {FEWEST} blocks of this run would be independent; run longer, or below saturation")
    for reason in reasons:
        print(f"not to be believed: {reason}")
    print(f"verdict: {verdict}")
    document = {"verdict": verdict, "paired": paired, "different": unlike,
                "differences": [difference._asdict() for difference in found]}  # fmt: skip
    return Result(rounded(document), EXIT_STATUS[verdict])


def run_of(results: Results) -> Run:
    """The rows of a run and the seconds they are compared over."""
    warmup_s = results.scenario.warmup_s
    if results.scenario.closed:
        due = Window(warmup_s, max([warmup_s, *(row.due_s for row in results.rows)]))
    else:
        due = Window(warmup_s, results.arrivals_end_s)
    return Run(results.rows, due, results.window)


def different_load(a: Scenario, b: Scenario) -> list[str]:
    """In what the loads of two scenarios differ, one text each; none where they offer the same."""
    names = [name for name in _LOAD if getattr(a, name) != getattr(b, name)]
    shaped = "(" in a.rate and not a.closed and not a.trace
    if shaped and a.duration_s != b.duration_s:
        names.append("duration_s")
    return [f"{name} is {getattr(a, name)!r} in A and {getattr(b, name)!r} in B" for name in names]


def differences(
    a: Run, b: Run, block_s: float | None, margin: float, seed: int, *, paired: bool = False
) -> list[Difference]:
    """Every metric of METRICS, compared; `paired`: what was due at one time in both belongs together."""
    return [_difference(metric, a, b, block_s, margin, seed, paired) for metric in METRICS]


def _difference(
    metric: Metric, a: Run, b: Run, block_s: float | None, margin: float, seed: int, paired: bool
) -> Difference:
    values = (_values(metric, a), _values(metric, b))
    value_a, value_b = point(values[0], metric.figure), point(values[1], metric.figure)
    if value_a is None or value_b is None:
        # Not a whole reply in one of them: nothing to hold against the other.
        return Difference(metric.name, value_a, value_b, None, None, None, "-", 0)
    if block_s is None:
        n = number_of_blocks(values, metric.figure, paired=paired)
    else:
        n = int(min(each.length_s for each in values) / block_s + 1e-9)
    if n < FEWEST:
        return Difference(metric.name, value_a, value_b, value_b / value_a if value_a else None, None, None, "?", n)
    random = np.random.default_rng(seed)
    picks_a = random.integers(n, size=(_RESAMPLES, n))
    picks_b = picks_a if paired else random.integers(n, size=(_RESAMPLES, n))
    drawn = np.stack(
        [resampled(each, metric.figure, picks) for each, picks in zip(values, (picks_a, picks_b), strict=True)]
    )
    drawn = drawn[:, ~np.isnan(drawn).any(axis=0)]
    if drawn.shape[1] < 0.95 * _RESAMPLES:
        return Difference(metric.name, value_a, value_b, None, None, None, "-", n)
    in_a, in_b = drawn
    higher = _interval(in_b - (1 + margin) * in_a, value_b - (1 + margin) * value_a, n)[0] > 0
    lower = _interval(in_b - (1 - margin) * in_a, value_b - (1 - margin) * value_a, n)[1] < 0
    shows = "-" if not (higher or lower) else "better" if lower == metric.less_is_better else "worse"
    if not in_a.all() or not value_a:
        return Difference(metric.name, value_a, value_b, None, None, None, shows, n)
    ratio = value_b / value_a
    low, high = _interval(in_b / in_a, ratio, n)
    return Difference(metric.name, value_a, value_b, ratio, max(low, 0.0), high, shows, n)


def _interval(drawn: "np.ndarray", value: float, n: int) -> tuple[float, float]:
    """The middle of the resamples, outside which all metrics together are with a probability of 5 % (Bonferroni).

    Resamples of few blocks spread too little, and by how much is itself unsure: by sqrt(n / (n - 1)) and by t over z.
    """
    from scipy.stats import norm, t

    tail = 0.025 / len(METRICS)
    wider = (n / (n - 1)) ** 0.5 * t.ppf(1 - tail, n - 1) / norm.ppf(1 - tail)
    low, high = np.percentile(drawn, (100 * tail, 100 * (1 - tail)))
    return value - wider * max(value - float(low), 0.0), value + wider * max(float(high) - value, 0.0)


def _values(metric: Metric, run: Run) -> Values:
    """What each row of a run adds to a metric, over the seconds that the metric is of."""
    if metric.figure == Figure():
        window = run.ended
        counted = [(row.last_s or 0.0, row) for row in window.ended(run.rows)]
    else:
        window = run.due
        rows = [row for row in measured(run.rows, window.begin_s) if row.stays]
        counted = [(row.due_s, row) for row in rows]
    pairs = [(at_s - window.begin_s, value) for at_s, row in counted if (value := metric.of_row(row)) is not None]
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    return Values(table[:, 0], table[:, 1], window.length_s)


def _percentile(name: str, percent: int) -> Metric:
    latency = LATENCIES[f"{name}_s"]
    return Metric(
        f"{name}_p{percent}_s", lambda row: latency(row) if row.ok else None, Figure(percent), less_is_better=True
    )


METRICS = (
    *(_percentile(name, percent) for name in ("ttft", "tpot", "e2e") for percent in (50, 90)),
    Metric("error_rate", lambda row: float(row.outcome in FAILED), Figure(mean=True), True),
    Metric("tokens_per_s", lambda row: float(row.completion_tokens or 0), Figure(), False),
)


def _verdict(found: Sequence[Difference]) -> str:
    shown = {difference.shows for difference in found}
    if "worse" in shown:
        return "worse"
    return "cannot tell" if "?" in shown else "better" if "better" in shown else "no difference"


def _shape(plan: Sequence[Arrival]) -> list[tuple[Any, ...]]:
    """A plan without its models' names: the same load, asked of whom it may."""
    return [(each.due_s, len(each.prompts), each.max_tokens, each.think_s, each.cancel_s) for each in plan]


def _cells(found: Sequence[Difference]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("metric", "A", "B", "B/A", "from", "to", "blocks", "B is")]
    for difference in found:
        numbers = (f"{value:.4g}" if isinstance(value, float | int) else "-" for value in difference[1:6])
        lines.append((difference.metric, *numbers, str(difference.blocks), difference.shows))
    return lines
