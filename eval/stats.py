"""Statistics over questions: intervals, paired differences, p values, and what the sample can show at all.

The unit is the question, because answers to one question are alike: every function takes one entry per question. A
metric's value over questions is sum(numerator) / sum(denominator), which is the plain mean when each denominator is 1
and a corpus-level rate (bits per byte) when it is the number of bytes.

Intervals are BCa bootstrap intervals (Efron 1987) that resample questions. p values come from swapping the two arms
within a question, all ways when there are at most 2**12 of them. Miller (2411.00640) argues for pairing and clustering.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
# Two-sided 5 % test with 80 % power: z(0.975) + z(0.8).
_MDE_FACTOR = 2.8016
_EXACT_UP_TO = 12


class Ratio(NamedTuple):
    """One metric over n questions: numerators and denominators, each of shape (n,)."""

    num: Floats
    den: Floats

    @property
    def value(self) -> float:
        return float(self.num.sum() / self.den.sum())


class Interval(NamedTuple):
    """A value with its 95 % interval; low and high are None when n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int


class Difference(NamedTuple):
    """How one arm differs from another on the same questions.

    p: two-sided, from the paired permutation test. d_z: mean difference over its standard deviation. mde: the smallest
    true difference that this n would show with 80 % power at the 5 % level (same unit as value). wins, ties, losses
    count questions by the sign of the difference. All of them are None when n < 2 or the arms are equal; where every
    question differs by the same, only p is there.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    p: float | None
    d_z: float | None
    mde: float | None
    wins: int
    ties: int
    losses: int


def interval(ratio: Ratio, seed: int) -> Interval:
    """The 95 % interval of a metric's value."""
    n = len(ratio.num)
    if n < 2:
        return Interval(ratio.value, None, None, n)
    counts = resample_counts(n, seed)
    low, high = _bca((counts @ ratio.num) / (counts @ ratio.den), ratio.value, _leave_one_out(ratio))
    return Interval(ratio.value, low, high, n)


def difference(a: Ratio, b: Ratio, seed: int) -> Difference:
    """`a` minus `b`, entry i of both being the same question."""
    n, value = len(a.num), a.value - b.value
    each = a.num / a.den - b.num / b.den
    signs = np.sign(np.where(np.abs(each) < 1e-12, 0.0, each))
    tally = int((signs > 0).sum()), int((signs == 0).sum()), int((signs < 0).sum())
    spread = float(each.std(ddof=1)) if n > 1 else 0.0
    if spread < 1e-12:
        p = swap_test(a, b, seed) if n > 1 and abs(value) > 1e-12 else None
        return Difference(value, None, None, n, p, None, None, *tally)
    counts = resample_counts(n, seed)
    resampled = (counts @ a.num) / (counts @ a.den) - (counts @ b.num) / (counts @ b.den)
    low, high = _bca(resampled, value, _leave_one_out(a) - _leave_one_out(b))
    d_z, mde = float(each.mean()) / spread, _MDE_FACTOR * spread / n**0.5
    return Difference(value, low, high, n, swap_test(a, b, seed), d_z, mde, *tally)


def swap_test(a: Ratio, b: Ratio, seed: int) -> float:
    """The two-sided p of the paired permutation test: how often swapping arms within questions differs as much.

    Exact for n <= 12. Beyond that, 10,000 random swaps plus the observed one, so that p is never 0.
    """
    n = len(a.num)
    if n <= _EXACT_UP_TO:
        swaps = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
    else:
        random = np.random.default_rng(seed).integers(0, 2, size=(RESAMPLES, n)).astype(np.float64)
        swaps = np.vstack([np.zeros(n), random])
    gain = [b.num - a.num, b.den - a.den]
    first = (a.num.sum() + swaps @ gain[0]) / (a.den.sum() + swaps @ gain[1])
    second = (b.num.sum() - swaps @ gain[0]) / (b.den.sum() - swaps @ gain[1])
    return float(np.mean(np.abs(first - second) >= abs(a.value - b.value) - 1e-12))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted so that the chance of any false claim in the family stays below 5 % (Holm 1979).

    A test without p, of equal arms, stays without, and still counts: a family is declared before its data are seen.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    tested = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    for rank, (p, at) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        adjusted[at] = highest
    return adjusted


def upper_rate(events: int, n: int) -> float:
    """The 95 % one-sided upper bound on a rate (Clopper-Pearson); 0 in 30 gives 0.095, the rule of three."""
    from scipy.stats import beta

    return 1.0 if events >= n else float(beta.ppf(0.95, events + 1, n - events))


def ratio(numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Ratio:
    """A `Ratio` from plain sequences; denominators are 1 when left out."""
    num = np.asarray(numerators, dtype=np.float64)
    return Ratio(num, np.ones_like(num) if denominators is None else np.asarray(denominators, dtype=np.float64))


def resample_counts(n: int, seed: int) -> Floats:
    """How often each question is drawn: (RESAMPLES, n). The same seed draws the same questions for every metric."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def _leave_one_out(r: Ratio) -> Floats:
    return (r.num.sum() - r.num) / (r.den.sum() - r.den)


def _bca(resampled: Floats, value: float, jackknife: Floats) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % bounds; where nothing varies, the value twice."""
    from scipy.special import ndtr, ndtri

    # Half of the ties count as below: discrete metrics would be called biased otherwise.
    below = np.mean(resampled < value) + np.mean(resampled == value) / 2
    if below in (0.0, 1.0) or np.ptp(resampled) == 0:
        low, high = np.quantile(resampled, [0.025, 0.975])
        return float(low), float(high)
    bias = ndtri(below)
    centred = jackknife.mean() - jackknife
    cubed, squared = (centred**3).sum(), (centred**2).sum()
    acceleration = cubed / (6 * squared**1.5) if squared > 0 else 0.0
    shifted = bias + ndtri(np.array([0.025, 0.975]))
    low, high = np.quantile(resampled, ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)
