"""Preference pairs: a prompt, the answer that was chosen, and the one that was not; read, cleaned and split.

These forms are read, by their keys; prompts and answers are text or lists of {role, content}:

| form | keys |
|---|---|
| TRL, and votes.jsonl | `prompt`, `chosen`, `rejected`; or the last two alone, each a whole conversation |
| OpenAI | `input.messages`, `preferred_output`, `non_preferred_output` |
| UltraFeedback | `instruction`, `completions` with `response` and `overall_score`: the best against the worst |

    pairs, report = read_preferences("votes.jsonl")
    train, held_out = split(pairs, 0.2, seed=0)
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from counsel.chat import Message
from counsel.contacts import mask
from counsel.errors import UserError
from train.cleaning import question_id
from train.sources import load


class Preference(NamedTuple):
    """One preference. prompt: messages that end with the person's turn. question_id: of the first user turn."""

    question_id: str
    prompt: list[Message]
    chosen: str
    rejected: str

    def document(self) -> dict[str, Any]:
        """The pair in TRL's form."""
        answers = {"chosen": self.chosen, "rejected": self.rejected}
        return {
            "question_id": self.question_id,
            "prompt": self.prompt,
            **{key: [{"role": "assistant", "content": text}] for key, text in answers.items()},
        }

    def with_system(self, system: str) -> "Preference":
        """The pair as it is trained: with `system`, unless that is empty or the prompt has its own."""
        if not system or self.prompt[0]["role"] == "system":
            return self
        return self._replace(prompt=[{"role": "system", "content": system}, *self.prompt])


@dataclass(frozen=True)
class PreferenceReport:
    """What happened to every row, in counts. dropped: rows by reason. masked: pairs in which a contact was masked."""

    source: str
    revision: str
    source_sha256: str
    read_as: str
    rows_in: int
    pairs: int
    dropped: dict[str, int]
    masked: int

    def __str__(self) -> str:
        lines = [f"data         {self.source} (sha256 {self.source_sha256[:12]})", f"read as      {self.read_as}"]
        lines += [f"rows in      {self.rows_in:>7,}"]
        lines += [f"  dropped    {n:>7,}  {reason}" for reason, n in self.dropped.items()]
        lines += [f"pairs        {self.pairs:>7,}"]
        return "\n".join(lines)


class _Unusable(Exception):
    """Why a row is no preference pair."""


def read_preferences(data: str, revision: str = "") -> tuple[list[Preference], PreferenceReport]:
    """Read the pairs of a file or hub data set, mask contacts, and drop what trains nothing.

    Raises UserError if the source cannot be read or has no usable pair.
    """
    source = load(data, revision)
    dropped: Counter[str] = Counter()
    pairs: dict[tuple[Any, ...], Preference] = {}
    masked = 0
    for row in source.rows:
        try:
            raw = _read_pair(row)
        except _Unusable as error:
            dropped[str(error)] += 1
            continue
        pair = _masked(raw)
        key = (tuple((turn["role"], turn["content"]) for turn in pair.prompt), pair.chosen, pair.rejected)
        if pair.chosen == pair.rejected:
            dropped["both answers are the same"] += 1
        elif key in pairs:
            dropped["duplicate"] += 1
        else:
            pairs[key] = pair
            masked += pair != raw
    if not pairs:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common())
        raise UserError(
            f"no row of {data!r} is a preference pair; dropped: {reasons}; "
            "docs/training.md lists the forms that are read"
        )
    report = PreferenceReport(
        source=data,
        revision=source.revision,
        source_sha256=source.sha256,
        read_as=source.read_as,
        rows_in=len(source.rows),
        pairs=len(pairs),
        dropped=dict(dropped.most_common()),
        masked=masked,
    )
    return list(pairs.values()), report


