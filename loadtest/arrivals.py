"""When requests are due: pure functions from a rate over time and a seed to a list of seconds.

An arrival process is made in two steps. A unit process sets how irregular arrivals are (mean gap 1, no unit). The rate
over time then maps it to seconds through the inverse of the cumulative rate. So Poisson, constant and bursty arrivals
all follow a ramp, a step or a spike exactly, and any of them can be divided among several processes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from counsel.errors import UserError
from loadtest.distributions import parse

RATES = {
    "": "R requests/s",
    "ramp": "ramp(FROM, TO)",
    "steps": "steps(R1, R2, ...)",
    "spike": "spike(BASE, PEAK[, FROM_S, TO_S])",
}
PROCESSES = ("poisson", "constant", "gamma", "trace", "closed")


class Knot(NamedTuple):
    """The rate (requests/s) at a time. Between knots it is linear; two knots at one time are a jump."""

    t_s: float
    rate: float


def rate_knots(text: str, duration_s: float) -> list[Knot]:
    """The rate over [0, duration_s] that `text` describes (see RATES)."""
    call = parse("rate", text, RATES)
    numbers = call.numbers
    wrong = UserError(f"rate is {text!r}; the form is {RATES[call.name]}, with numbers above 0")
    if call.named or not numbers or any(number < 0 for number in numbers) or not any(numbers):
        raise wrong
    if call.name == "":
        return [Knot(0.0, numbers[0]), Knot(duration_s, numbers[0])]
    if call.name == "ramp":
        if len(numbers) != 2:
            raise wrong
        return [Knot(0.0, numbers[0]), Knot(duration_s, numbers[1])]
    if call.name == "steps":
        width_s = duration_s / len(numbers)
        return [Knot(edge * width_s, rate) for i, rate in enumerate(numbers) for edge in (i, i + 1)]
    if len(numbers) == 2:
        numbers = (*numbers, 0.4 * duration_s, 0.6 * duration_s)
    if len(numbers) != 4 or not 0 <= numbers[2] < numbers[3] <= duration_s:
        raise UserError(f"rate is {text!r}; spike needs 0 <= FROM_S < TO_S <= duration_s, {duration_s:g}")
    base, peak, from_s, to_s = numbers
    return [
        Knot(0.0, base), Knot(from_s, base), Knot(from_s, peak),
        Knot(to_s, peak), Knot(to_s, base), Knot(duration_s, base),
    ]  # fmt: skip


def expected_count(knots: Sequence[Knot]) -> float:
    """The number of arrivals: the integral of the rate."""
    return sum((b.t_s - a.t_s) * (a.rate + b.rate) / 2 for a, b in itertools.pairwise(knots))


def due_times(process: str, knots: Sequence[Knot], burstiness: float, seed: int) -> list[float]:
    """Seconds, ascending, at which requests are due.

    `constant`: gaps of exactly 1/rate; the first arrival is half a gap in. `poisson`: exponential gaps. `gamma`: gaps
    of shape `burstiness` (below 1 bursty, 1 Poisson, above 1 smoother), as in `vllm bench serve`.
    """
    total = expected_count(knots)
    if process == "constant":
        return _to_seconds(np.arange(0.5, total), knots)
    shape = 1.0 if process == "poisson" else burstiness
    random = np.random.default_rng([seed, 1])
    # Enough gaps that the chance of too few is below 1e-9: the standard deviation of the sum is sqrt(n / shape).
    n = math.ceil(total + 7 * math.sqrt((total + 1) / shape) + 20 / shape + 20)
    gaps = random.gamma(shape, 1 / shape, n)
    if process == "gamma":
        # The run starts at a random moment, not with an arrival: more likely in a long gap than in a short one, and
        # anywhere within it. Starting with an arrival, bursty gaps would give (1 / shape - 1) / 2 requests too many.
        gaps[0] = random.random() * random.gamma(shape + 1, 1 / shape)
    units = np.cumsum(gaps)
    return _to_seconds(units[units < total], knots)


def trace_times(stamps_s: Sequence[float], duration_s: float, speed: float) -> list[float]:
    """Due times from recorded timestamps: sorted, shifted to start at 0, `speed` times as fast, cut at `duration_s`."""
    ordered = sorted(stamps_s)
    shifted = ((stamp - ordered[0]) / speed for stamp in ordered)
    return [due for due in shifted if due < duration_s]


def _to_seconds(units: "np.ndarray", knots: Sequence[Knot]) -> list[float]:
    """Map cumulative arrivals (ascending) to seconds: the inverse of the integral of the rate."""
    due: list[float] = []
    reached, cursor = 0.0, 0
    for a, b in itertools.pairwise(knots):
        width_s = b.t_s - a.t_s
        area = width_s * (a.rate + b.rate) / 2
        if area <= 0:
            continue
        slope = (b.rate - a.rate) / width_s
        end = int(np.searchsorted(units, reached + area, side="left"))
        y = units[cursor:end] - reached
        # Solves a.rate * x + slope * x^2 / 2 = y for x, in the form that is stable for a slope near 0.
        root = np.sqrt(np.maximum(a.rate**2 + 2 * slope * y, 0.0))
        due.extend((a.t_s + np.minimum(2 * y / (a.rate + root), width_s)).tolist())
        reached, cursor = reached + area, end
    return due
