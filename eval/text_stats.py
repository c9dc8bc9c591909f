"""Metrics of an answer that need no reference: length, reading grade, repetition, copying.

A word is a lower-cased run of letters, digits and inner apostrophes: "Don't worry." has two.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
COPY_WORDS = 8


def words(text: str) -> list[str]:
    """The lower-cased words of a text, in order."""
    return _WORD.findall(text.replace("’", "'").lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens, in order, repeats included."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(tokens: Sequence[str], n: int) -> float | None:
    """Distinct n-grams over all n-grams; 1 means no repetition. None with fewer than n words."""
    grams = ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else None


def distinct_over(answers: Iterable[str], n: int, budget: int) -> float | None:
    """`distinct` over the first `budget` words of the joined answers; None if there are fewer.

    The budget is fixed because the share of distinct n-grams falls with length.
    """
    tokens = [word for answer in answers for word in words(answer)]
    return distinct(tokens[:budget], n) if len(tokens) >= budget else None


def reading_grade(text: str) -> float | None:
    """Flesch-Kincaid grade: 0.39 words/sentence + 11.8 syllables/word - 15.59; None without words.

    Syllables are hyphenation points plus one (pyphen, en_US), which undercounts some words. Text without a full stop is
    one sentence, so a list without punctuation scores as hard to read.
    """
    tokens = words(text)
    if not tokens:
        return None
    sentences = max(1, len(_SENTENCE_END.findall(text)))
    syllables = sum(_hyphens(word) + 1 for word in tokens)
    return 0.39 * len(tokens) / sentences + 11.8 * syllables / len(tokens) - 15.59


class Copying:
    """How much of a text is copied word for word from training answers."""

    def __init__(self, training: Iterable[str]) -> None:
        self._training_grams = {gram for text in training for gram in ngrams(words(text), COPY_WORDS)}

    def share(self, text: str) -> float | None:
        """The share of words in 8-word runs that training has too; None below 8 words."""
        tokens = words(text)
        if len(tokens) < COPY_WORDS:
            return None
        copied: set[int] = set()
        for start, gram in enumerate(ngrams(tokens, COPY_WORDS)):
            if gram in self._training_grams:
                copied.update(range(start, start + COPY_WORDS))
        return len(copied) / len(tokens)


@lru_cache(maxsize=50_000)
def _hyphens(word: str) -> int:
    return len(_hyphenator().positions(word))


@lru_cache(maxsize=1)
def _hyphenator() -> Any:
    import pyphen

    return pyphen.Pyphen(lang="en_US")
