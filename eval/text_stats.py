"""What can be said of an answer without a reference: length, reading grade, repetition, copying.

`words` here are runs of letters, digits and inner apostrophes, lower-cased: "Don't worry." is two.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
COPY_WORDS = 8


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, in order."""
    return _WORD.findall(text.replace("’", "'").lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens, in order, repeats included."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(tokens: Sequence[str], n: int) -> float | None:
    """Distinct n-grams over all n-grams. 1 means no repetition; None when there are fewer than n words."""
    grams = ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else None


def distinct_over(answers: Iterable[str], n: int, budget: int) -> float | None:
    """`distinct` over the first `budget` words of all answers joined; None when there are fewer.

    A fixed budget, because the share of distinct n-grams falls as a text grows: unequal lengths are not comparable.
    """
    tokens = [word for answer in answers for word in words(answer)]
    return distinct(tokens[:budget], n) if len(tokens) >= budget else None


def reading_grade(text: str) -> float | None:
    """Flesch-Kincaid grade: 0.39 words/sentence + 11.8 syllables/word - 15.59; None without words.

    Syllables are hyphenation points plus one (pyphen, en_US), which undercounts some words. A text without a full stop
    is one sentence, so a list without punctuation looks hard to read.
    """
    tokens = words(text)
    if not tokens:
        return None
    sentences = max(1, len(_SENTENCE_END.findall(text)))
    syllables = sum(_hyphens(word) + 1 for word in tokens)
    return 0.39 * len(tokens) / sentences + 11.8 * syllables / len(tokens) - 15.59


class Copying:
    """How much of a text stands word for word in a set of training answers."""

    def __init__(self, training: Iterable[str]) -> None:
        self._seen = {gram for text in training for gram in ngrams(words(text), COPY_WORDS)}

    def share(self, text: str) -> float | None:
        """The share of the text's words that lie in an 8-word run found in training; None below 8 words."""
        tokens = words(text)
        if len(tokens) < COPY_WORDS:
            return None
        copied: set[int] = set()
        for start, gram in enumerate(ngrams(tokens, COPY_WORDS)):
            if gram in self._seen:
                copied.update(range(start, start + COPY_WORDS))
        return len(copied) / len(tokens)


@lru_cache(maxsize=50_000)
def _hyphens(word: str) -> int:
    return len(_hyphenator().positions(word))


@lru_cache(maxsize=1)
def _hyphenator() -> Any:
    import pyphen

    return pyphen.Pyphen(lang="en_US")
