"""When a canary's evidence is enough: promote, roll back, or wait. Pure.

Each measure is a harm: how much worse the new version is. Its interval is looked at a planned number of times, when
both sides have reached planned numbers of units, and at nothing in between. Every bound has the level alpha divided by
looks and measures (Bonferroni), so over the whole canary

- an equal version is rolled back with probability alpha at most: a rollback needs an interval above 0;
- a version that is worse by more than the margin of a measure is promoted with probability alpha at most: a promotion
  needs every interval below its margin.

Shares: Newcombe's score interval for a difference (Statistics in Medicine 17, 1998, method 10). Latencies: Welch's t on
logarithms. Votes between the two: Clopper and Pearson's exact interval.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serve.canary.evidence import CURRENT, NEW, Sample, Votes

PROMOTE, ROLL_BACK, WAIT = "promote", "roll back", "wait"
FAILED, TTFT, TIME_PER_TOKEN, VOTES_LOST, BAD_VOTES = (
    "failed", "ttft_s", "time_per_token_s", "votes_lost", "bad_votes",
)  # fmt: skip


class Harm(NamedTuple):
    """How much worse the new version is, with a one-sided bound on each side.

    value is None where nothing was observed, and the bounds are None where it has no spread.

    failed, bad_votes: a difference of shares. ttft_s, time_per_token_s: a ratio minus 1. votes_lost: the share of
    choices that went to the current version, minus one half.
    """

    value: float | None
    low: float | None
    high: float | None


_UNSEEN = Harm(None, None, None)


class Look(NamedTuple):
    """One look: how many units of each side it is about, the harms found, and what they decide."""

    n_units: int
    harms: dict[str, Harm]
    decision: str


def judge_look(
    n_units: int, found: Sample, votes: Votes, margins: Mapping[str, float], alpha: float, looks: int
) -> Look:
    """Judge what was found by the margins. A measure that is not in `margins` is not judged."""
    level = alpha / (looks * len(margins))
    harms = {name: _harm(name, found, votes, level) for name in margins}
    # What is allowed outweighs what is shown: a harm within the margin promotes.
    if all(harm.high is not None and harm.high <= margins[name] for name, harm in harms.items()):
        return Look(n_units, harms, PROMOTE)
    return Look(
        n_units, harms, ROLL_BACK if any(harm.low is not None and harm.low > 0 for harm in harms.values()) else WAIT
    )


def _harm(name: str, found: Sample, votes: Votes, level: float) -> Harm:
    if name == FAILED:
        failures = {side: sum(unit.failed for unit in units.values()) for side, units in found.items()}
        return _more(failures[NEW], len(found[NEW]), failures[CURRENT], len(found[CURRENT]), level)
    if name in (TTFT, TIME_PER_TOKEN):
        logs = {side: [unit.mean_log(name) for unit in units.values()] for side, units in found.items()}
        new, current = ([log for log in logs[side] if log is not None] for side in (NEW, CURRENT))
        return _longer(new, current, level)
    if name == BAD_VOTES:
        n_votes = {side: votes.bad[side, True] + votes.bad[side, False] for side in found}
        return _more(votes.bad[NEW, True], n_votes[NEW], votes.bad[CURRENT, True], n_votes[CURRENT], level)
    return _lost(votes.won, votes.lost, level)


def _more(k_new: int, n_new: int, k_current: int, n_current: int, level: float) -> Harm:
    """The rise of a share."""
    from scipy.stats import binomtest

    if not n_new or not n_current:
        return _UNSEEN
    new, current = k_new / n_new, k_current / n_current
    # One-sided levels: each bound of a two-sided interval of twice the level.
    on_new, on_current = (
        binomtest(k, n).proportion_ci(1 - 2 * level, "wilson") for k, n in ((k_new, n_new), (k_current, n_current))
    )
    value = new - current
    low = value - math.hypot(new - on_new.low, on_current.high - current)
    high = value + math.hypot(on_new.high - new, current - on_current.low)
    return Harm(value, low, high)


def _longer(new: Sequence[float], current: Sequence[float], level: float) -> Harm:
    """The relative rise of a latency, from the logarithms of each side's units."""
    from scipy.stats import t

    if min(len(new), len(current)) < 2:
        return _UNSEEN
    value = statistics.fmean(new) - statistics.fmean(current)
    of_new, of_current = (statistics.variance(side) / len(side) for side in (new, current))
    variance = of_new + of_current
    if not variance:
        # Values without spread do not say how sure they are.
        return Harm(math.expm1(value), None, None)
    freedom = variance**2 / (of_new**2 / (len(new) - 1) + of_current**2 / (len(current) - 1))
    width = t.isf(level, freedom) * math.sqrt(variance)
    return Harm(*(math.expm1(log) for log in (value, value - width, value + width)))


def _lost(won: int, lost: int, level: float) -> Harm:
    """The share of choices that went against the new version, minus one half."""
    from scipy.stats import binomtest

    if not won + lost:
        return _UNSEEN
    interval = binomtest(lost, won + lost).proportion_ci(1 - 2 * level, "exact")
    return Harm(lost / (won + lost) - 0.5, interval.low - 0.5, interval.high - 0.5)
