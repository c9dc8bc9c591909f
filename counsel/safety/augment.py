"""Varies training messages: as others would type them, and among other sentences. Only the meaning is to be learned."""

import random
import re
from collections.abc import Sequence

from counsel.safety.units import sentences

_OPENINGS = (
    "hi", "hey", "hello", "hey guys", "ok so", "so", "um", "idk where to start", "first time posting here",
    "throwaway account", "sorry for the long post", "sorry if this is the wrong place", "honestly", "look", "tw",
    "not sure anyone will read this", "dear counselor", "good evening", "i need to get this off my chest", "well",
    "long story short", "to be honest", "vent incoming", "i'm 16f", "m24 here", "31 f", "this is hard to write",
    "can i tell you something", "quick question",
)  # fmt: skip
_CLOSINGS = (
    "thanks for reading", "thanks", "any advice?", "what should i do?", "idk", "lol", "sorry", "sorry for rambling",
    "anyway", "does anyone else feel this way?", "that's all", "please help", "what do you think?", "is that normal?",
    "tia", "ugh", "i just needed to say it", "thank you", "is it just me?", "help", "am i overreacting?", "edit: typo",
    "...", "haha", "i guess",
)  # fmt: skip
# Words of a message with others around it: as many as a passage has at most.
_WORDS = 20, 80


def varied(text: str, safe: bool, fillers: Sequence[str], chance: random.Random) -> str:
    """`text` as another might type it, in a third of all cases among sentences of `fillers`.

    Of a `safe` one of several sentences, some consecutive ones: none of them has any risk.
    """
    lines = sentences(text)
    if safe and len(lines) > 2 and chance.random() < 0.5:
        start = chance.randrange(len(lines) - 1)
        text = " ".join(lines[start : chance.randint(start + 1, len(lines))])
    lines = [text]
    drawn = chance.random()
    if drawn < 0.35:
        for filler in _up_to(chance.randint(*_WORDS) - len(text.split()), fillers, chance):
            lines.insert(chance.randint(0, len(lines)), filler)
    elif drawn < 0.5:
        lines.insert(0, chance.choice(_OPENINGS))
        lines.append(chance.choice(_CLOSINGS))
        lines = lines[chance.randint(0, 1) : chance.randint(2, 3)]
    joined = chance.choice((" ", " ", ". ", "\n")).join(lines)
    if chance.random() < 0.25:
        joined = re.sub(r"[.,;:!]+(?=\s|$)", "", joined)
    if chance.random() < 0.2:
        joined = joined.replace("'", "")
    if chance.random() < 0.15:
        joined = _mistyped(joined, chance)
    return joined


def letter(fillers: Sequence[str], chance: random.Random) -> str:
    """Sentences of `fillers`, as many as a passage has."""
    return " ".join(_up_to(chance.randint(*_WORDS), fillers, chance)) or chance.choice(fillers)


def _up_to(words: int, fillers: Sequence[str], chance: random.Random) -> list[str]:
    """Sentences of `fillers` that have at most `words` words together."""
    found: list[str] = []
    while (words := words - len((filler := chance.choice(fillers)).split())) >= 0:
        found.append(filler)
    return found


def _mistyped(text: str, chance: random.Random) -> str:
    """With one to three slips of the fingers: a letter dropped, doubled, or swapped with the next."""
    letters = list(text)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(letters))
        if not letters[at].isalpha() or at + 1 == len(letters):
            continue
        kind = chance.randrange(3)
        if kind == 0:
            letters[at] = ""
        elif kind == 1:
            letters[at] *= 2
        else:
            letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)
