"""What the engine did for one request, counted at the engine's output: tokens, and when they came.

Nothing is read from the reply, which may contain a caller's own text. So a stream whose client disconnected counts up
to that moment, each answer of a request has its own times, and the first event of /v1/responses does not count as its
first token.
"""

import contextlib
import re
import time
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# The end of a request id that names one beam of one step of vLLM's beam search.
_BEAM = re.compile(r"-[0-9a-f-]+-beam-\d+$")


@dataclass
class TokenCounts:
    """One sequence of tokens: how many, and when the first and the last came, by `time.monotonic()`."""

    n_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass
class Tally:
    """Everything that one request made the engine do."""

    _prompts: dict[str, int] = field(default_factory=dict)
    answers: dict[tuple[str, int], TokenCounts] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Tokens read; each prompt counts once."""
        return sum(self._prompts.values())

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, in all answers."""
        return sum(answer.n_tokens for answer in self.answers.values())

    @property
    def first_s(self) -> float | None:
        """When the first token of any answer came; None until then."""
        return min((answer.first_s for answer in self.answers.values()), default=None)

    def add(self, output: Any, is_delta: bool) -> None:
        """Count one vLLM RequestOutput; `is_delta`: it holds only the new tokens of each answer."""
        prompt = _BEAM.sub("", output.request_id)
        n_prompt = len(output.prompt_token_ids or ())
        # A beam's prompt includes what was generated so far; the first and shortest is the caller's.
        self._prompts[prompt] = min(n_prompt, self._prompts.get(prompt, n_prompt))
        now_s = time.monotonic()
        for piece in output.outputs:
            if not piece.token_ids:
                continue
            answer = self.answers.setdefault((output.request_id, piece.index), TokenCounts(first_s=now_s))
            answer.n_tokens = len(piece.token_ids) + (answer.n_tokens if is_delta else 0)
            answer.last_s = now_s


# Of the request that is being answered; set by the gateway.
CURRENT: ContextVar[Tally | None] = ContextVar("tally", default=None)


def watch(engine_client: Any) -> None:
    """Wrap vLLM's engine client so that its output is counted for the current request.

    The client's `generate` then also raises VLLMValidationError (400) when an answer cannot continue within its
    grammar, which vLLM would report as its own fault (500).
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    generate = engine_client.generate

    async def counted(prompt: Any, sampling_params: Any, request_id: str, **named: Any) -> AsyncGenerator[Any, None]:
        tally = CURRENT.get()
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        async with contextlib.aclosing(generate(prompt, sampling_params, request_id, **named)) as outputs:
            async for output in outputs:
                if tally is not None:
                    tally.add(output, is_delta)
                failed = any(piece.finish_reason == "error" for piece in output.outputs)
                if failed and sampling_params.structured_outputs is not None:
                    raise VLLMValidationError(
                        "the answer could not continue: its grammar became too complex, or no token fits both it "
                        "and the request's other rules (such as allowed_token_ids, bad_words, logit_bias, min_tokens)",
                        parameter="structured_outputs",
                    )
                yield output

    engine_client.generate = counted
