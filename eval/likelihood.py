"""How well a model predicts a human answer: negative log-likelihood of the answer's tokens, and of nothing else.

Prompt and answer are rendered together by the chat template, as training renders them: what a template writes before an
answer (an empty think block, a space) stands there too. They go to the server as token ids, so the span that is summed
is known exactly. A perplexity of prompt and answer together mostly measures the prompt.

Bits per byte = nll / (ln 2 * UTF-8 bytes) compares models with different tokenizers; token perplexity does not. Two
limits: a human answer is one of many good ones, and a lower value says that a model writes like the references, not
that it helps.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from counsel.chat import Message
from counsel.errors import UserError

# What vLLM's server sends for minus infinity, which JSON has no number for.
MINUS_INFINITY = -9999.0


class Span(NamedTuple):
    """Token ids of a rendered conversation up to the end of its last answer, and where that answer starts.

    text: the answer as the template renders it, which may have trimmed it.
    """

    ids: list[int]
    start: int
    text: str


class Renderer:
    """Turns messages and an answer into token ids with the base's own tokenizer and chat template."""

    def __init__(self, base: Path) -> None:
        self.base = base

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base)

    @property
    def template_sha256(self) -> str:
        """Of the chat template's text."""
        return hashlib.sha256(self.tokenizer.get_chat_template().encode()).hexdigest()

    def span(self, messages: Sequence[Message], answer: str) -> Span | None:
        """Where `answer` stands after these messages; None where the template leaves nothing of it to be found.

        The ids are those that TRL trains on, less what follows the answer. The span is every token that holds a
        character of the answer: one that template and answer share counts, and the template's own do not. Raises
        UserError when the tokenizer's ids are not training's.
        """
        whole = self._rendered(messages, answer)
        # What the template writes around any answer is what two answers without a common character share.
        one, other = (self._rendered(messages, letter) for letter in "ab")
        before = _equal_start(one, other)
        after = _equal_start(one[:before:-1], other[:before:-1])
        start, stop = before, len(whole) - after
        if whole[:start] != one[:start] or whole[stop:] != one[len(one) - after :] or start >= stop:
            return None
        # The template writes every special token: the tokenizer adds none, as in apply_chat_template.
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if ids != self.tokenizer.apply_chat_template(_turns(messages, answer), return_dict=False):
            raise UserError(f"the tokenizer at {str(self.base)!r} does not read its template's text as training does")
        inside = [at for at, (begin, end) in enumerate(offsets) if begin < stop and end > start]
        return Span(ids[: inside[-1] + 1], inside[0], whole[start:stop]) if inside else None

    def _rendered(self, messages: Sequence[Message], answer: str) -> str:
        text: str = self.tokenizer.apply_chat_template(_turns(messages, answer), tokenize=False)
        return text


def span_nll(span: Span, prompt_logprobs: Sequence[Mapping[str, Mapping[str, Any]] | None]) -> float:
    """Minus the sum of ln p over the answer's tokens, in nats.

    `prompt_logprobs` is what vLLM returns: one entry per id (the first is null), each a map from token id to its
    `logprob`. Raises UserError when entries are missing, or a token has no finite log-probability.
    """
    if len(prompt_logprobs) != len(span.ids):
        raise UserError(f"the server scored {len(prompt_logprobs)} tokens of {len(span.ids)}")
    total = 0.0
    for position in range(span.start, len(span.ids)):
        entry = prompt_logprobs[position]
        logprob = entry[str(span.ids[position])]["logprob"] if entry else None
        if logprob is None or not MINUS_INFINITY < logprob < math.inf:
            raise UserError(f"the server gives token {span.ids[position]} at position {position} no probability")
        total -= logprob
    return total


def bits_per_byte(nll_nats: float, n_bytes: int) -> float:
    """Bits that the model needs for one byte of the answer. 8 would be no model at all; English text is near 1."""
    return nll_nats / (math.log(2) * n_bytes)


def perplexity(nll_nats: float, n_tokens: int) -> float:
    """exp(nll per token); only comparable between models with the same tokenizer."""
    return math.exp(nll_nats / n_tokens)


def _turns(messages: Sequence[Message], answer: str) -> list[Message]:
    return [*messages, {"role": "assistant", "content": answer}]


def _equal_start(one: str, other: str) -> int:
    """How many characters two texts have in common from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
