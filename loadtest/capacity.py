"""`python -m loadtest find-capacity`: the highest rate at which a server still holds its objectives.

Rates are doubled from the lowest until one fails, then the gap is halved (by ratio) until it is small. Each rate is
run several times with different seeds, and holds when every run passes: one lucky run must not raise the answer.
"""

import dataclasses
import html
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from loadtest.charts import curves
from loadtest.figures import curve_point, rounded
from loadtest.play import play
from loadtest.prepare import results_directory
from loadtest.report import page, section
from loadtest.scenario import Scenario
from loadtest.table import aligned
from loadtest.verdict import EXIT_STATUS
from train.command import Result, option
from train.errors import UserError
from train.files import write_json, write_text


@dataclass(frozen=True)
class Capacity(Scenario):
    """A scenario whose rate is searched for."""

    lowest: float = option(0.5, "rate to begin with, requests/s")
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
        if self.web or self.join:
            raise UserError("find-capacity plays many runs on its own; it takes neither --web nor --join")
        if not 0 < self.lowest <= self.highest or self.repeats < 1 or self.precision <= 0:
            raise UserError("find-capacity needs 0 < lowest <= highest, repeats of at least 1 and a precision above 0")


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


class _Invalid(Exception):
    """A probe that cannot be believed: the search cannot go on from it."""


def find_capacity(options: Capacity) -> Result:
    """Search, print every rate, and write capacity.json and report.html.

    Exit 3 when no rate held, 4 when the client gave out first.
    """
    out = results_directory(options)
    if out.exists():
        raise UserError(f"{str(out)!r} exists; choose another --out")
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Scenario)}
    points: list[dict[str, Any]] = []
    outcomes: dict[float, bool] = {}

    def holds(rate: float) -> bool:
        passed = True
        for repeat in range(options.repeats):
            name = f"rate-{rate:.4g}-{repeat + 1}"
            print(f"{rate:.4g} requests/s, run {repeat + 1} of {options.repeats}", file=sys.stderr)
            own = {"rate": f"{rate!r}", "seed": options.seed + repeat, "out": str(out / name)}
            summary = play(Scenario(**{**fields, **own}))
            points.append({**curve_point(rate, summary["all"]), "verdict": summary["verdict"], "dir": summary["dir"]})
            if summary["verdict"] == "invalid":
                raise _Invalid(summary["invalid"][0])
            passed = passed and summary["verdict"] == "passed"
            if not passed:
                break
        outcomes[rate] = passed
        return passed

    invalid = ""
    try:
        found = search(holds, options.lowest, options.highest, options.precision)
    except _Invalid as error:
        invalid = str(error)
        found = Found(
            max((rate for rate, held in outcomes.items() if held), default=None),
            min((rate for rate, held in outcomes.items() if not held), default=None),
        )
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
    if invalid:
        return f"not to be believed beyond {found.held or 0:.4g} requests/s: {invalid}"
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
