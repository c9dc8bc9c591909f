"""The held-out questions of a run, and the rows that an evaluation of them must hold."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from counsel.errors import UserError
from counsel.run import Run
from eval.samples import Key


class Question(NamedTuple):
    """A held-out question with its reference answers."""

    question_id: str
    question: str
    topic: str
    answers: tuple[str, ...]


class PlannedRows(NamedTuple):
    """The keys of all rows of a finished evaluation: those of samples.jsonl, and those of likelihood.jsonl."""

    samples: list[Key]
    likelihoods: list[Key]


def choose_questions(run: Run, n: int) -> list[Question]:
    """The first n held-out questions by hash, or all if there are fewer; a smaller n always gives a subset."""
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in run.split("test"):
        by_id[row["question_id"]].append(row)
    if len(by_id) < 2:
        raise UserError(
            f"run {run.name!r} holds out {len(by_id)} questions; an interval needs at least 2: train on more data"
        )
    return [
        Question(key, rows[0]["question"], rows[0]["topic"], tuple(row["answer"] for row in rows))
        for key, rows in sorted(by_id.items())[:n]
    ]


def planned_rows(arms: Sequence[str], questions: Sequence[Question], samples: int, references: int) -> PlannedRows:
    """`samples` answers per arm and question, and the likelihoods of at most `references` of its reference answers."""
    asked = [(arm, question) for arm in arms for question in questions]
    return PlannedRows(
        [(arm, q.question_id, number) for arm, q in asked for number in range(samples)],
        [(arm, q.question_id, number) for arm, q in asked for number in range(min(len(q.answers), references))],
    )
