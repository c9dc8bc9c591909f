"""How far a judge agrees with people: Cohen's kappa, Krippendorff's alpha, and the bar for a validated judge.

Human labels are a JSONL file, one label per line
| key | meaning |
|---|---|
| `stamp` | the name of the folder of the evaluation whose answers were labeled |
| `question_id`, `sample` | as in samples.jsonl |
| `criterion` | a name from eval.judge.rubric.RUBRIC, or `preference` |
| `arm` | whose answer; for `preference` a list of the two arms, in any order |
| `label` | true or false; for `preference` the arm with the better answer, or `"tie"` |
| `rater` | a name for the person who labeled |

If several people rated an answer, the majority counts; an even split leaves the answer without a human label.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counsel.errors import UserError
from counsel.files import read_jsonl
from eval.judge.rubric import PREFERENCE, RUBRIC, TIE
from eval.samples import Row
from eval.stats import MIN_TESTABLE, Interval, resample_counts

# Krippendorff (2004): below .667 not even tentative conclusions. The whole interval must be above it.
ALPHA_BAR = 0.667
# Many labels on few questions prove little: with fewer questions, a judge at the bar would often pass by luck.
MIN_QUESTIONS = 50
BAR = f"a 95 % interval of alpha above {ALPHA_BAR} on answers to at least {MIN_QUESTIONS} questions"


class Target(NamedTuple):
    """What was labeled: one criterion of one arm's answer, or the preference between two arms (sorted by name)."""

    criterion: str
    question_id: str
    sample: int
    arms: tuple[str, ...]


class Agreement(NamedTuple):
    """Judge against people on one criterion.

    n: answers (or pairs) with both labels; questions: how many they belong to. raw: share of equal labels. kappa,
    alpha: None if only one label occurs, as agreement is then undefined. human_alpha: between people; None without a
    second rater.
    """

    n: int
    questions: int
    raw: float
    kappa: float | None
    alpha: dict[str, Any] | None
    human_alpha: float | None
    validated: bool


def read_labels(path: Path, stamp: str) -> dict[Target, list[Hashable]]:
    """All raters' labels by target; UserError names the first line that is not a label of this evaluation."""
    by_target: dict[Target, dict[str, Hashable]] = defaultdict(dict)
    for number, row in enumerate(read_jsonl(path), start=1):
        problem = _problem(row, stamp)
        if problem:
            raise UserError(f"{str(path)!r} label {number}: {problem}; the format is in docs/eval.md")
        arms = tuple(sorted(row["arm"])) if row["criterion"] == PREFERENCE else (row["arm"],)
        raters = by_target[Target(row["criterion"], row["question_id"], row["sample"], arms)]
        if row["rater"] in raters:
            raise UserError(f"{str(path)!r} label {number}: {row['rater']!r} labels this a second time; keep one")
        raters[row["rater"]] = row["label"]
    return {target: list(raters.values()) for target, raters in by_target.items()}


def calibrate(
    labels: Mapping[Target, Sequence[Hashable]], judged: Mapping[Target, Hashable], seed: int
) -> dict[str, Agreement]:
    """Each criterion's agreement, on the answers that both the judge and people labeled."""
    agreements = {}
    for criterion in (PREFERENCE, *RUBRIC):
        both: dict[str, list[tuple[Hashable, Hashable]]] = defaultdict(list)
        people: dict[str, list[Sequence[Hashable]]] = defaultdict(list)
        for target, each in labels.items():
            if target.criterion != criterion or target not in judged:
                continue
            # An even split gives no label to compare the judge with, but it counts in the agreement between people.
            people[target.question_id].append(each)
            consensus = majority(each)
            if consensus is not None:
                both[target.question_id].append((judged[target], consensus))
        pairs = [pair for question in both.values() for pair in question]
        if not pairs:
            continue
        alpha, among_people = krippendorff(both, seed), krippendorff(people, seed)
        agreements[criterion] = Agreement(
            n=len(pairs),
            questions=len(both),
            raw=sum(judge == human for judge, human in pairs) / len(pairs),
            kappa=cohen(pairs),
            alpha=alpha._asdict() if alpha else None,
            human_alpha=among_people.value if among_people else None,
            validated=alpha is not None
            and alpha.low is not None
            and alpha.low > ALPHA_BAR
            and len(both) >= MIN_QUESTIONS,
        )
    return agreements


