"""From a judge's replies to findings: win rate, consistency, biases, criteria met. Pure, seeded, repeatable.

judge.json
| key | meaning |
|---|---|
| `judge`, `url` | who was asked to judge, and where |
| `model`, `server_version` | lists: what the server calls itself in its replies; one of each, unless it changed |
| `prompts_sha256`, `max_tokens`, `seed`, `provenance` | how |
| `arms` | the two arms: the second is compared with the first |
| `counts` | `asked` (judgements; equal requests share one), `failed` (no reply), `unreadable` (a reply that is not
  the JSON asked for, never scored), `cut` (of these, ended by length), `not_judged`: arm to {`error`, `empty`}, its
  answers that no judge was asked about |
| `labels_unmatched` | how many labelled answers and pairs are none of those judged here |
| `preference` | see `preference` below |
| `rubric` | `arms`: arm to criterion to {`value`, `low`, `high`, `n`}; `differences`: list of second minus first |
| `agreement` | criterion or `preference` to eval.judge.agreement.Agreement; empty without labels |
| `warnings` | what a reader must know before believing a number |

Every interval is a 95 % one over questions, from eval.stats. Where a rate is 0 or 1 at every question the bootstrap has
nothing to vary: the open side is then the exact one-sided bound, 0.095 for 0 of 30. Where it is another constant (all
ties) there is no interval.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from eval.judge.agreement import BAR, Target
from eval.judge.rubric import FIRST, RUBRIC, TIE
from eval.stats import Ratio, difference, holm, interval, ratio, swap_test, upper_rate
from eval.text_stats import words


class Pair(NamedTuple):
    """Two answers to one question, judged in both orders: `places` is FIRST, SECOND or TIE, one for each order.

    The first order shows the answer of the first arm first. None for a reply that is missing or cannot be read.
    """

    question_id: str
    sample: int
    texts: tuple[str, str]
    places: tuple[str | None, str | None]

    @property
    def winners(self) -> tuple[int | None, int | None] | None:
        """Who won in each order: 0 or 1 for the arms, None for a tie; None when an order has no reading."""
        one, other = self.places
        if one is None or other is None:
            return None
        return (
            None if one == TIE else 0 if one == FIRST else 1,
            None if other == TIE else 1 if other == FIRST else 0,
        )

    @property
    def lengths(self) -> tuple[int, int]:
        """In words."""
        return len(words(self.texts[0])), len(words(self.texts[1]))

    @property
    def winner(self) -> int | None:
        """The arm that won in both orders; else None, a tie."""
        assert self.winners is not None
        return self.winners[0] if self.winners[0] == self.winners[1] else None


def preference(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    """What the pairs with two readings say.

    judged, unreadable: how many pairs have both readings, and how many have not. equal: of those judged, pairs of two
    equal answers, a tie that nobody was asked about and that says nothing of the judge. win_rate: of the second arm,
    over questions; a tie, and a pair that the two orders judge differently, is half a win. p: win rate against one
    half, by swapping arms within questions. wins, ties, losses: pairs. consistency: share of pairs that get the same
    verdict in both orders. first_chosen: share of all verdicts that are no tie which go to the answer shown first;
    one half without position bias. longer_wins: share of the pairs won in both orders and unequal in words which the
    longer answer won. second_longer: share of all pairs in which the second arm's answer has more words; near 0 or 1,
    length and arm cannot be told apart.
    """
    read = [pair for pair in pairs if pair.winners is not None]
    told = [pair for pair in read if pair.texts[0] != pair.texts[1]]
    tally = Counter(pair.winner for pair in read)
    points = by_question((pair.question_id, {1: 1.0, None: 0.5, 0: 0.0}[pair.winner]) for pair in read)
    wins = _means(points)

    def share(values: Iterable[tuple[str, bool]]) -> dict[str, Any] | None:
        return rate(by_question(values), seed)

    return {
        "judged": len(read),
        "unreadable": len(pairs) - len(read),
        "equal": len(read) - len(told),
        "win_rate": rate(points, seed, pooled=False),
        "p": swap_test(wins, ratio(list(1 - wins.num)), seed) if len(points) > 1 and set(wins.num) != {0.5} else None,
        "wins": tally[1],
        "ties": tally[None],
        "losses": tally[0],
        "consistency": share((pair.question_id, _same(pair)) for pair in told),
        "first_chosen": share(
            (pair.question_id, place == FIRST) for pair in told for place in pair.places if place != TIE
        ),
        "longer_wins": share(
            (pair.question_id, pair.lengths[pair.winner] > pair.lengths[1 - pair.winner])
            for pair in read
            if pair.winner is not None and pair.lengths[0] != pair.lengths[1]
        ),
        "second_longer": share((pair.question_id, pair.lengths[1] > pair.lengths[0]) for pair in told),
    }


def rubric(arms: Sequence[str], met: Mapping[Target, bool], seed: int) -> dict[str, Any]:
    """Each arm's share of answers that meet each criterion, and the second arm's minus the first's, paired.

    `met` holds the answers that the judge gave a readable reply for. A question's samples are averaged first. p values
    are Holm-corrected over the criteria.
    """
    cells: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for (criterion, question, _, (arm,)), value in met.items():
        cells[arm, criterion].append((question, float(value)))
    table = {key: by_question(values) for key, values in cells.items()}
    found: dict[str, Any] = {
        arm: {name: rate(table.get((arm, name), {}), seed, pooled=False) for name in RUBRIC} for arm in arms
    }
    differences = []
    for name in RUBRIC:
        first, second = (table.get((arm, name), {}) for arm in arms)
        keys = sorted(key for key in second if key in first)
        if keys:
            ours, theirs = (_means({key: each[key] for key in keys}) for each in (second, first))
            result = difference(ours, theirs, seed)
            differences.append({"criterion": name, **result._asdict(), "p_holm": None})
    for row, p in zip(differences, holm([row["p"] for row in differences]), strict=True):
        row["p_holm"] = p
    return {"arms": found, "differences": differences}


def by_question(values: Iterable[tuple[str, float | bool]]) -> dict[str, list[float]]:
    """The values of each question, questions in order."""
    found: dict[str, list[float]] = defaultdict(list)
    for question, value in values:
        found[question].append(float(value))
    return dict(sorted(found.items()))


def rate(values: Mapping[str, Sequence[float]], seed: int, pooled: bool = True) -> dict[str, Any] | None:
    """A share with its interval; None without values. Pooled: every value counts alike; else every question does."""
    if not values:
        return None
    cells = ratio([sum(v) for v in values.values()], [len(v) for v in values.values()]) if pooled else _means(values)
    found = interval(cells, seed)
    if found.value in (0.0, 1.0):
        bound = upper_rate(0, found.n)
        low, high = (0.0, bound) if found.value == 0 else (1 - bound, 1.0)
        found = found._replace(low=low, high=high)
    elif found.low == found.high:
        # All ties: nothing varies, and no exact bound fits a rate between 0 and 1.
        found = found._replace(low=None, high=None)
    elif found.low is not None and found.high is not None:
        found = found._replace(low=max(0.0, found.low), high=min(1.0, found.high))
    return found._asdict()


def warnings(document: Mapping[str, Any], failure: str | None) -> list[str]:
    """What makes a number of this judge less than it seems; `failure` is one failed request's reason."""
    found, counts, preferred = [], document["counts"], document["preference"]
    judge, believed = document["judge"], [name for name, each in document["agreement"].items() if each["validated"]]
    if len(believed) < len(RUBRIC) + 1:
        found.append(
            f"this judge is not validated{' except on ' + ', '.join(believed) if believed else ''}: that takes {BAR}"
        )
    if any(arm == judge or arm.startswith(f"{judge}/") for arm in document["arms"]):
        found.append(f"{judge} judges its own answers")
    if counts["failed"]:
        found.append(f"{counts['failed']} of {counts['asked']} judgements failed and are not scored: {failure}")
    if counts["unreadable"]:
        found.append(
            f"{counts['unreadable']} of {counts['asked']} replies are not the JSON asked for and are not scored; "
            f"{counts['cut']} of them were cut by length"
        )
    if document["labels_unmatched"]:
        found.append(
            f"{document['labels_unmatched']} labels count for nothing: they are of answers that were not judged here "
            "(another arm, question_id or sample)"
        )
    for arm, each in counts["not_judged"].items():
        if each["error"] or each["empty"]:
            found.append(f"{arm}: {each['error']} answers failed, {each['empty']} are empty; no judge was asked")
    first = preferred["first_chosen"]
    if first and first["low"] is not None and (first["low"] > 0.5 or first["high"] < 0.5):
        found.append(
            f"position bias: {first['value']:.0%} of the verdicts that are no tie go to the answer shown first"
        )
    return found


def _same(pair: Pair) -> bool:
    assert pair.winners is not None
    return pair.winners[0] == pair.winners[1]


def _means(values: Mapping[str, Sequence[float]]) -> Ratio:
    return ratio([sum(each) / len(each) for each in values.values()])
