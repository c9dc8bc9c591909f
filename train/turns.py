"""Turns as people's files have them, made into a conversation that can be trained on.

The result starts with at most one system message; then user and assistant take turns, and the assistant has the last
word. Every change is counted.

    repaired([("user", "Hi."), ("user", "Bad day."), ("assistant", "What happened?"), ("user", "Thanks")])
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from counsel.chat import Message
from train.cleaning import clean, normalized

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"

TOOL_DROPPED = "tool message dropped"
EMPTY_DROPPED = "empty turn dropped"
SYSTEM_DROPPED = "system message after the start dropped"
MERGED = "turn merged with the one before it, by the same speaker"
OPENING_CUT = "assistant turn before the first user turn cut"
END_CUT = "user turn without a reply cut from the end"


class Turn(NamedTuple):
    """One turn as the source has it: a role (one of the four above) and its text."""

    role: str
    text: str


class Repaired(NamedTuple):
    """A conversation's messages, and how many of its turns were changed in each way.

    messages: without an exchange if nothing is left of it.
    """

    messages: list[Message]
    changes: Counter[str]


def repaired(turns: Iterable[Turn]) -> Repaired:
    """The conversation in `turns`, with cleaned text.

    Tool messages and empty turns are dropped. System messages at the start become one; later ones are dropped.
    Consecutive turns of one speaker are merged with a blank line between them. Assistant turns before the first user
    turn are cut, and so are user turns after the last reply.
    """
    changes: Counter[str] = Counter()
    system: list[str] = []
    messages: list[Message] = []
    for role, raw in turns:
        text = clean(raw)
        if role == TOOL:
            changes[TOOL_DROPPED] += 1
        elif not normalized(text):
            changes[EMPTY_DROPPED] += 1
        elif role == SYSTEM and (messages or changes[OPENING_CUT]):
            changes[SYSTEM_DROPPED] += 1
        elif role == SYSTEM:
            system.append(text)
        elif role == ASSISTANT and not messages:
            changes[OPENING_CUT] += 1
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
            changes[MERGED] += 1
        else:
            messages.append({"role": role, "content": text})
    if messages and messages[-1]["role"] == USER and len(messages) > 1:
        messages.pop()
        changes[END_CUT] += 1
    start = [{"role": SYSTEM, "content": "\n\n".join(system)}] if system else []
    return Repaired([*start, *messages], changes)
