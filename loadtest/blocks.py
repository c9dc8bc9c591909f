"""Uncertainty of a statistic over requests that depend on each other: a bootstrap over blocks of time.

Requests that are close in time share a queue, so an interval over single requests would be far too narrow. Instead a
run is cut into blocks, and whole blocks are resampled. A block must be longer than requests depend on each other, which
is long near saturation. So its length comes from the run: twice the integrated autocorrelation time of the statistic
over 64 short blocks (Sokal 1997; summed as in Geyer 1992, the initial positive sequence). If fewer than `MIN_BLOCKS`
such blocks fit into the run, it is too short to tell.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_BLOCKS = 8
_MAX_BLOCKS = 64
# Resamples per call, which bounds the memory.
_BATCH = 100


class Values(NamedTuple):
    """The value of each request for a statistic, and when, in seconds after the start of a time of `length_s`."""

    at_s: "np.ndarray"
    value: "np.ndarray"
    length_s: float


class Statistic(NamedTuple):
    """How values become one number: a percentile, the mean, or (with neither) the sum per second."""

    percent: float | None = None
    mean: bool = False


def number_of_blocks(series: Sequence[Values], statistic: Statistic, *, paired: bool) -> int:
    """The largest number of blocks whose values are independent; `paired`: the difference of two runs is."""
    limit = max(min(_MAX_BLOCKS, *(len(each.value) // 2 for each in series)), 1)
    over_time = [_by_block(each, statistic, limit) for each in series]
    if paired:
        over_time = [over_time[1] - over_time[0]]
    times = [autocorrelation_time(each) for each in over_time]
    return int(min(limit / (2 * time) if time > 1 else limit for time in times))


def autocorrelation_time(series: "np.ndarray") -> float:
    """The integrated autocorrelation time of a series, in steps; 1 if its values are independent."""
    n = len(series)
    around = series - series.mean()
    total = float((around * around).sum())
    if total <= 1e-18 * max(float((series * series).sum()), 1e-300):
        return 1.0
    rho = [float((around[:-lag] * around[lag:]).sum()) / total for lag in range(1, n)]
    time = 1.0
    for first, second in zip(rho[::2], rho[1::2], strict=False):
        if first + second <= 0:
            break
        time += 2 * (first + second)
    return max(time, 1.0)


def point(values: Values, statistic: Statistic) -> float | None:
    """The statistic of the run itself; None without values."""
    if statistic.percent is not None:
        return float(np.percentile(values.value, statistic.percent)) if values.value.size else None
    if statistic.mean:
        return float(values.value.mean()) if values.value.size else None
    return float(values.value.sum()) / values.length_s if values.length_s > 0 else None


def resampled(values: Values, statistic: Statistic, picks: "np.ndarray") -> "np.ndarray":
    """The statistic of each resample; `picks` (resamples, blocks) are the drawn blocks. NaN if they hold no values."""
    n = picks.shape[1]
    block = _block_of(values, n)
    times = np.zeros(picks.shape)
    np.add.at(times, (np.arange(len(picks))[:, None], picks), 1)
    if statistic.percent is None:
        sums = times @ np.bincount(block, weights=values.value, minlength=n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums / (times @ np.bincount(block, minlength=n)) if statistic.mean else sums / values.length_s
    order = np.argsort(values.value, kind="stable")
    ordered, block = values.value[order], block[order]
    parts = [times[begin : begin + _BATCH] for begin in range(0, len(times), _BATCH)]
    return np.concatenate([_percentiles(ordered, part[:, block], statistic.percent) for part in parts])


def _percentiles(ordered: "np.ndarray", times: "np.ndarray", percent: float) -> "np.ndarray":
    """The percentile of `ordered` with each value repeated `times` (resamples, values), interpolated as in numpy."""
    upto = times.cumsum(axis=1)
    n = upto[:, -1]
    place = np.maximum(n - 1, 0) * percent / 100
    low, high = np.floor(place), np.ceil(place)
    last = len(ordered) - 1
    at_low = ordered[np.minimum((upto <= low[:, None]).sum(axis=1), last)]
    at_high = ordered[np.minimum((upto <= high[:, None]).sum(axis=1), last)]
    return np.where(n > 0, at_low + (at_high - at_low) * (place - low), np.nan)


def _by_block(values: Values, statistic: Statistic, n: int) -> "np.ndarray":
    """The mean of the values in each of `n` blocks (the run's mean if it has none); the sum for a rate."""
    block = _block_of(values, n)
    sums, counts = (np.bincount(block, weights=w, minlength=n) for w in (values.value, None))
    if statistic.percent is None and not statistic.mean:
        return sums
    return np.where(counts > 0, sums / np.maximum(counts, 1), values.value.mean() if values.value.size else 0.0)


def _block_of(values: Values, n: int) -> "np.ndarray":
    return np.clip((values.at_s * n / values.length_s).astype(int), 0, n - 1)
