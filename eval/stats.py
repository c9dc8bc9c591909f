"""Statistics over questions: confidence intervals, paired differences, p values, minimum detectable effects.

The unit is the question, because answers to one question are correlated: all functions take one entry per question. A
metric's value is sum(numerators) / sum(denominators): the mean if all denominators are 1, a corpus-level rate (bits per
byte) if they are byte counts.

Intervals and effect sizes are of that ratio, from its jackknife (the value without each question in turn). Below 50
questions the interval is Student's t with the jackknife's standard error, because a bootstrap of few questions is too
narrow. From 50 questions it is the BCa bootstrap (Efron 1987) with expanded percentiles (Hesterberg 2015), which widen
it as t widens a normal interval. Where bytes weigh questions, n is Kish's effective sample size. p values are from the
paired permutation test: swap the two arms within questions, exactly for up to 12 questions. Miller (2411.00640) argues
for pairing and clustering.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.errors import UserError

Floats = NDArray[np.float64]

RESAMPLES = 10_000
BOOTSTRAP_FROM = 50
# The least n at which p can be below 0.05: with 5 questions that all favor one arm, p is 2 / 32 = 0.0625.
MIN_TESTABLE = 6
# The minimum detectable effect (MDE) of the permutation test at 5 % and 80 % power, in standard errors. With so few
# swaps p is coarser than Student's: 6 questions must all have the same sign, hence ndtri(0.8 ** (1 / 6)) * sqrt(6).
_COARSE_MDE = {6: 4.391, 7: 3.516, 8: 3.361, 9: 3.261}
_EXACT_UP_TO = 12
# Floating point: sums of the same numbers in another order differ by less than this share of the numbers.
_ROUNDING = 1e-10


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

    p: two-sided, from the paired permutation test.
    d_z: value over the standard deviation of the questions' contributions to it; if all weigh the same, of the
    questions' differences.
    mde: minimum detectable effect: the smallest true difference that this n detects at the 5 % level with 80 % power,
    in the unit of value; None below `MIN_TESTABLE`.
    wins, ties, losses: questions by the sign of the difference.

    p, d_z and mde are None if n < 2 or the arms are equal. If all questions differ by the same amount, p is the only
    one of the three, and there is no interval.
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
    """The 95 % interval of a metric's value; if nothing varies, both bounds are the value."""
    n = len(ratio.num)
    if n < 2:
        return Interval(ratio.value, None, None, n)
    jackknife, rounding = _leave_one_out(ratio), _ROUNDING * _size(ratio)
    if _spread(jackknife) <= rounding:
        return Interval(ratio.value, ratio.value, ratio.value, n)
    if _effective(ratio) < BOOTSTRAP_FROM:
        low, high = _student(ratio.value, jackknife, _effective(ratio))
    else:
        counts = resample_counts(n, seed)
        resampled = (counts @ ratio.num) / (counts @ ratio.den)
        low, high = _bca(resampled, ratio.value, jackknife, _effective(ratio), rounding)
    return Interval(ratio.value, low, high, n)


def difference(a: Ratio, b: Ratio, seed: int) -> Difference:
    """`a` minus `b`; entry i of both is the same question."""
    n, value = len(a.num), a.value - b.value
    rounding = _ROUNDING * max(_size(a), _size(b))
    each = a.num / a.den - b.num / b.den
    signs = np.sign(np.where(np.abs(each) <= rounding, 0.0, each))
    tally = int((signs > 0).sum()), int((signs == 0).sum()), int((signs < 0).sum())
    if n < 2:
        return Difference(value, None, None, n, None, None, None, *tally)
    jackknife = _leave_one_out(a) - _leave_one_out(b)
    spread = _spread(jackknife)
    if spread <= rounding:
        p = swap_test(a, b, seed) if abs(value) > rounding else None
        return Difference(value, None, None, n, p, None, None, *tally)
    effective = min(_effective(a), _effective(b))
    if effective < BOOTSTRAP_FROM:
        low, high = _student(value, jackknife, effective)
    else:
        counts = resample_counts(n, seed)
        resampled = (counts @ a.num) / (counts @ a.den) - (counts @ b.num) / (counts @ b.den)
        low, high = _bca(resampled, value, jackknife, effective, rounding)
    mde = None if n < MIN_TESTABLE else _mde_factor(n) * spread / n**0.5
    return Difference(value, low, high, n, swap_test(a, b, seed), value / spread, mde, *tally)