def majority(labels: Sequence[Hashable]) -> Hashable | None:
    """The label that more raters chose than any other; None if there is no such label."""
    (best, most), *others = Counter(labels).most_common()
    return None if others and others[0][1] == most else best


def cohen(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Cohen's kappa of two raters' labels; None if only one label occurs."""
    from sklearn.metrics import cohen_kappa_score

    first, second = ([str(label) for label in labels] for labels in zip(*pairs, strict=True))
    return None if len({*first, *second}) < 2 else float(cohen_kappa_score(first, second))


def krippendorff(units: Mapping[str, Sequence[Sequence[Hashable]]], seed: int) -> Interval | None:
    """Krippendorff's alpha for nominal labels, with its 95 % percentile bootstrap interval over questions.

    `units`: question -> for each labeled answer its labels, one per rater. Answers with a single label are left out; n
    counts the others. None if fewer than two different labels occur; no bounds below `MIN_TESTABLE` questions, where
    the bootstrap is too narrow. A resample with one label only shows no agreement beyond chance: its alpha is 0.
    """
    tables = [[Counter(unit) for unit in each if len(unit) > 1] for each in units.values()]
    tables = [each for each in tables if each]
    categories = sorted({label for each in tables for unit in each for label in unit}, key=str)
    if len(categories) < 2:
        return None
    # Per question: pairs of unequal labels in its units, each over (raters - 1), and how often each label occurs.
    unequal = np.array([sum(_unequal(unit) for unit in each) for each in tables])
    occurs = np.array([[sum(unit[label] for unit in each) for label in categories] for each in tables], dtype=float)
    value = float(_alpha(unequal.sum(keepdims=True), occurs.sum(axis=0, keepdims=True))[0])
    n = sum(len(each) for each in tables)
    if len(tables) < MIN_TESTABLE:
        return Interval(value, None, None, n)
    counts = resample_counts(len(tables), seed)
    low, high = np.quantile(_alpha(counts @ unequal, counts @ occurs), [0.025, 0.975])
    return Interval(value, float(low), float(high), n)


def _unequal(unit: Mapping[Hashable, int]) -> float:
    raters = sum(unit.values())
    return (raters**2 - sum(times**2 for times in unit.values())) / (raters - 1)


def _alpha(unequal: Any, occurs: Any) -> Any:
    """Alpha of each row: 1 - observed / expected disagreement; `unequal` (rows,), `occurs` (rows, labels)."""
    total = occurs.sum(axis=1)
    expected = total**2 - (occurs**2).sum(axis=1)
    return np.where(expected > 0, 1 - (total - 1) * unequal / np.where(expected > 0, expected, 1), 0.0)


def _problem(row: Row, stamp: str) -> str | None:
    """Why a line is not a label of this evaluation; None if it is one."""
    missing = {"stamp", "question_id", "sample", "criterion", "arm", "label", "rater"} - set(row)
    if missing:
        return f"lacks {', '.join(sorted(missing))}"
    unnamed = [key for key in ("question_id", "criterion", "rater") if not isinstance(row[key], str)]
    if unnamed:
        return f"{unnamed[0]} is {row[unnamed[0]]!r}; it must be a string"
    if row["stamp"] != stamp:
        return f"stamp is {row['stamp']!r}, but the answers judged here have stamp {stamp!r}"
    if row["criterion"] == PREFERENCE:
        arms = row["arm"]
        if not isinstance(arms, list) or len({arm for arm in arms if isinstance(arm, str)}) != 2 or len(arms) != 2:
            return f"arm is {arms!r}; a preference needs a list of two arms"
        return None if row["label"] in (*arms, TIE) else f"label is {row['label']!r}; it must be one of {[*arms, TIE]}"
    if row["criterion"] not in RUBRIC:
        return f"criterion is {row['criterion']!r}; it must be one of {', '.join([PREFERENCE, *RUBRIC])}"
    if not isinstance(row["arm"], str):
        return f"arm is {row['arm']!r}; it must be the name of one arm"
    return None if isinstance(row["label"], bool) else f"label is {row['label']!r}; it must be true or false"
