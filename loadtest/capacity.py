"""`python -m loadtest find-capacity`: the highest rate at which a server still meets its objectives.

The rate is doubled from the lowest until it fails, then the gap is bisected (by ratio) until it is small. Each rate is
tested several times with different seeds, and passes if every run does: one lucky run must not raise the answer. A run
is long enough for its objectives: a p99 needs 200 requests, which take seven minutes at 0.5 requests/s. An invalid run
is repeated with another seed. If that one is invalid too, the rate bounds the search like one that missed.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from counsel.cli import Result, option
from counsel.errors import UserError
from counsel.files import write_json, write_text
from counsel.report import page, section
from counsel.report.tables import text_table
from counsel.values import PositiveFloat, PositiveInt
from loadtest.charts import curves
from loadtest.metrics import curve_point, rounded
from loadtest.mix import shares
from loadtest.prepare import results_directory, target_models
from loadtest.run import run_load_test
from loadtest.scenario import Scenario
from loadtest.slo import min_requests, parse_objective
from loadtest.verdict import EXIT_STATUS

_SEARCH = "search"


@dataclass(frozen=True)
class Capacity(Scenario):
    """A scenario, and how to search for its rate."""

    rate: str = option("0.5", "rate to start with, requests/s", group=_SEARCH, metavar="RATE")
    lowest: PositiveFloat | None = option(
        None, "lowest rate to try, which comes first", group=_SEARCH, metavar="RATE", shown="the value of --rate"
    )
    highest: PositiveFloat = option(256.0, "highest rate to try", group=_SEARCH, metavar="RATE")
    repeats: PositiveInt = option(2, "runs per rate; all must pass", group=_SEARCH)
    precision: PositiveFloat = option(
        0.1, "stop when the lowest failing rate is within this fraction of the highest passing one", group=_SEARCH
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.slo:
            raise UserError("find-capacity needs at least one --slo to meet, such as --slo 'ttft_p90_s <= 2'")
        if self.closed or self.trace:
            raise UserError(
                f"arrivals is {self.arrivals!r}; find-capacity sets the rate itself: use poisson, constant or gamma"
            )
        if self.web or self.bind:
            raise UserError("find-capacity makes many runs; leave out --web and --bind")
        if self.lowest is None and "(" in self.rate:
            raise UserError(f"rate is {self.rate!r}; find-capacity sets it itself: give --lowest to start with")
        if not 0 < self.start_rate <= self.highest:
            raise UserError(
                f"the lowest rate is {self.start_rate:g} and highest is {self.highest:g}; "
                "the lowest must be above 0 and not above highest"
            )

    @property
    def start_rate(self) -> float:
        return float(self.rate) if self.lowest is None else self.lowest


class SearchResult(NamedTuple):
    """The highest rate that passed (None: not even the lowest) and the lowest that failed (None: all passed)."""

    held: float | None
    failed: float | None


def search(holds: Callable[[float], bool], lowest: float, highest: float, precision: float) -> SearchResult:
    """Find the rate at which `holds` becomes false, assuming that it changes once."""
    held, failed = None, None
    rate = lowest
    while failed is None:
        if not holds(rate):
            failed = rate
        elif rate >= highest:
            return SearchResult(rate, None)
        else:
            held, rate = rate, min(2 * rate, highest)
    while held is not None and failed > held * (1 + precision):
        middle = (held * failed) ** 0.5
        if holds(middle):
            held = middle
        else:
            failed = middle
    return SearchResult(held, failed)


class _Stopped(Exception):
    """Why the search ended early: Ctrl-C, or a server or disk that failed."""


def run_duration_s(rate: float, requests: int, options: Capacity) -> float:
    """Seconds of arrivals for this many requests whose client stays, even if chance gives fewer (3 sigma)."""
    if options.arrivals != "constant":
        requests += math.ceil(3 * requests**0.5)
    needed_s = requests / max(rate * (1 - options.cancel_share), 1e-9)
    return max(options.duration_s, options.warmup_s + math.ceil(needed_s))


def requests_needed(options: Capacity) -> int:
    """The requests that every objective needs; an objective of one model needs them from that model."""
    objectives = [parse_objective(text) for text in options.slo]
    most = max(min_requests(objective.metric) for objective in objectives)
    if not any(objective.scope for objective in objectives):
        return most
    models = target_models(options)
    given = shares(options.mix, models.names, models.base, options.base_share)

    def least(scope: str) -> float:
        own = [share for name, share in given.items() if scope in ("*", name) and share > 0]
        return min(own, default=1.0) if scope else 1.0

    return math.ceil(max(min_requests(objective.metric) / least(objective.scope) for objective in objectives))


def find_capacity(options: Capacity) -> Result:
    """Search, print every run, and write capacity.json and report.html.

    Exit 3 if no rate passed, 4 if the client was the limit or the search ended early.
    """
    out = results_directory(options)
    if out.exists():
        raise UserError(f"{str(out)!r} exists; choose another --out")
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Scenario)}
    points: list[dict[str, Any]] = []
    invalid_at: dict[float, str] = {}
    held: list[float] = []
    missed: list[float] = []
    stopped = ""
    requests = requests_needed(options)

    def probe(rate: float, seed: int, name: str) -> dict[str, Any]:
        duration_s = run_duration_s(rate, requests, options)
        print(f"{rate:.4g} requests/s for {duration_s:g} s, {name} of {options.repeats}", file=sys.stderr)
        own = {"rate": f"{rate!r}", "seed": seed, "duration_s": duration_s, "out": str(out / f"rate-{rate:.4g}-{name}")}
        scenario = Scenario(**{**fields, **own})
        try:
            summary = run_load_test(scenario)
        except UserError as error:
            if not points:
                raise
            raise _Stopped(str(error)) from error
        points.append({**curve_point(rate, summary["all"]), "verdict": summary["verdict"], "dir": summary["dir"]})
        if summary.get("stopped"):
            raise _Stopped(summary["stopped"])
        return summary

    def holds(rate: float) -> bool:
        for repeat in range(options.repeats):
            summary = probe(rate, options.seed + repeat, f"run-{repeat + 1}")
            if summary["verdict"] == "invalid":
                print(f"invalid: {summary['invalid'][0]}; trying again", file=sys.stderr)
                summary = probe(rate, options.seed + options.repeats + repeat, f"run-{repeat + 1}-again")
            if summary["verdict"] == "invalid":
                invalid_at[rate] = summary["invalid"][0]
            if summary["verdict"] != "passed":
                missed.append(rate)
                return False
        held.append(rate)
        return True

    try:
        result = search(holds, options.start_rate, options.highest, options.precision)
    except _Stopped as error:
        # Keep the result so far.
        result = SearchResult(max(held, default=None), min(missed, default=None))
        stopped = str(error)
    invalid = stopped or ("" if result.failed is None else invalid_at.get(result.failed, ""))
    points.sort(key=lambda point: point["offered"])
    document = rounded(
        {"dir": str(out), "held": result.held, "failed": result.failed, "invalid": invalid, "objectives": options.slo,
         "points": points}
    )  # fmt: skip
    write_text(out / "report.html", _page(document, points))
    write_json(out / "capacity.json", document)
    print(text_table(_cells(points), 1))
    print(_sentence(result, invalid))
    return Result(document, EXIT_STATUS["invalid" if invalid else "passed" if result.held else "missed"])


def _sentence(result: SearchResult, invalid: str) -> str:
    held, failed = result
    if held is None and failed is None:
        return f"no capacity: {invalid}"
    if invalid and failed is None:
        return f"capacity: at least {held:.4g} requests/s ({invalid})"
    if invalid and held is None:
        return f"no capacity: the run at {failed:.4g} requests/s, the lowest tried, is invalid: {invalid}"
    if invalid:
        return f"capacity: at least {held:.4g} requests/s (the run at {failed:.4g} is invalid: {invalid})"
    if held is None:
        return f"no capacity: the objectives are missed even at {failed:.4g} requests/s"
    limit = "the highest rate tried" if failed is None else f"missed at {failed:.4g}"
    return f"capacity: {held:.4g} requests/s ({limit})"


def _cells(points: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("requests/s", "achieved", "TTFT p90 (ms)", "TPOT p50 (ms)", "tokens/s", "goodput", "verdict")
    ]
    for point in points:
        scaled = ((point["achieved"], 1), (point["ttft_p90_s"], 1000), (point["tpot_p50_s"], 1000),
                  (point["tokens_per_s"], 1), (point["goodput_share"], 1))  # fmt: skip
        values = ("-" if value is None else f"{factor * value:.4g}" for value, factor in scaled)
        lines.append((f"{point['offered']:.4g}", *values, point["verdict"]))
    return lines


def _page(document: dict[str, Any], points: list[dict[str, Any]]) -> str:
    sentence = _sentence(SearchResult(document["held"], document["failed"]), document["invalid"])
    return page(
        "Capacity",
        [section("Every run", _cells(points)), section("Against the offered rate", curves(points))],
        finding=f"{sentence}, meeting {'; '.join(document['objectives'])}",
    )