def swap_test(a: Ratio, b: Ratio, seed: int) -> float:
    """The two-sided p of the paired permutation test: the share of swaps with a difference at least as large.

    Exact for n <= 12; else from 10,000 random swaps and the observed arrangement, so that p is never 0.
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
    rounding = _ROUNDING * max(_size(a), _size(b))
    return float(np.mean(np.abs(first - second) >= abs(a.value - b.value) - rounding))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values that bound the family-wise error rate (Holm 1979).

    A test of equal arms has no p. It still counts, because a family is fixed before its data are seen.
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
    """A `Ratio` from sequences; denominators default to 1. Raises UserError for an entry that is not finite."""
    num = np.asarray(numerators, dtype=np.float64)
    den = np.ones_like(num) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if not (np.isfinite(num).all() and np.isfinite(den).all()):
        raise UserError("a score is nan or infinity; it must be finite: remove that row and report again")
    return Ratio(num, den)


def resample_counts(n: int, seed: int) -> Floats:
    """How often each resample draws each question: (RESAMPLES, n). A seed draws the same questions for every metric."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def _leave_one_out(r: Ratio) -> Floats:
    left: Floats = (r.num.sum() - r.num) / (r.den.sum() - r.den)
    return left


def _spread(jackknife: Floats) -> float:
    """The standard deviation of the jackknife's pseudo-values; for a mean, of the questions' values."""
    return float((len(jackknife) - 1) * jackknife.std(ddof=1))


def _effective(r: Ratio) -> float:
    """Kish's effective sample size: n if all questions weigh the same."""
    return round(float(r.den.sum() ** 2 / (r.den**2).sum()), 6)


def _size(r: Ratio) -> float:
    """The largest value of a question, to tell rounding from a difference."""
    return float(np.abs(r.num / r.den).max())


def _quantile(effective: float) -> float:
    """Student's 97.5 % quantile, for one side of a 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(max(1.0, effective - 1), 0.975))


def _student(value: float, jackknife: Floats, effective: float) -> tuple[float, float]:
    """Student's 95 % bounds with the jackknife's standard error."""
    half = _quantile(effective) * _spread(jackknife) / len(jackknife) ** 0.5
    return value - half, value + half


def _bca(resampled: Floats, value: float, jackknife: Floats, effective: float, rounding: float) -> tuple[float, float]:
    """BCa (bias-corrected and accelerated) 95 % bounds with expanded percentiles."""
    from scipy.special import ndtr, ndtri

    # Half of the ties count as below; otherwise discrete metrics would seem biased.
    below = np.mean(resampled < value - rounding) / 2 + np.mean(resampled <= value + rounding) / 2
    bias = ndtri(np.clip(below, 1 / len(resampled), 1 - 1 / len(resampled)))
    centered = jackknife.mean() - jackknife
    acceleration = (centered**3).sum() / (6 * (centered**2).sum() ** 1.5)
    # Resamples vary by (n - 1) / n too little, and a normal quantile ignores that the variance is estimated.
    expanded = (effective / (effective - 1)) ** 0.5 * _quantile(effective)
    shifted = bias + np.array([-expanded, expanded])
    low, high = np.quantile(resampled, ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


@lru_cache
def _mde_factor(n: int) -> float:
    """The minimum detectable effect of n paired questions in standard errors: 5 % level, 80 % power."""
    if n in _COARSE_MDE:
        return _COARSE_MDE[n]
    from scipy.optimize import brentq
    from scipy.stats import nct

    reach = _quantile(n)
    return float(brentq(lambda shift: nct.sf(reach, n - 1, shift) + nct.cdf(-reach, n - 1, shift) - 0.8, 1, 8))
