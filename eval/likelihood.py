"""How well a model predicts a reference answer: the negative log-likelihood (NLL) of the answer's tokens alone.

The chat template renders prompt and answer together, as in training, with everything that it writes before an answer
(an empty think block, a space). The server gets token ids, so the summed span is known exactly. A perplexity over
prompt and answer would mostly measure the prompt.

Bits per byte = NLL / (ln 2 * UTF-8 bytes) is comparable between models with different tokenizers; perplexity per token
is not. Two limits: a reference is one of many good answers, and a lower value means that a model writes like the
references, not that it helps.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from counsel.chat import Message
from counsel.errors import UserError

# What vLLM's server sends for minus infinity, which JSON cannot express.
MINUS_INFINITY = -9999.0


class Span(NamedTuple):
    """Token ids of a rendered conversation up to the end of its last answer, and the index where that answer starts.

    text: the answer as the template renders it; some templates trim it.
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
        """The hash of the chat template."""
        return hashlib.sha256(self.tokenizer.get_chat_template().encode()).hexdigest()

    def span(self, messages: Sequence[Message], answer: str) -> Span | None:
        """The tokens of `answer` after these messages; None if it cannot be found in what the template renders.

        None also if the template rejects the messages, such as a conversation that the assistant opens.

        The ids are those that TRL trains on, without those after the answer. The span covers every token with a
        character of the answer, including tokens shared with the template. Raises UserError if the tokenizer gives
        other ids than in training.
        """
        from jinja2 import TemplateError

        try:
            whole = self._rendered(messages, answer)
        except TemplateError:
            return None
        # Two answers without a common character show what the template writes around any answer.
        one, other = (self._rendered(messages, letter) for letter in "ab")
        before = _common_prefix(one, other)
        after = _common_prefix(one[:before:-1], other[:before:-1])
        start, stop = before, len(whole) - after
        if whole[:start] != one[:start] or whole[stop:] != one[len(one) - after :] or start >= stop:
            return None
        # The template writes all special tokens; as in apply_chat_template, the tokenizer adds none.
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if ids != self.tokenizer.apply_chat_template(_turns(messages, answer), return_dict=False):
            raise UserError(
                f"the tokenizer at {str(self.base)!r} tokenizes its chat template's text differently from training"
            )
        inside = [at for at, (begin, end) in enumerate(offsets) if begin < stop and end > start]
        return Span(ids[: inside[-1] + 1], inside[0], whole[start:stop]) if inside else None

    def _rendered(self, messages: Sequence[Message], answer: str) -> str:
        text: str = self.tokenizer.apply_chat_template(_turns(messages, answer), tokenize=False)
        return text


def span_nll(span: Span, prompt_logprobs: Sequence[Mapping[str, Mapping[str, Any]] | None]) -> float:
    """Minus the sum of ln p over the answer's tokens, in nats.

    `prompt_logprobs` is vLLM's: one entry per id, each a map from token id to `logprob`; the first is null. Raises
    UserError if entries are missing, or a token has no finite log-probability.
    """
    if len(prompt_logprobs) != len(span.ids):
        raise UserError(f"the server returned log-probabilities for {len(prompt_logprobs)} of {len(span.ids)} tokens")
    total = 0.0
    for position in range(span.start, len(span.ids)):
        entry = prompt_logprobs[position]
        logprob = entry[str(span.ids[position])]["logprob"] if entry else None
        if logprob is None or not MINUS_INFINITY < logprob < math.inf:
            raise UserError(f"the server returned no probability for token {span.ids[position]} at position {position}")
        total -= logprob
    return total


def bits_per_byte(nll_nats: float, n_bytes: int) -> float:
    """Bits per byte of the answer. Random bytes need 8; English text needs about 1."""
    return nll_nats / (math.log(2) * n_bytes)


def _turns(messages: Sequence[Message], answer: str) -> list[Message]:
    return [*messages, {"role": "assistant", "content": answer}]


def _common_prefix(one: str, other: str) -> int:
    """How many characters two strings have in common from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
