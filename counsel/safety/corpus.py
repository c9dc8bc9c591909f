"""The messages written for this project.

`data/train` is learned from, `data/dev` sets the thresholds, `data/test` is measured once. Each folder has YAML files,
which are lists of voices: an imagined author, a label and a slice, and one message per line. `{a|b}` stands for a
choice: such a line is a template. `//` separates the turns of a conversation. No two folders share a voice or a
message.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from counsel.errors import UserError
from counsel.safety.labels import LABELS
from counsel.safety.normalize import normalize
from counsel.values import nearest

DATA = Path(__file__).parent / "data"
_CHOICE = re.compile(r"\{([^{}]*)\}")
# Variants of one template that are learned from: more would teach its frame, not its meaning.
_VARIANTS = 5


class Message(NamedTuple):
    """One row. turns: the user's turns, oldest first. template: a hash of the line that it was made from."""

    turns: tuple[str, ...]
    label: str
    slice: str
    voice: str
    template: str

    @property
    def text(self) -> str:
        """All turns as one text."""
        return "\n".join(self.turns)


def read_messages(part: Literal["train", "dev", "test"]) -> list[Message]:
    """All messages of one part, in the order of the files.

    Raises UserError where there are none, and for a row that breaks the format.
    """
    import yaml

    rows: list[Message] = []
    for file in sorted((DATA / part).glob("*.yaml")):
        for voice in yaml.safe_load(file.read_text(encoding="utf-8")):
            label = voice["label"]
            if label not in LABELS:
                raise UserError(f"{file.name}: no label {label!r}; {nearest(label, LABELS)}")
            for line in filter(None, map(str.strip, voice["messages"].splitlines())):
                template = hashlib.sha256(line.encode()).hexdigest()[:12]
                for text in _variants(line):
                    turns = tuple(turn.strip() for turn in text.split("//"))
                    rows.append(Message(turns, label, voice["slice"], voice["voice"], template))
    if not rows:
        raise UserError(f"no messages in {str(DATA / part)!r}: put files there as docs/safety.md describes them")
    # Different templates meet in the same words; one row is enough.
    return list({normalize(row.text): row for row in reversed(rows)}.values())[::-1]


def _variants(line: str) -> Iterator[str]:
    """Up to _VARIANTS texts of a template, the same ones each time, spread over all choices."""
    choices = [found.split("|") for found in _CHOICE.findall(line)]
    frame = _CHOICE.sub("\0", line).split("\0")
    every = list(itertools.islice(itertools.product(*choices), 4096))
    picked = every if len(every) <= _VARIANTS else random.Random(line).sample(every, _VARIANTS)
    for words in picked:
        text = frame[0] + "".join(word + rest for word, rest in zip(words, frame[1:], strict=True))
        yield re.sub(r"\s+([.,?!])", r"\1", " ".join(text.split()))
