"""Training rows that are similar to a question: for the retrieval yardstick, and to detect leakage.

Leakage: training has seen a test question. The split is by normalized question, so no question is in both parts word
for word, but a paraphrase may be. Its scores then say less about new questions.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eval.text_stats import ngrams, words

# A held-out question counts as seen if one training question has at least this share of its 5-word runs.
SEEN_SHARE = 0.5
_RUN_WORDS = 5


def nearest_rows(train_rows: Sequence[Mapping[str, str]], questions: Sequence[str]) -> list[Mapping[str, str]]:
    """For each question, the first training row whose question is nearest by TF-IDF cosine."""
    return [train_rows[at] for at in _cosines(train_rows, questions).argmax(axis=1)]


class Contamination:
    """Which held-out questions training may have seen already."""

    def __init__(self, train_rows: Sequence[Mapping[str, str]]) -> None:
        self._answers = {tuple(words(row["answer"])) for row in train_rows}
        self._questions = [_runs(question) for question in {row["question"] for row in train_rows}]

    def reason(self, question: str, answers: Sequence[str]) -> str | None:
        """What training shares with this question: `answer`, `question` or None.

        `answer`: one of its answers is a training answer, up to case and punctuation. `question`: one training question
        has half or more of its 5-word runs; a question under 5 words is one run.
        """
        if any(tuple(words(answer)) in self._answers for answer in answers):
            return "answer"
        runs = _runs(question)
        return "question" if any(len(runs & known) >= SEEN_SHARE * len(runs) for known in self._questions) else None


def _runs(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return set(ngrams(tokens, _RUN_WORDS)) or {tuple(tokens)}


def _cosines(train_rows: Sequence[Mapping[str, str]], questions: Sequence[str]) -> NDArray[np.float64]:
    """(len(questions), len(train_rows))"""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    known = vectorizer.fit_transform([row["question"] for row in train_rows])
    cosines: NDArray[np.float64] = (vectorizer.transform(questions) @ known.T).toarray()
    return cosines
