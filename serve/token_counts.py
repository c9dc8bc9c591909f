"""What the engine did for one request, counted where it comes out of the engine: tokens, and when they came.

Nothing is read from the reply's text, where a caller's own words stand too. So a stream that its caller cut counts to
where it was cut, several answers of one request have each their own times, and a response's first event is not taken
for its first token.
"""

import contextlib
import re
import time
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# One beam of one step of vLLM's beam search; what stands before it is the request.
_BEAM = re.compile(r"-[0-9a-f-]+-beam-\d+$")


@dataclass
class Answer:
    """One sequence of tokens: how many there are, and when the first and the last came, in `time.monotonic()`."""

    n_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass
class Tally:
    """All that one request made the engine do."""

    _prompts: dict[str, int] = field(default_factory=dict)
    answers: dict[tuple[str, int], Answer] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Tokens read, each prompt once."""
        return sum(self._prompts.values())

    @property
    def completion_tokens(self) -> int:
        """Tokens written, of all answers together."""
        return sum(answer.n_tokens for answer in self.answers.values())

    @property
    def first_s(self) -> float | None:
        """When the first token of any answer came; None as long as there is none."""
        return min((answer.first_s for answer in self.answers.values()), default=None)

    def note(self, output: Any, parts: bool) -> None:
        """Count one vLLM RequestOutput; `parts`: it holds the new tokens of each answer, not all of them."""
        prompt = _BEAM.sub("", output.request_id)
        n_prompt = len(output.prompt_token_ids or ())
        # A beam's prompt holds what was written so far; the first, shortest one is the caller's.
        self._prompts[prompt] = min(n_prompt, self._prompts.get(prompt, n_prompt))
        now_s = time.monotonic()
        for piece in output.outputs:
            if not piece.token_ids:
                continue
            answer = self.answers.setdefault((output.request_id, piece.index), Answer(first_s=now_s))
            answer.n_tokens = len(piece.token_ids) + (answer.n_tokens if parts else 0)
            answer.last_s = now_s


# Of the request that is being answered; set by the gate.
CURRENT: ContextVar[Tally | None] = ContextVar("tally", default=None)


def watch(engine_client: Any) -> None:
    """Count what comes out of vLLM's engine client for the request that asked.

    Raises, from the client's `generate`, vLLM's own VLLMValidationError where an answer could not go on within its
    grammar, which vLLM takes for a fault of its own (500).
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    generate = engine_client.generate

    async def counted(prompt: Any, sampling_params: Any, request_id: str, **named: Any) -> AsyncGenerator[Any, None]:
        tally = CURRENT.get()
        parts = sampling_params.output_kind == RequestOutputKind.DELTA
        async with contextlib.aclosing(generate(prompt, sampling_params, request_id, **named)) as outputs:
            async for output in outputs:
                if tally is not None:
                    tally.note(output, parts)
                failed = any(piece.finish_reason == "error" for piece in output.outputs)
                if failed and sampling_params.structured_outputs is not None:
                    raise VLLMValidationError(
                        "the answer could not go on: its grammar became too complex, or no token fits both the grammar "
                        "and the request's other rules (such as allowed_token_ids, bad_words, logit_bias, min_tokens)",
                        parameter="structured_outputs",
                    )
                yield output

    engine_client.generate = counted
