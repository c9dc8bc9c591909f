"""The requests of a judging: each answer by the rubric, and each pair of answers in both orders."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eval.judge.rubric import PREFERENCE, Ask, ask_preference, ask_rubric
from eval.questions import Question
from eval.samples import Row
from eval.text_stats import words


class AnswerKey(NamedTuple):
    """Which of an arm's answers."""

    question_id: str
    sample: int


# An arm's answers that have words.
Answers = Mapping[AnswerKey, str]


class Item(NamedTuple):
    """One request. `arms`: whose answers it shows, in order: one for `rubric`, two for `preference`."""

    kind: str
    answer: AnswerKey
    arms: tuple[str, ...]
    ask: Ask


def answers(scores: Sequence[Row], arm: str) -> dict[AnswerKey, str]:
    """An arm's answers, without those that failed or have no words."""
    mine = [row for row in scores if row["arm"] == arm and row["error"] is None and words(row["text"])]
    return {AnswerKey(row["question_id"], row["sample"]): row["text"] for row in mine}


def not_judged(scores: Sequence[Row], arm: str) -> dict[str, int]:
    """How many of an arm's answers failed, and how many have no words."""
    mine = [row for row in scores if row["arm"] == arm]
    failed = sum(row["error"] is not None for row in mine)
    return {"error": failed, "empty": len(mine) - failed - len(answers(scores, arm))}


def plan_items(questions: Sequence[Question], texts: Mapping[str, Answers], max_tokens: int) -> list[Item]:
    """Every request of a judging; `texts` holds both arms' answers, the first arm first.

    A pair is two answers with the same sample number. Two equal answers are a tie, and no judge is asked about them.
    """
    asked = {question.question_id: question.question for question in questions}
    first, second = texts
    items = [
        Item("rubric", key, (arm,), ask_rubric(asked[key.question_id], text, max_tokens))
        for arm in texts
        for key, text in sorted(texts[arm].items())
    ]
    for key in sorted(texts[first].keys() & texts[second].keys()):
        if texts[first][key] == texts[second][key]:
            continue
        for one, other in ((first, second), (second, first)):
            ask = ask_preference(asked[key.question_id], texts[one][key], texts[other][key], max_tokens)
            items.append(Item(PREFERENCE, key, (one, other), ask))
    return items
