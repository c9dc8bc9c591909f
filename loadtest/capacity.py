"""`python -m loadtest find-capacity`: the highest rate at which a server still holds its objectives.

Rates are doubled from the lowest until one fails, then the gap is halved (by ratio) until it is small. Each rate is
run several times with different seeds, and holds when every run passes: one lucky run must not raise the answer. A run
lasts as long as its objectives need requests: 200 for a p99, at 0.5 requests/s, are seven minutes. One that is invalid
is made again with another seed; a rate at which that is invalid too bounds the search like one that missed.
"""

import dataclasses
import html
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from counsel.cli import Result, option
from counsel.errors import UserError
from counsel.files import write_json, write_text
from loadtest.charts import curves
from loadtest.metrics import curve_point, rounded
from loadtest.mix import shares
from loadtest.prepare import ask_models, results_directory
from loadtest.report import page, section
from loadtest.run import play
from loadtest.scenario import Scenario
from loadtest.slo import parse_objective, rows_needed
from loadtest.table import aligned
from loadtest.verdict import EXIT_STATUS


@dataclass(frozen=True)
class Capacity(Scenario):
    """A scenario whose rate is searched for."""

    rate: str = option("0.5", "rate to begin with, requests/s")
    lowest: float | None = option(None, "rate to begin with (default: rate)")
    highest: float = option(256.0, "rate at which to stop raising")
    repeats: int = option(2, "runs per rate; all must pass")
    precision: float = option(0.1, "stop when the lowest failing rate is within this part of the highest held one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.slo:
            raise UserError("find-capacity needs at least one --slo to hold")
        if self.closed or self.trace:
            raise UserError(
                f"arrivals is {self.arrivals!r}; find-capacity needs a rate to set: poisson, constant, gamma"
            )
        if self.web or self.bind:
            raise UserError("find-capacity plays many runs on its own; it takes neither --web nor --bind")
        if self.lowest is None and "(" in self.rate:
            raise UserError(f"rate is {self.rate!r}; find-capacity sets it itself: give the --lowest to begin with")
        if not 0 < self.begin <= self.highest or self.repeats < 1 or self.precision <= 0:
            raise UserError("find-capacity needs 0 < lowest <= highest, repeats of at least 1 and a precision above 0")

    @property
    def begin(self) -> float:
        return float(self.rate) if self.lowest is None else self.lowest


class Found(NamedTuple):
    """The highest rate that held (None: not even the lowest) and the lowest that did not (None: all held)."""

    held: float | None
    failed: float | None


def search(holds: Callable[[float], bool], lowest: float, highest: float, precision: float) -> Found:
    """Find where `holds` turns false, assuming it turns once."""
    held, failed = None, None
    rate = lowest
    while failed is None:
        if not holds(rate):
            failed = rate
        elif rate >= highest:
            return Found(rate, None)
        else:
            held, rate = rate, min(2 * rate, highest)
    while held is not None and failed > held * (1 + precision):
        middle = (held * failed) ** 0.5
        if holds(middle):
            held = middle
        else:
            failed = middle
    return Found(held, failed)


class _Stopped(Exception):
    """Why a run of the search did not come to its end: Ctrl-C, or a server or a disk that gave out."""


def long_enough_s(rate: float, requests: int, options: Capacity) -> float:
    """Seconds of arrivals that hold so many requests of clients that stay, also where chance gives fewer (3 sigma)."""
    if options.arrivals != "constant":
        requests += math.ceil(3 * requests**0.5)
    needed_s = requests / max(rate * (1 - options.cancel_share), 1e-9)
    return max(options.duration_s, options.warmup_s + math.ceil(needed_s))


def requests_needed(options: Capacity) -> int:
    """The most requests that one of the objectives needs; one of a model, as many of that model."""
    objectives = [parse_objective(text) for text in options.slo]
    most = max(rows_needed(objective.metric) for objective in objectives)
    if not any(objective.scope for objective in objectives):
        return most
    models = ask_models(options)
    given = shares(options.mix, models.names, models.base, options.base_share)

    def least(scope: str) -> float:
        own = [share for name, share in given.items() if scope in ("*", name) and share > 0]
        return min(own, default=1.0) if scope else 1.0

    return math.ceil(max(rows_needed(objective.metric) / least(objective.scope) for objective in objectives))


def find_capacity(options: Capacity) -> Result:
    """Search, print every rate, and write capacity.json and report.html.

    Exit 3 when no rate held, 4 when the client gave out first or the search did not come to its end.
    """
    out = results_directory(options)
    if out.exists():
        raise UserError(f"{str(out)!r} exists; choose another --out")
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Scenario)}
    points: list[dict[str, Any]] = []
    not_believed: dict[float, str] = {}
    held: list[float] = []
    missed: list[float] = []
    stopped = ""
    requests = requests_needed(options)

    def probe(rate: float, seed: int, name: str) -> dict[str, Any]:
        duration_s = long_enough_s(rate, requests, options)
        print(f"{rate:.4g} requests/s for {duration_s:g} s, {name} of {options.repeats}", file=sys.stderr)
        own = {"rate": f"{rate!r}", "seed": seed, "duration_s": duration_s, "out": str(out / f"rate-{rate:.4g}-{name}")}
        scenario = Scenario(**{**fields, **own})
        try:
            summary = play(scenario)
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
                print(f"not to be believed: {summary['invalid'][0]}; once more", file=sys.stderr)
                summary = probe(rate, options.seed + options.repeats + repeat, f"run-{repeat + 1}-again")
            if summary["verdict"] == "invalid":
                not_believed[rate] = summary["invalid"][0]
            if summary["verdict"] != "passed":
                missed.append(rate)
                return False
        held.append(rate)
        return True

    try:
        found = search(holds, options.begin, options.highest, options.precision)
    except _Stopped as error:
        # What was found so far is worth keeping.
        found = Found(max(held, default=None), min(missed, default=None))
        stopped = str(error)
    invalid = stopped or ("" if found.failed is None else not_believed.get(found.failed, ""))
    points.sort(key=lambda point: point["offered"])
    document = rounded(
        {"dir": str(out), "held": found.held, "failed": found.failed, "invalid": invalid, "objectives": options.slo,
         "points": points}
    )  # fmt: skip
    write_text(out / "report.html", _page(document, points))
    write_json(out / "capacity.json", document)
    print(aligned(_cells(points)))
    print(_sentence(found, invalid))
    return Result(document, EXIT_STATUS["invalid" if invalid else "passed" if found.held else "missed"])


