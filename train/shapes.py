"""Recognizes the shapes of conversations that people's files have, by columns and values.

| shape | columns |
|---|---|
| messages | a list of turns: `role` and `content` (OpenAI), `from` and `value` (ShareGPT), `speaker` and `text` |
| Alpaca | `instruction`, `output`, perhaps `input` |
| prompt and completion | `prompt`, `completion` (text or lists of turns) |
| question and answer | `question`, `answer` |
| intents | lists of `patterns` and `responses` under a `tag` |
"""

import ast
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from counsel.errors import UserError
from train.turns import ASSISTANT, SYSTEM, TOOL, USER, Turn

RawRow = Mapping[str, Any]
# The conversations of a row, which also has a name for errors (`row 7`).
Reader = Callable[[RawRow, str], Iterator[list[Turn]]]

_ROLES = {
    SYSTEM: ("system", "developer"),
    USER: ("user", "human", "usr", "prompter", "seeker", "client", "patient", "person", "customer", "speaker"),
    ASSISTANT: ("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model", "supporter", "helper", "listener",
                "counselor", "counsellor", "agent", "sys"),
    TOOL: ("tool", "tools", "function", "function_call", "tool_call", "tool_response", "observation", "ipython"),
}  # fmt: skip
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_TEXT_KEYS = ("content", "value", "text", "message", "utterance")
# Where a file has several lists of turns, the first of these names wins.
_TURN_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_PAIRS = (
    ("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("input", "output"),
)  # fmt: skip
# Rows that are read to recognize a column of turns.
_SAMPLE_ROWS = 20


class Shape(NamedTuple):
    """What a file's rows are, in words, and the conversations of a row: each a list of turns.

    turns: takes a row and its name for errors (`row 7`). Raises UserError for a value that is not text.
    topic: the column with the topic, where the shape has one of its own.
    """

    described: str
    turns: Reader
    topic: str = ""


def pairs(question: str, answer: str, described: str = "") -> Shape:
    """One question and one answer per row, in the columns of these names."""

    def turns(row: RawRow, where: str) -> Iterator[list[Turn]]:
        yield [Turn(role, as_text(row.get(column), column, where))
               for role, column in ((USER, question), (ASSISTANT, answer))]  # fmt: skip

    return Shape(described, turns)


def recognized(rows: Sequence[RawRow], columns: Sequence[str]) -> Shape | None:
    """The shape of `rows` by their columns and values; None if it is none of those above."""
    by_name = {folded(column): column for column in columns}
    system = next((by_name[name] for name in _SYSTEM_COLUMNS if name in by_name), None)
    if column := _column_of_turns(rows, columns):
        first = next(turns for row in rows[:_SAMPLE_ROWS] if (turns := _list_of_turns(row.get(column))))
        keys = " and ".join(map(repr, _keys(first[0]) or ()))
        described = f"conversations in {column!r}, turns of {keys}"
        if "question" not in by_name or "answer" not in by_name:
            return Shape(described, _from_turns(column, system))
        # The rows of a run's data folder: those of one exchange have no messages.
        pair = _from_pair(by_name["question"], by_name["answer"], system)
        return Shape(f"{described}; where empty, 'question' and 'answer'", _from_turns(column, system, pair))
    if "patterns" in by_name and "responses" in by_name:
        return Shape("intents: each of 'patterns' with one of 'responses'", _from_intents(by_name),
                     by_name.get("tag", ""))  # fmt: skip
    for user, assistant in _PAIRS:
        if user in by_name and assistant in by_name:
            names = by_name[user], by_name[assistant]
            if user == "instruction" and "input" in by_name:
                return _alpaca(rows, *names, by_name["input"], system)
            prefix = "Alpaca, " if (user, assistant) == ("instruction", "output") else ""
            described = f"{prefix}{names[0]!r} as the question, {names[1]!r} as the answer"
            return Shape(_with_system(described, system), _from_pair(*names, system))
    return None


def _column_of_turns(rows: Sequence[RawRow], columns: Sequence[str]) -> str | None:
    """The column that holds lists of turns. The halves of a prompt and completion are not such a column."""
    found = [
        column
        for column in columns
        if folded(column) not in ("prompt", "completion", "chosen", "rejected")
        and any(is_conversation(row.get(column)) for row in rows[:_SAMPLE_ROWS])
    ]
    ranks = {name: rank for rank, name in enumerate(_TURN_COLUMNS)}
    return min(found, key=lambda column: ranks.get(folded(column), len(ranks)), default=None)


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of turns, one of them in a known role."""
    return any(_role(turn) for turn in _list_of_turns(value))


def _list_of_turns(value: Any) -> list[Mapping[str, Any]]:
    """`value` as a list of turns, also if it is the text of one (from a table); empty if it is something else."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            # pandas writes lists to a table as Python does: [{'role': 'user'}].
            value = ast.literal_eval(value.strip()) if value.lstrip().startswith("[{'") else json.loads(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
    is_turns = isinstance(value, list) and value and all(isinstance(turn, Mapping) and _keys(turn) for turn in value)
    return value if is_turns else []


def _keys(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of a turn's speaker and text."""
    role = next((key for key in _ROLE_KEYS if key in turn), None)
    text = next((key for key in _TEXT_KEYS if key in turn), None)
    if role and (text or "tool_calls" in turn):
        return role, text or _TEXT_KEYS[0]
    return None


def _role(turn: Mapping[str, Any]) -> str | None:
    """The role that a turn's speaker means."""
    keys = _keys(turn)
    speaker = turn[keys[0]] if keys else None
    return _ROLE_OF.get(folded(speaker)) if isinstance(speaker, str) else None


def _read_turns(value: Any, column: str, where: str) -> list[Turn]:
    if value is None or value == [] or value == "" or (isinstance(value, float) and math.isnan(value)):
        return []
    turns = _list_of_turns(value)
    if not turns:
        raise UserError(
            f"{where}: {column} is {str(value)[:40]!r}; it must be a list of turns such as "
            '{"role": "user", "content": "..."}'
        )
    return [_read_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: Mapping[str, Any], where: str) -> Turn:
    keys = _keys(turn)
    assert keys is not None  # _list_of_turns checked it
    role, content = _role(turn), turn.get(keys[1])
    if role is None:
        raise UserError(f"{where}: {keys[0]} is {str(turn[keys[0]])[:40]!r}; it must be system, user, assistant or "
                        "tool (or human, gpt and the like)")  # fmt: skip
    if isinstance(content, list):  # OpenAI's content parts
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: {keys[1]} has a part that is not text; only text can be trained on")
        content = "\n\n".join(map(str, parts))
    text = as_text(content, keys[1], where)
    # A request for a tool has no words of its own.
    return Turn(TOOL if not text.strip() and turn.get("tool_calls") else role, text)


def _from_turns(column: str, system: str | None, otherwise: Reader | None = None) -> Reader:
    """otherwise: reads the rows that have no turns there."""

    def turns(row: RawRow, where: str) -> Iterator[list[Turn]]:
        if otherwise and not row.get(column):
            yield from otherwise(row, where)
            return
        yield [*_system_turns(row, system, where), *_read_turns(row.get(column), column, where)]

    return turns


def _from_pair(user: str, assistant: str, system: str | None) -> Reader:
    """Each half is text, or a list of turns (TRL's conversational prompt and completion)."""

    def half(row: RawRow, column: str, role: str, where: str) -> list[Turn]:
        value = row.get(column)
        if isinstance(value, list):
            return _read_turns(value, column, where)
        return [Turn(role, as_text(value, column, where))]

    def turns(row: RawRow, where: str) -> Iterator[list[Turn]]:
        yield [
            *_system_turns(row, system, where),
            *half(row, user, USER, where),
            *half(row, assistant, ASSISTANT, where),
        ]

    return turns


def _alpaca(rows: Iterable[RawRow], instruction: str, output: str, extra: str, system: str | None) -> Shape:
    """Instruction and input as the question.

    In many sets, each row with an input repeats one instruction ("Answer kindly"): that one is the system message.
    """
    repeated: set[Any] = set()
    n_with_input = 0
    for row in rows:
        if row.get(extra):
            n_with_input += 1
            repeated.add(str(row.get(instruction)))
            if len(repeated) > 1:
                break
    is_system = len(repeated) == 1 and n_with_input > 1

    def turns(row: RawRow, where: str) -> Iterator[list[Turn]]:
        task, given = as_text(row.get(instruction), instruction, where), as_text(row.get(extra), extra, where)
        asked = [Turn(SYSTEM, task), Turn(USER, given)] if is_system else [Turn(USER, f"{task}\n\n{given}")]
        answer = Turn(ASSISTANT, as_text(row.get(output), output, where))
        yield [*_system_turns(row, system, where), *(asked if given.strip() else [Turn(USER, task)]), answer]

    question = f"{extra!r} as the question, the one {instruction!r} as the system message" if is_system else (
        f"{instruction!r} and {extra!r} as the question")  # fmt: skip
    return Shape(_with_system(f"Alpaca, {question}, {output!r} as the answer", system), turns)


def _from_intents(by_name: Mapping[str, str]) -> Reader:
    def texts(row: RawRow, column: str, where: str) -> list[str]:
        value = row.get(column) or []
        return [as_text(item, column, where) for item in (value if isinstance(value, list) else [value])]

    def turns(row: RawRow, where: str) -> Iterator[list[Turn]]:
        patterns, responses = texts(row, by_name["patterns"], where), texts(row, by_name["responses"], where)
        for at in range(max(len(patterns), len(responses)) if patterns and responses else 0):
            yield [Turn(USER, patterns[at % len(patterns)]), Turn(ASSISTANT, responses[at % len(responses)])]

    return turns


def _system_turns(row: RawRow, system: str | None, where: str) -> list[Turn]:
    text = as_text(row.get(system), system, where) if system else ""
    return [Turn(SYSTEM, text)] if text.strip() else []


def _with_system(described: str, system: str | None) -> str:
    return f"{described}, {system!r} as the system message" if system else described


def as_text(value: Any, column: str, where: str) -> str:
    """A value that must be text. An absent one (also NaN, from pandas) is empty. Raises UserError otherwise."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column} is {type(value).__name__} {str(value)[:40]!r}; it must be text")
    return value


def folded(column: str) -> str:
    """A name without regard to case and outer spaces."""
    return unicodedata.normalize("NFKC", column).strip().casefold()


def as_label(value: Any) -> str:
    """A topic as text: strings, numbers and lists of them; anything else gives an empty topic."""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(as_label, value)))
    isas_label = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return str(value) if isas_label else ""
