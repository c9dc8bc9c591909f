"""Doubt about a figure of many requests that depend on each other: a bootstrap over blocks of time.

Requests close in time share a queue, so an interval over single requests would be far too narrow. A run is cut into
blocks, and whole blocks are drawn again. A block must be longer than requests depend on each other, and near saturation
that is long. So its length comes from the run: twice the integrated autocorrelation time of the figure over 64 short
blocks (Sokal 1997; summed as in Geyer 1992, the initial positive sequence). Where fewer than `FEWEST` such blocks fit
into the run, it is too short to tell.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST = 8
_MOST = 64
_AT_ONCE = 100


class Values(NamedTuple):
    """What each request of a run adds to a figure, and when, in seconds after the beginning of `length_s`."""

    at_s: "np.ndarray"
    value: "np.ndarray"
    length_s: float


class Figure(NamedTuple):
    """How values become one number: a percentile of them, their mean, or (both None) their sum per second."""

    percent: float | None = None
    mean: bool = False


def number_of_blocks(series: Sequence[Values], figure: Figure, *, paired: bool) -> int:
    """The most blocks whose values do not depend on each other, at least 0; `paired`: of the difference of two runs."""
    most = max(min(_MOST, *(len(each.value) // 2 for each in series)), 1)
    over_time = [_by_block(each, figure, most) for each in series]
    if paired:
        over_time = [over_time[1] - over_time[0]]
    return int(
        min(_MOST, most, *(most / (2 * dependence(each)) if dependence(each) > 1 else most for each in over_time))
    )


def dependence(series: "np.ndarray") -> float:
    """The integrated autocorrelation time of a series, in its own steps: 1 where the values are independent."""
    n = len(series)
    around = series - series.mean()
    total = float((around * around).sum())
    if total <= 1e-18 * max(float((series * series).sum()), 1e-300):
        return 1.0
    rho = [float((around[:-lag] * around[lag:]).sum()) / total for lag in range(1, n)]
    found = 1.0
    for first, second in zip(rho[::2], rho[1::2], strict=False):
        if first + second <= 0:
            break
        found += 2 * (first + second)
    return max(found, 1.0)


def point(values: Values, figure: Figure) -> float | None:
    """The figure of the run itself; None of nothing."""
    if figure.percent is not None:
        return float(np.percentile(values.value, figure.percent)) if values.value.size else None
    if figure.mean:
        return float(values.value.mean()) if values.value.size else None
    return float(values.value.sum()) / values.length_s if values.length_s > 0 else None


def resampled(values: Values, figure: Figure, picks: "np.ndarray") -> "np.ndarray":
    """The figure in each resample; `picks` (resamples, blocks) are the blocks drawn. NaN where they hold nothing."""
    n = picks.shape[1]
    block = _block_of(values, n)
    times = np.zeros(picks.shape)
    np.add.at(times, (np.arange(len(picks))[:, None], picks), 1)
    if figure.percent is None:
        sums = times @ np.bincount(block, weights=values.value, minlength=n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums / (times @ np.bincount(block, minlength=n)) if figure.mean else sums / values.length_s
    order = np.argsort(values.value, kind="stable")
    ordered, block = values.value[order], block[order]
    parts = [times[begin : begin + _AT_ONCE] for begin in range(0, len(times), _AT_ONCE)]
    return np.concatenate([_percentiles(ordered, part[:, block], figure.percent) for part in parts])


def _percentiles(ordered: "np.ndarray", times: "np.ndarray", percent: float) -> "np.ndarray":
    """The percentile of `ordered` with each value taken so many `times` (resamples, values), as numpy interpolates."""
    upto = times.cumsum(axis=1)
    n = upto[:, -1]
    place = np.maximum(n - 1, 0) * percent / 100
    low, high = np.floor(place), np.ceil(place)
    last = len(ordered) - 1
    at_low = ordered[np.minimum((upto <= low[:, None]).sum(axis=1), last)]
    at_high = ordered[np.minimum((upto <= high[:, None]).sum(axis=1), last)]
    return np.where(n > 0, at_low + (at_high - at_low) * (place - low), np.nan)


def _by_block(values: Values, figure: Figure, n: int) -> "np.ndarray":
    """The mean of the values in each of `n` blocks, the run's where it has none; their sum for a figure per second."""
    block = _block_of(values, n)
    sums, counts = (np.bincount(block, weights=w, minlength=n) for w in (values.value, None))
    if figure.percent is None and not figure.mean:
        return sums
    return np.where(counts > 0, sums / np.maximum(counts, 1), values.value.mean() if values.value.size else 0.0)


def _block_of(values: Values, n: int) -> "np.ndarray":
    return np.clip((values.at_s * n / values.length_s).astype(int), 0, n - 1)
