"""Cuts a conversation into the texts that are judged one by one: the most alarming one decides.

A long message says one risky sentence among many harmless ones, which the mean of an embedding would bury. So each
passage is judged, and each sentence that has any word a crisis is put into.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from counsel.safety.normalize import normalize

# The newest turns that are judged together.
WINDOW_TURNS = 8
_PASSAGE_WORDS = 50
# Words that are read of one turn; the rest of a pasted book changes nothing about how its writer is.
_TURN_WORDS = 2000
_JOINED_TURNS = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+|\n+")
# Sentences of a longer text that are looked at alone: those with any word that a crisis is put into.
_CUE = re.compile(
    r"\b(?:di(?:e|ed|es)|dying|dead|death|deaths|kill\w*|suicid\w*|liv(?:e|ing) (?:any|no|like|without|another|"
    r"for)|to live|living|alive|exist\w*|born|wake|waking|asleep forever|end(?:ing|s)? (?:it|my|this|every|"
    r"things)|ends (?:here|tonight)|cut(?:s|ting|tin)?|hurt(?:ing)? (?:my|me)|harm\w*|self-\w+|burn\w*|bleed\w*|"
    r"blood|blades?|razor|scars?|scratch\w*|overdos\w*|pills?|tablets?|rope|noose|gun|pistol|rifle|bridge|roof|"
    r"jump\w*|hang(?:ing)?|poison|goodbye|farewell|note|burden|without me|be here|around (?:any|much)|go on|"
    r"point of|point in|reason to|worth|disappear\w*|vanish\w*|gone|attempt\w*|urges?|myself|accident|insurance|"
    r"take me|miss me|better off|own hand|own life)\b"
)


class Part(NamedTuple):
    """A text to judge, the passage that it stands in (itself if it is one), and how many texts its message is cut into.

    A weak sentence counts for less if its passage does not agree, or if many were looked at to find it.
    """

    text: str
    passage: str
    siblings: int


class Unit(NamedTuple):
    """A part of a normalized turn, and the index of the turn that it (or its end) is from."""

    part: Part
    turn: int


def conversation_units(user_turns: Sequence[str]) -> list[Unit]:
    """The distinct texts to judge in the last WINDOW_TURNS turns; empty where there are no words."""
    first = max(0, len(user_turns) - WINDOW_TURNS)
    turns = [normalize(" ".join(turn.split(" ")[:_TURN_WORDS])) for turn in user_turns[first:]]
    found = [Unit(part, first + at) for at, turn in enumerate(turns) for part in text_parts(turn)]
    # "yes" and "tonight" say nothing alone: the last short turns are also read as one.
    joined = "\n".join(turns[-_JOINED_TURNS:])
    if len(turns) > 1 and len(joined.split()) <= _PASSAGE_WORDS:
        found += [Unit(Part(text, text, 1), len(user_turns) - 1) for text in passages(joined)]
    return list({unit.part.text: unit for unit in reversed(found)}.values())[::-1]


def text_parts(text: str) -> list[Part]:
    """Of a normalized text: its passages, and alone each of several sentences that has a cue."""
    several = len(sentences(text)) > 1
    found = {passage: passage for passage in passages(text)}
    for passage in list(found):
        for sentence in sentences(passage):
            if several and _CUE.search(sentence):
                found.setdefault(sentence, passage)
    return [Part(text, passage, len(found)) for text, passage in found.items()]


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [part.strip() for part in _SENTENCE_END.split(text) if re.search(r"\w", part)]


def passages(text: str) -> list[str]:
    """Consecutive sentences, up to about _PASSAGE_WORDS words each."""
    found: list[list[str]] = []
    size = 0
    for sentence in sentences(text):
        words = len(sentence.split())
        if not found or size + words > _PASSAGE_WORDS:
            found.append([])
            size = 0
        found[-1].append(sentence)
        size += words
    return [" ".join(passage) for passage in found]
