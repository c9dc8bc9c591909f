"""Rows as the trainer and the chat template see them: examples, prompts and token counts."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from counsel.chat import prompt_messages


class RowLengths(NamedTuple):
    """Token counts of rows. total: prompt and answer. scored: the answer tokens left after cutting at max_length."""

    total: list[int]
    scored: list[int]


def examples(rows: Iterable[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """Rows in TRL's prompt/completion format, which puts the loss on the completion only."""
    return [
        {
            "prompt": prompt_messages(row["question"], system),
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def rendered_prompts(tokenizer: Any, questions: Iterable[str], system: str) -> dict[str, str]:
    """{question: its prompt as the chat template renders it}."""
    return {
        question: tokenizer.apply_chat_template(
            prompt_messages(question, system), tokenize=False, add_generation_prompt=True
        )
        for question in questions
    }


def row_lengths(tokenizer: Any, rows: Sequence[dict[str, Any]], system: str, max_length: int) -> RowLengths:
    """Tokenize rows as TRL will.

    TRL tokenizes them again for training: its own masks and cuts are private, and they need a trainer with weights,
    which the checks before training do without.
    """
    totals, scored = [], []
    for example in examples(rows, system):
        prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=False)
        total = len(tokenizer.apply_chat_template(example["prompt"] + example["completion"], return_dict=False))
        totals.append(total)
        scored.append(max(0, min(total, max_length) - len(prompt)))
    return RowLengths(totals, scored)
