"""How well a model predicts a human answer: negative log-likelihood of the answer's tokens, and of nothing else.

The prompt and the answer go to the server as token ids, so no template or special token can slip in between, and the
span that is summed is known exactly. A perplexity of prompt and answer together mostly measures the prompt.

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

from train.chat import Message
from train.errors import UserError

# What vLLM's server sends for minus infinity, which JSON has no number for.
MINUS_INFINITY = -9999.0


class Span(NamedTuple):
    """Token ids of prompt and answer together, and where the answer starts."""

    ids: list[int]
    start: int


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

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that a chat request with these messages becomes, up to where the answer starts."""
        text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text

    def span(self, messages: Sequence[Message], answer: str) -> Span | None:
        """Where `answer` stands after these messages; None where a token would straddle prompt and answer.

        The template writes every special token, so the tokenizer adds none: a second <bos> would change every value.
        """
        prefix_text = self.prompt(messages)
        prefix = self.tokenizer(prefix_text, add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(prefix_text + answer, add_special_tokens=False)["input_ids"]
        return Span(ids, len(prefix)) if ids[: len(prefix)] == prefix and len(ids) > len(prefix) else None


def span_nll(span: Span, prompt_logprobs: Sequence[Mapping[str, Mapping[str, Any]] | None]) -> float:
    """Minus the sum of ln p over the answer's tokens, in nats.

    `prompt_logprobs` is what vLLM returns: one entry per id (the first is null), each a map from token id to its
    `logprob`. Raises UserError when entries are missing or a token has probability zero.
    """
    if len(prompt_logprobs) != len(span.ids):
        raise UserError(f"the server scored {len(prompt_logprobs)} tokens of {len(span.ids)}")
    total = 0.0
    for position in range(span.start, len(span.ids)):
        entry = prompt_logprobs[position]
        logprob = entry[str(span.ids[position])]["logprob"] if entry else MINUS_INFINITY
        if logprob <= MINUS_INFINITY:
            raise UserError(f"the server gives token {span.ids[position]} at position {position} no probability")
        total -= logprob
    return total


def bits_per_byte(nll_nats: float, n_bytes: int) -> float:
    """Bits that the model needs for one byte of the answer. 8 would be no model at all; English text is near 1."""
    return nll_nats / (math.log(2) * n_bytes)


def perplexity(nll_nats: float, n_tokens: int) -> float:
    """exp(nll per token); only comparable between models with the same tokenizer."""
    return math.exp(nll_nats / n_tokens)
