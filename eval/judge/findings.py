"""From a judge's replies to findings: win rate, consistency, biases, criteria met. Pure, and seeded.

judge.json
| key | meaning |
|---|---|
| `judge`, `url` | the judge and its server |
| `model`, `server_version` | lists of what the server reports in its replies; one entry each unless it changed |
| `prompts_sha256`, `max_tokens`, `seed`, `provenance` | how |
| `arms` | the two arms: the second is compared with the first |
| `counts` | `asked` (judgements; equal requests share one), `failed` (no reply), `unreadable` (a reply that is not
  the JSON asked for; never scored), `cut` (unreadable replies that ended by length), `not_judged`: arm to {`error`,
  `empty`}, its answers that no judge was asked about |
| `labels_unmatched` | how many labeled answers and pairs were not judged here |
| `preference` | see `preference` below |
| `rubric` | `arms`: arm to criterion to {`value`, `low`, `high`, `n`}; `differences`: list of second minus first |
| `agreement` | criterion or `preference` to eval.judge.agreement.Agreement; empty without labels |
| `warnings` | what a reader must know before believing a number |

Intervals are 95 % intervals over questions, from eval.stats. Where a rate is 0 or 1 for every question, nothing varies:
the open side is then the exact one-sided bound, 0.095 for 0 of 30. Where it is another constant (all ties) there is no
interval.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from eval.judge.agreement import BAR, Target, calibrate
from eval.judge.items import AnswerKey, Answers, Item
from eval.judge.rubric import FIRST, PREFERENCE, RUBRIC, SECOND, TIE, parse_preference, parse_rubric
from eval.samples import Row
from eval.stats import Ratio, difference, holm, interval, ratio, swap_test, upper_rate
from eval.text_stats import words

# Which arm (0 or 1, None for a tie) a verdict means when the first arm's answer is shown first, and when it is second.
_ARM_OF = ({FIRST: 0, SECOND: 1, TIE: None}, {FIRST: 1, SECOND: 0, TIE: None})


class Pair(NamedTuple):
    """Two answers to one question, judged in both orders.

    texts: the first arm's answer, the second arm's. verdicts: FIRST, SECOND or TIE by place shown; first for the order
    in which the first arm's answer is shown first, then for the other.
    """

    answer: AnswerKey
    texts: tuple[str, str]
    verdicts: tuple[str, str]

    @property
    def winners(self) -> tuple[int | None, int | None]:
        """The arm that won in each order: 0 or 1, None for a tie."""
        one, other = (arm_of[verdict] for arm_of, verdict in zip(_ARM_OF, self.verdicts, strict=True))
        return one, other

    @property
    def consistent(self) -> bool:
        """Whether both orders have the same winner."""
        return self.winners[0] == self.winners[1]

    @property
    def winner(self) -> int | None:
        """The arm that won in both orders; None, a tie, if there is none."""
        return self.winners[0] if self.consistent else None

    @property
    def asked(self) -> bool:
        """Whether a judge was asked: two equal answers are a tie without one."""
        return self.texts[0] != self.texts[1]

    @property
    def lengths(self) -> tuple[int, int]:
        """In words."""
        return len(words(self.texts[0])), len(words(self.texts[1]))


class _Verdicts(NamedTuple):
    """What the replies say. preferences: by answer and order shown, FIRST, SECOND, TIE, or None if unreadable."""

    met: dict[Target, bool]
    preferences: dict[tuple[AnswerKey, tuple[str, ...]], str | None]
    counts: Counter[str]


def findings(
    items: Sequence[Item],
    replies: Sequence[Row],
    texts: Mapping[str, Answers],
    labels: Mapping[Target, Sequence[Hashable]],
    seed: int,
) -> dict[str, Any]:
    """Counts, preference, rubric and agreement from the replies; entry i of `replies` answers entry i of `items`."""
    first, second = texts
    met, preferences, counts = _read(items, replies)
    pairs, unreadable = [], 0
    for (answer, shown), verdict in preferences.items():
        if shown != (first, second):
            continue
        other = preferences[answer, (second, first)]
        if verdict is None or other is None:
            unreadable += 1
        else:
            pairs.append(Pair(answer, (texts[first][answer], texts[second][answer]), (verdict, other)))
    equal = [answer for answer, text in texts[first].items() if texts[second].get(answer) == text]
    pairs += [Pair(answer, (texts[first][answer],) * 2, (TIE, TIE)) for answer in equal]
    preferred: dict[Target, Hashable] = {
        Target(PREFERENCE, *pair.answer, tuple(sorted(texts))):
            TIE if pair.winner is None else (first, second)[pair.winner]
        for pair in pairs if pair.asked
    }  # fmt: skip
    agreement = calibrate(labels, preferred | met, seed)
    return {
        "counts": dict(counts),
        "preference": preference(pairs, unreadable, seed),
        "rubric": rubric((first, second), met, seed),
        "agreement": {name: each._asdict() for name, each in agreement.items()},
    }


def unmatched(labels: Iterable[Target], texts: Mapping[str, Answers]) -> int:
    """How many labeled answers and pairs were not judged here: another arm, question or sample."""
    return sum(
        not all(AnswerKey(target.question_id, target.sample) in texts.get(arm, {}) for arm in target.arms)
        for target in labels
    )


def preference(pairs: Sequence[Pair], unreadable: int, seed: int) -> dict[str, Any]:
    """What the verdicts on the pairs say; `unreadable` is the number of pairs without a verdict in both orders.

    judged: pairs with both verdicts. equal: those of two equal answers; they are ties, and no judge was asked.
    win_rate: of the second arm, over questions; a tie, and a pair whose orders disagree, is half a win. p: win rate
    against one half, by swapping arms within questions. wins, ties, losses: pairs. consistency: share of pairs with the
    same winner in both orders. first_chosen: share of the verdicts other than ties that choose the answer shown first;
    0.5 without position bias. longer_wins: of the pairs won in both orders whose answers differ in length, the share
    won by the longer answer. second_longer: share of pairs in which the second arm's answer has more words; near 0 or
    1, the effects of length and arm cannot be separated.
    """
    asked = [pair for pair in pairs if pair.asked]
    tally = Counter(pair.winner for pair in pairs)
    points = by_question((pair.answer.question_id, {1: 1.0, None: 0.5, 0: 0.0}[pair.winner]) for pair in pairs)
    wins = _means(points)

    def share(values: Iterable[tuple[str, bool]]) -> dict[str, Any] | None:
        return rate(by_question(values), seed)

    return {
        "judged": len(pairs),
        "unreadable": unreadable,
        "equal": len(pairs) - len(asked),
        "win_rate": rate(points, seed, pooled=False),
        "p": swap_test(wins, ratio(list(1 - wins.num)), seed) if len(points) > 1 and set(wins.num) != {0.5} else None,
        "wins": tally[1],
        "ties": tally[None],
        "losses": tally[0],
        "consistency": share((pair.answer.question_id, pair.consistent) for pair in asked),
        "first_chosen": share(
            (pair.answer.question_id, verdict == FIRST) for pair in asked for verdict in pair.verdicts if verdict != TIE
        ),
        "longer_wins": share(
            (pair.answer.question_id, pair.lengths[pair.winner] > pair.lengths[1 - pair.winner])
            for pair in pairs
            if pair.winner is not None and pair.lengths[0] != pair.lengths[1]
        ),
        "second_longer": share((pair.answer.question_id, pair.lengths[1] > pair.lengths[0]) for pair in asked),
    }


def rubric(arms: Sequence[str], met: Mapping[Target, bool], seed: int) -> dict[str, Any]:
    """Each arm's share of answers that meet each criterion, and the second arm's minus the first's, paired.

    `met` holds the answers with a readable reply. A question's samples are averaged first. p values are Holm-corrected
    over the criteria.
    """
    values: dict[str, dict[str, list[tuple[str, float]]]] = {arm: defaultdict(list) for arm in arms}
    for target, value in met.items():
        values[target.arms[0]][target.criterion].append((target.question_id, float(value)))
    table = {arm: {name: by_question(values[arm][name]) for name in RUBRIC} for arm in arms}
    differences = []
    for name in RUBRIC:
        first, second = (table[arm][name] for arm in arms)
        keys = sorted(first.keys() & second.keys())
        if keys:
            ours, theirs = (_means({key: each[key] for key in keys}) for each in (second, first))
            result = difference(ours, theirs, seed)
            differences.append({"criterion": name, **result._asdict(), "p_holm": None})
    for row, p in zip(differences, holm([row["p"] for row in differences]), strict=True):
        row["p_holm"] = p
    rates = {arm: {name: rate(cells, seed, pooled=False) for name, cells in table[arm].items()} for arm in arms}
    return {"arms": rates, "differences": differences}


def by_question(values: Iterable[tuple[str, float | bool]]) -> dict[str, list[float]]:
    """The values of each question; questions sorted."""
    table: dict[str, list[float]] = defaultdict(list)
    for question, value in values:
        table[question].append(float(value))
    return dict(sorted(table.items()))


def rate(values: Mapping[str, Sequence[float]], seed: int, pooled: bool = True) -> dict[str, Any] | None:
    """A share with its interval; None without values. Every value weighs the same if pooled, else every question."""
    if not values:
        return None
    cells = ratio([sum(v) for v in values.values()], [len(v) for v in values.values()]) if pooled else _means(values)
    share = interval(cells, seed)
    if share.value in (0.0, 1.0):
        bound = upper_rate(0, share.n)
        low, high = (0.0, bound) if share.value == 0 else (1 - bound, 1.0)
        share = share._replace(low=low, high=high)
    elif share.low == share.high:
        # All ties: nothing varies, and no exact bound fits a rate between 0 and 1.
        share = share._replace(low=None, high=None)
    elif share.low is not None and share.high is not None:
        share = share._replace(low=max(0.0, share.low), high=min(1.0, share.high))
    return share._asdict()


def judge_warnings(document: Mapping[str, Any], failure: str | None) -> list[str]:
    """What a reader must know before believing this judge; `failure` is one failed request's error."""
    lines, counts, preferred = [], document["counts"], document["preference"]
    judge, validated = document["judge"], [name for name, each in document["agreement"].items() if each["validated"]]
    if len(validated) < len(RUBRIC) + 1:
        lines.append(
            f"this judge is not validated{' except on ' + ', '.join(validated) if validated else ''}: to validate it "
            f"takes {BAR}"
        )
    if any(arm == judge or arm.startswith(f"{judge}/") for arm in document["arms"]):
        lines.append(f"{judge} judges its own answers")
    if counts["failed"]:
        lines.append(f"{counts['failed']} of {counts['asked']} judgements failed and are not scored: {failure}")
    if counts["unreadable"]:
        lines.append(
            f"{counts['unreadable']} of {counts['asked']} replies are not the JSON asked for and are not scored; "
            f"{counts['cut']} of them were cut by length"
        )
    if document["labels_unmatched"]:
        lines.append(
            f"{document['labels_unmatched']} labels are not used: their answers were not judged here (another arm, "
            "question_id or sample)"
        )
    for arm, each in counts["not_judged"].items():
        if each["error"] or each["empty"]:
            lines.append(
                f"{arm}: {each['error']} answers failed and {each['empty']} have no words; these are not judged"
            )
    first = preferred["first_chosen"]
    if first and first["low"] is not None and (first["low"] > 0.5 or first["high"] < 0.5):
        lines.append(
            f"position bias: {first['value']:.0%} of the verdicts other than ties choose the answer shown first"
        )
    return lines


def _read(items: Sequence[Item], replies: Sequence[Row]) -> _Verdicts:
    """Parse every reply, and count those that failed or cannot be read."""
    read = _Verdicts({}, {}, Counter(asked=len(items), failed=0, unreadable=0, cut=0))
    for item, row in zip(items, replies, strict=True):
        verdict: Any = None
        if row["error"] is not None:
            read.counts["failed"] += 1
        else:
            verdict = parse_rubric(row["text"]) if item.kind == "rubric" else parse_preference(row["text"])
            read.counts["unreadable"] += verdict is None
            read.counts["cut"] += verdict is None and row["finish_reason"] == "length"
        if item.kind == PREFERENCE:
            read.preferences[item.answer, item.arms] = verdict
        elif verdict is not None:
            read.met.update({Target(name, *item.answer, item.arms): verdict[name] for name in RUBRIC})
    return read


def _means(values: Mapping[str, Sequence[float]]) -> Ratio:
    return ratio([sum(each) / len(each) for each in values.values()])