def _sentence(found: Found, invalid: str) -> str:
    if found.held is None and found.failed is None:
        return f"no capacity: {invalid}"
    if invalid and found.failed is None:
        return f"capacity: at least {found.held:.4g} requests/s ({invalid})"
    if invalid and found.held is None:
        return f"not to be believed at {found.failed:.4g} requests/s, the lowest tried: {invalid}"
    if invalid:
        return f"capacity: at least {found.held:.4g} requests/s (at {found.failed:.4g} not to be believed: {invalid})"
    if found.held is None:
        return f"the objectives are missed even at {found.failed:.4g} requests/s"
    beyond = "the highest rate tried" if found.failed is None else f"missed at {found.failed:.4g}"
    return f"capacity: {found.held:.4g} requests/s ({beyond})"


def _cells(points: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("requests/s", "achieved", "TTFT p90 (ms)", "TPOT p50 (ms)", "tokens/s", "good", "verdict")
    ]
    for point in points:
        scaled = ((point["achieved"], 1), (point["ttft_p90_s"], 1000), (point["tpot_p50_s"], 1000),
                  (point["tokens_per_s"], 1), (point["goodput_share"], 1))  # fmt: skip
        values = ("-" if value is None else f"{factor * value:.4g}" for value, factor in scaled)
        lines.append((f"{point['offered']:.4g}", *values, point["verdict"]))
    return lines


def _page(document: dict[str, Any], points: list[dict[str, Any]]) -> str:
    found = Found(document["held"], document["failed"])
    sentence = f"{_sentence(found, document['invalid'])}, holding {'; '.join(document['objectives'])}"
    return page(
        "Capacity",
        [
            f"<h1>Capacity</h1><p>{html.escape(sentence)}</p>",
            section("Every run", _cells(points)),
            section("Against the offered rate", curves(points)),
        ],
    )
