"""Cuts a conversation into the texts that are judged one by one: the most alarming one decides.

A long message says one risky sentence among many harmless ones, which the mean over all its words would bury.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from counsel.safety.normalize import normalize

# The newest turns that are judged together.
WINDOW_TURNS = 8
PASSAGE_WORDS = 60
# Words that are read of one turn; the rest of a pasted book changes nothing about how its writer is.
_TURN_WORDS = 2000
_JOINED_TURNS = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+|\n+")


class Unit(NamedTuple):
    """A text to judge, the index of the turn that it (or its end) is from, and into how many texts that turn is cut."""

    text: str
    turn: int
    siblings: int


def conversation_units(user_turns: Sequence[str]) -> list[Unit]:
    """The distinct texts to judge in the last WINDOW_TURNS turns; empty where there are no words."""
    first = max(0, len(user_turns) - WINDOW_TURNS)
    turns = [normalize(" ".join(turn.split(" ")[:_TURN_WORDS])) for turn in user_turns[first:]]
    found = []
    for at, turn in enumerate(turns):
        texts = passages(turn)
        found += [Unit(text, first + at, len(texts)) for text in texts]
    # "yes" and "tonight" say nothing alone: the last short turns are also read as one.
    joined = "\n".join(turns[-_JOINED_TURNS:])
    if len(turns) > 1 and len(joined.split()) <= PASSAGE_WORDS:
        found += [Unit(text, len(user_turns) - 1, 1) for text in passages(joined)]
    return list({unit.text: unit for unit in reversed(found)}.values())[::-1]


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [part.strip() for part in _SENTENCE_END.split(text) if re.search(r"\w", part)]


def passages(text: str) -> list[str]:
    """Consecutive sentences, up to PASSAGE_WORDS words each; a longer sentence is cut."""
    found: list[list[str]] = []
    size = 0
    for sentence in sentences(text):
        words = sentence.split()
        for start in range(0, len(words), PASSAGE_WORDS):
            piece = words[start : start + PASSAGE_WORDS]
            if not found or size + len(piece) > PASSAGE_WORDS:
                found.append([])
                size = 0
            found[-1] += piece
            size += len(piece)
    return [" ".join(passage) for passage in found]
