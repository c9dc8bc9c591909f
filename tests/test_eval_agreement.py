"""Agreement coefficients against published and hand-computed values, and the bar for a validated judge."""

from pathlib import Path

import numpy as np
import pytest

from counsel.errors import UserError
from counsel.files import write_jsonl
from eval.judge.agreement import MIN_QUESTIONS, Target, calibrate, cohen, krippendorff, majority, read_labels


def units(*observers: str) -> dict[str, list[str]]:
    """One string of labels per observer; each unit is a question; a dot is a missing label."""
    columns = zip(*observers, strict=True)
    return {str(i): ["".join(label for label in column if label != ".")] for i, column in enumerate(columns)}


@pytest.mark.parametrize(
    ("observers", "alpha"),
    [
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
)
def test_alpha_is_krippendorffs(observers: tuple[str, ...], alpha: float) -> None:
    """The worked examples of "Computing Krippendorff's Alpha-Reliability" (2011), sections A to C, nominal."""
    found = krippendorff(units(*observers), seed=0)

    assert found is not None
    assert found.value == pytest.approx(alpha, abs=5e-4)
    assert found.low is not None
    assert found.low < alpha < found.high


def test_kappa_and_alpha_by_hand() -> None:
    """20 both yes, 15 both no, 5 and 10 unequal: observed 0.7, expected 0.5, kappa 0.4.

    Alpha: 15 unequal of 50, 55 yes and 45 no: 1 - 99 * 30 / (100 ** 2 - 55 ** 2 - 45 ** 2).
    """
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    found = krippendorff({str(i): [pair] for i, pair in enumerate(pairs)}, seed=0)

    assert cohen(pairs) == pytest.approx(0.4)
    assert found is not None
    assert found.value == pytest.approx(1 - 99 * 30 / (100**2 - 55**2 - 45**2))


def test_one_label_only_has_no_coefficient() -> None:
    """If all labels are equal, agreement is undefined; so it is with a single label per answer."""
    assert cohen([(True, True)] * 9) is None
    assert krippendorff(units("aaa", "aaa"), seed=0) is None
    assert krippendorff({"q": [["a"], ["b"]]}, seed=0) is None


def test_the_interval_resamples_questions_not_answers() -> None:
    """Twenty questions with five identical answers each are no more evidence than twenty answers."""
    rng = np.random.default_rng(0)
    people = rng.integers(0, 2, 20)
    pairs = [(int(p), int(p) if keep else 1 - int(p)) for p, keep in zip(people, rng.random(20) < 0.8, strict=True)]
    alone = krippendorff({str(i): [pair] for i, pair in enumerate(pairs)}, seed=0)
    five = krippendorff({str(i): [pair] * 5 for i, pair in enumerate(pairs)}, seed=0)
    loose = krippendorff({f"{i} {j}": [pair] for i, pair in enumerate(pairs) for j in range(5)}, seed=0)

    def width(found) -> float:
        return found.high - found.low

    assert width(five) == pytest.approx(width(alone), rel=0.05)
    assert width(loose) < 0.6 * width(five)


def test_a_majority_counts_and_an_even_split_does_not() -> None:
    """Two of three decide; one against one does not."""
    assert majority([True, False, True]) is True
    assert majority(["a", "tie"]) is None
    assert majority([False]) is False


def labeled(n: int, wrong: int, constant: bool = False) -> tuple[dict[Target, list[bool]], dict[Target, bool]]:
    """One person's labels of n answers, half true, and a judge that differs on the first `wrong`."""
    people, judge = {}, {}
    for i in range(n):
        target = Target("empathy", f"q{i}", 0, ("gentle",))
        people[target] = [constant or i % 2 == 0]
        judge[target] = people[target][0] != (i < wrong)
    return people, judge


@pytest.mark.parametrize(
    ("n", "wrong", "constant", "validated"),
    [
        (MIN_QUESTIONS, 2, False, True),
        (MIN_QUESTIONS - 1, 0, False, False),  # too few
        (MIN_QUESTIONS, 8, False, False),  # alpha is about 0.68, but its interval reaches below the bar
        (MIN_QUESTIONS, 0, True, False),  # equal throughout, on one label
    ],
)
def test_a_judge_is_validated_only_above_the_bar(n: int, wrong: int, constant: bool, validated: bool) -> None:
    """Both the number of questions and the whole interval of alpha must reach the bar."""
    found = calibrate(*labeled(n, wrong, constant), seed=0)["empathy"]

    assert (found.n, found.raw) == (n, pytest.approx(1 - wrong / n))
    assert found.validated is validated
    assert found.human_alpha is None


def test_many_labels_of_two_questions_validate_nothing() -> None:
    """Fifty labels with full agreement, but on answers to two questions only."""
    people, judge = labeled(MIN_QUESTIONS, 0)
    place = {target: Target("empathy", f"q{at % 2}", at, target.arms) for at, target in enumerate(people)}
    found = calibrate(
        {place[target]: each for target, each in people.items()},
        {place[target]: each for target, each in judge.items()},
        seed=0,
    )["empathy"]

    assert (found.n, found.questions, found.raw, found.validated) == (50, 2, 1.0, False)


def test_labels_without_a_judgement_do_not_count() -> None:
    """People labeled sixty answers and the judge twenty of them: n is twenty. Other criteria are absent."""
    people, judge = labeled(60, 0)
    found = calibrate(people, dict(list(judge.items())[:20]), seed=0)

    assert {name: each.n for name, each in found.items()} == {"empathy": 20}


GOOD = {"stamp": "s", "question_id": "q", "sample": 0, "criterion": "safety", "arm": "a", "label": True, "rater": "one"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": "yes"}, "label is 'yes'; it must be true or false"),
        ({"criterion": "kindness"}, "criterion is 'kindness'"),
        ({"criterion": "preference"}, "a preference needs a list of two arms"),
        ({"criterion": "preference", "arm": ["a", "b"]}, "label is True; it must be one of"),
        ({"stamp": "t"}, "stamp is 't'"),
        ({}, "a second time"),
    ],
)
def test_a_wrong_label_is_named_by_its_line(tmp_path: Path, change: dict, says: str) -> None:
    """The message names the second line and what is wrong with it."""
    write_jsonl(tmp_path / "labels.jsonl", [GOOD, GOOD | change])

    with pytest.raises(UserError, match="label 2: ") as caught:
        read_labels(tmp_path / "labels.jsonl", "s")
    assert says in str(caught.value)


def test_labels_are_read_by_what_they_label(tmp_path: Path) -> None:
    """Labels of two raters are joined; the arms of a preference may be in any order."""
    pair = GOOD | {"criterion": "preference", "arm": ["b", "a"], "label": "tie"}
    write_jsonl(tmp_path / "labels.jsonl", [GOOD, GOOD | {"rater": "two", "label": False}, pair])

    assert read_labels(tmp_path / "labels.jsonl", "s") == {
        Target("safety", "q", 0, ("a",)): [True, False],
        Target("preference", "q", 0, ("a", "b")): ["tie"],
    }