def split(
    pairs: Sequence[Preference], held_out_share: float, seed: int, held_out_questions: Collection[str] = ()
) -> tuple[list[Preference], list[Preference]]:
    """Training pairs and held-out pairs. No question is in both, so no prompt is, nor a later turn of its conversation.

    Seed and question alone decide, as for conversations; held_out_questions (ids) are never trained on. Raises
    UserError if either side is empty.
    """
    train: list[Preference] = []
    held_out: list[Preference] = []
    for pair in pairs:
        digest = hashlib.sha256(f"{seed} {pair.question_id}".encode()).digest()
        held = pair.question_id in held_out_questions or int.from_bytes(digest[:8]) / 2**64 < held_out_share
        (held_out if held else train).append(pair)
    if not train or not held_out:
        questions = len({pair.question_id for pair in pairs})
        raise UserError(
            f"the {'held-out' if train else 'training'} side is empty with {len(pairs)} pairs on {questions} questions"
            "; give more pairs, or another split_seed or held_out_share"
        )
    return train, held_out


def one_per_question(pairs: Sequence[Preference]) -> list[Preference]:
    """The first pair of each question: these are independent of each other."""
    return list({pair.question_id: pair for pair in reversed(pairs)}.values())[::-1]


def _read_pair(row: dict[str, Any]) -> Preference:
    """A row in any of the forms. Raises _Unusable with the reason."""
    chosen_key, rejected_key = "chosen", "rejected"
    prompt = row.get("prompt")
    if row.get("preferred_output") is not None:
        given = row.get("input")
        prompt = given.get("messages") if isinstance(given, dict) else given
        chosen_key, rejected_key = "preferred_output", "non_preferred_output"
    elif row.get("completions") is not None:
        prompt = row.get("instruction")
        row = _best_and_worst(row["completions"])
    elif row.get("chosen") is None and row.get("completion") is not None:
        raise _Unusable("a verdict on one answer, which is no pair")
    elif row.get("chosen") is None and "consent" in row:
        raise _Unusable("a vote without text (no consent, or a tie)")
    chosen = _messages(row.get(chosen_key), "assistant")
    rejected = _messages(row.get(rejected_key), "assistant")
    turns = _messages(prompt, "user") if prompt is not None else []
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        # Whole conversations: their shared beginning is the prompt, also where a `prompt` repeats a part of it.
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        turns, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for answer in (chosen, rejected):
        if [turn["role"] for turn in answer] != ["assistant"]:
            raise _Unusable("an answer is not one assistant turn")
        if not answer[0]["content"].strip():
            raise _Unusable("an answer is empty")
    _check_prompt(turns)
    first = next(turn["content"] for turn in turns if turn["role"] == "user")
    return Preference(question_id(first), turns, chosen[0]["content"].strip(), rejected[0]["content"].strip())


def _best_and_worst(completions: Any) -> dict[str, Any]:
    """UltraFeedback's rated answers as a pair: the highest overall_score against the lowest."""
    rated = [
        (float(answer["overall_score"]), answer.get("response"))
        for answer in (completions if isinstance(completions, list) else [])
        if isinstance(answer, dict) and isinstance(answer.get("overall_score"), int | float)
    ]
    if len(rated) < 2:
        raise _Unusable("fewer than two rated answers")
    best, worst = max(rated, key=lambda one: one[0]), min(rated, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise _Unusable("all answers have the same score")
    return {"chosen": best[1], "rejected": worst[1]}


def _messages(value: Any, role: str) -> list[Message]:
    """Text as one turn of `role`, or a list of turns. Raises _Unusable for anything else."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise _Unusable(f"no {'prompt' if role == 'user' else 'chosen and rejected answer'}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise _Unusable("a turn is not of role system, user or assistant")
        content = turn.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise _Unusable("a turn is not text")
        turns.append({"role": turn["role"], "content": content})
    return turns


def _check_prompt(turns: Sequence[Message]) -> None:
    """An optional system turn, then user and assistant in turn, the user first and last, none empty."""
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise _Unusable("no prompt")
    if len(spoken) % 2 == 0 or spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise _Unusable("the prompt's turns do not alternate and end with the person's")
    if not all(turn["content"].strip() for turn in turns):
        raise _Unusable("a turn of the prompt is empty")


def _masked(pair: Preference) -> Preference:
    turns = [{"role": turn["role"], "content": mask(turn["content"])} for turn in pair.prompt]
    return Preference(pair.question_id, turns, mask(pair.chosen), mask(pair.rejected))
