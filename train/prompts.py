"""Rows as the chat template renders them: prompts, and token ids with labels for the trainer.

A reply is trained after the prompt that a server would render: the messages before it, and the generation prompt. Where
that prompt begins with the whole rendering of the reply before it, both share one sequence, and a conversation costs
one pass. Some templates render earlier turns differently from the last one (Qwen3 drops thinking blocks, Phi-3 ends
the text after the last turn). They get one sequence per reply. In both cases the trainer divides the summed loss of a
step by its number of labels, so loss and gradient are those of training the same replies one by one.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from counsel.chat import Message, conversation, prompt_messages, with_system
from counsel.errors import UserError

UNSCORED = -100
# As transformers finds them; its assistant mask covers what is rendered between such a marker and its end.
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]


class Tokens(NamedTuple):
    """One sequence for the trainer: token ids, and labels, which are the ids of scored tokens and -100 elsewhere."""

    ids: list[int]
    labels: list[int]


class TrainRows(NamedTuple):
    """Rows as the trainer takes them.

    sequences: cut at max_length; those that then have no label are left out.
    lengths: tokens of each sequence before it is cut, also of those left out.
    rows, rows_left_out: rows given, and those that lost all their replies.
    replies, replies_lost: assistant turns to train on, and those of which no token fits.
    """

    sequences: list[Tokens]
    lengths: list[int]
    rows: int
    rows_left_out: int
    replies: int
    replies_lost: int

    def examples(self) -> list[dict[str, list[int]]]:
        """The sequences as SFTTrainer takes tokenized rows."""
        return [{"input_ids": tokens.ids, "labels": tokens.labels} for tokens in self.sequences]


def examples(rows: Iterable[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """Rows of one question and one answer in TRL's prompt/completion format, for plain TRL."""
    return [
        {
            "prompt": prompt_messages(row["question"], system),
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def training_messages(row: dict[str, Any], system: str) -> list[Message]:
    """The conversation of a row. It begins with its own system message, or else with `system` unless that is empty."""
    return with_system(conversation(row), system)


def rendered_prompts(tokenizer: Any, rows: Iterable[dict[str, Any]], system: str) -> dict[str, str]:
    """{question: the prompt of its first reply as the chat template renders it}."""
    prompts = {}
    for row in rows:
        messages = training_messages(row, system)
        prompts[row["question"]] = tokenizer.apply_chat_template(
            messages[: replies(messages)[0]], tokenize=False, add_generation_prompt=True
        )
    return prompts


def replies(messages: Sequence[Message]) -> list[int]:
    """The positions of the assistant turns that answer something: those after the first user turn."""
    roles = [message["role"] for message in messages]
    return [at for at in range(roles.index("user"), len(roles)) if roles[at] == "assistant"]


def encode(tokenizer: Any, rows: Iterable[dict[str, Any]], system: str, max_length: int, turns: str) -> TrainRows:
    """Tokenize rows to train on `all` their assistant turns or on the `last`, and cut them at `max_length` tokens.

    The labels are those of TRL: of assistant_only_loss where `marks_replies`, and otherwise of a prompt and a
    completion, which is all that follows the prompt. Raises UserError if the chat template rejects a conversation.
    """
    marked = marks_replies(tokenizer)
    kept: list[Tokens] = []
    lengths: list[int] = []
    n_rows = n_left_out = n_replies = n_lost = 0
    for row in rows:
        messages = training_messages(row, system)
        at = replies(messages)
        sequences = list(_sequences(tokenizer, messages, at[-1:] if turns == "last" else at, marked))
        starts = [start for sequence in sequences for start in sequence.starts]
        fitting = sum(start < max_length for start in starts)
        kept += [
            Tokens(sequence.ids[:max_length], sequence.labels[:max_length])
            for sequence in sequences
            if sequence.starts[0] < max_length
        ]
        lengths += [len(sequence.ids) for sequence in sequences]
        n_rows, n_left_out = n_rows + 1, n_left_out + (not fitting)
        n_replies, n_lost = n_replies + len(starts), n_lost + len(starts) - fitting
    return TrainRows(kept, lengths, n_rows, n_left_out, n_replies, n_lost)


def marks_replies(tokenizer: Any) -> bool:
    """Whether the chat template marks replies with `{% generation %}`, up to and including their end of turn.

    Marks that leave out the end of turn are not used: the model would not learn to stop.
    """
    if not tokenizer.is_fast or not _MARKER.search(tokenizer.get_chat_template()):
        return False
    by_prompt, by_marks = (next(_sequences(tokenizer, _PROBE, [1], marked)) for marked in (False, True))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special.isdisjoint(by_prompt.labels) or not special.isdisjoint(by_marks.labels)


class _Sequence(NamedTuple):
    """Tokens, labels, and where the labels of each reply start."""

    ids: list[int]
    labels: list[int]
    starts: list[int]


def _sequences(tokenizer: Any, messages: Sequence[Message], at: Sequence[int], marked: bool) -> Iterator[_Sequence]:
    """The sequences that train the replies at the positions `at`, each after the prompt that a server renders."""
    last = None
    for position in at:
        prompt = _render(tokenizer, messages[:position], add_generation_prompt=True)["input_ids"]
        rendered = _render(tokenizer, messages[: position + 1], return_assistant_tokens_mask=marked)
        ids = rendered["input_ids"]
        start = _common_prefix(prompt, ids)
        labels = [UNSCORED] * start + ids[start:]
        if marked:
            # The marks before this belong to earlier replies.
            earlier = _common_prefix(_render(tokenizer, messages[:position])["input_ids"], ids)
            marks = [0] * earlier + rendered["assistant_masks"][earlier:]
            labels = [number if mark else UNSCORED for number, mark in zip(ids, marks, strict=True)]
        first = next((place for place, label in enumerate(labels) if label != UNSCORED), None)
        if first is None:
            raise UserError("the chat template renders nothing for a reply; use a base with another chat template")
        if last is not None:
            end = max(place for place, label in enumerate(last.labels) if label != UNSCORED) + 1
            if prompt[:end] == ids[:end] == last.ids[:end]:
                last = _Sequence(ids, last.labels[:end] + labels[end:], [*last.starts, first])
                continue
            yield last
        last = _Sequence(ids, labels, [first])
    if last is not None:
        yield last


def _render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    """The token ids of messages, as `input_ids`. Raises UserError if the chat template rejects them."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)
    except TemplateError as error:
        roles, reason = ", ".join(message["role"] for message in messages), " ".join(str(error).split())
        raise UserError(f"the chat template rejects a conversation with the turns {roles}: {reason}") from error


def _common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences share at their start."""
    if other[: len(one)] == one:
        return len(one)
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
