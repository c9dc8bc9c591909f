"""What is measured at every turn of a dialogue; nothing needs a reference."""

from collections.abc import Sequence
from typing import NamedTuple

from eval.dialogue.person import RECALL_TURN, TURNS, remembers
from eval.samples import Row
from eval.similarity import Encoder
from eval.text_stats import ngrams, words

REPEATED_WORDS = 5


class TurnMetric(NamedTuple):
    """`tested`: the turns at which arms are compared; elsewhere the metric is undefined or the same for all."""

    title: str
    digits: int
    tested: tuple[int, ...]
    note: str


_ALL = tuple(range(1, TURNS + 1))
TURN_METRICS: dict[str, TurnMetric] = {
    "words": TurnMetric("words", 1, _ALL, "length of the answer; max_tokens limits it"),
    "repetition": TurnMetric(
        "repetition of itself", 3, _ALL[1:],
        f"share of the answer's {REPEATED_WORDS}-word runs that its own earlier answers have; 0 at turn 1",
    ),
    "person_similarity": TurnMetric(
        "similarity to the person", 3, _ALL,
        "MiniLM cosine of the answer and what the person just said; high values mean parroting",
    ),
    "recall": TurnMetric(
        "fact recalled", 2, (RECALL_TURN,), f"whether the answer at turn {RECALL_TURN} has the fact of turn 1"
    ),
}  # fmt: skip

TurnScores = dict[str, float | None]


def turn_scores(rows: Sequence[Row], encoder: Encoder) -> list[list[TurnScores]]:
    """The metrics of every turn of each dialogue; None where one is undefined, as for an answer without words."""
    spoken = [turn for row in rows for turn in row["turns"]]
    encoder.encode([turn["person"] for turn in spoken])
    encoder.encode([turn["text"] for turn in spoken if words(turn["text"])])
    return [_dialogue_scores(row, encoder) for row in rows]


def repetition(answers: Sequence[str]) -> list[float | None]:
    """For each answer, the share of its 5-word runs that an earlier one has; None below five words."""
    before: set[tuple[str, ...]] = set()
    shares: list[float | None] = []
    for answer in answers:
        runs = ngrams(words(answer), REPEATED_WORDS)
        shares.append(sum(run in before for run in runs) / len(runs) if runs else None)
        before.update(runs)
    return shares


def _dialogue_scores(row: Row, encoder: Encoder) -> list[TurnScores]:
    repeated = repetition([turn["text"] for turn in row["turns"]])
    scores: list[TurnScores] = []
    for number, (turn, share) in enumerate(zip(row["turns"], repeated, strict=True), start=1):
        found: TurnScores = {"words": float(len(words(turn["text"]))), "repetition": share, "person_similarity": None}
        if words(turn["text"]):
            said, answer = encoder.encode([turn["person"], turn["text"]])
            found["person_similarity"] = float(said.text @ answer.text)
        found["recall"] = float(remembers(turn["text"], row["fact"])) if number == RECALL_TURN else None
        scores.append(found)
    return scores
