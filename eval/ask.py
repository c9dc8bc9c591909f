"""Ask a server for every answer and every likelihood an evaluation needs: bounded concurrency, retries, resume.

One arm at a time: no answer then shares a batch with another model's, so none can depend on how a server keeps
adapters apart in a batch, and an adapter stays loaded while it is asked.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import openai

from counsel.errors import UserError
from eval.arms import Arm, ServerModels, messages
from eval.config import EvalConfig
from eval.likelihood import Renderer, Span, span_nll
from eval.samples import NOT_RENDERED, TOO_LONG, Row, RowLog

ATTEMPTS = 4
NO_CHOICE = "the server's reply holds no message"
_TRIED_AGAIN = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)


class Question(NamedTuple):
    """A held-out question with its reference answers."""

    question_id: str
    question: str
    topic: str
    answers: tuple[str, ...]


class EvalInputs(NamedTuple):
    """What every arm is asked: the questions, the run's system prompt, and the examples that few-shot arms see."""

    questions: list[Question]
    system: str
    examples: list[dict[str, Any]]


class Outcome(NamedTuple):
    """What one request came to after its retries: a response or an error, never both."""

    response: Any
    error: str | None
    attempts: int
    latency_s: float


async def ask_arm(
    client: openai.AsyncOpenAI,
    arm: Arm,
    inputs: EvalInputs,
    renderer: Renderer,
    server_models: ServerModels,
    config: EvalConfig,
    samples: RowLog,
    likelihoods: RowLog,
    progress: "Progress",
) -> None:
    """Append every row of one arm that the two logs lack."""
    model = server_models.exact(arm.model)

    async def answer(question: Question, sample: int) -> None:
        outcome = await attempt(
            lambda: client.chat.completions.create(
                model=model,
                messages=messages(arm, question.question, inputs.system, inputs.examples),  # type: ignore[arg-type]
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed + sample,
            )
        )
        row: Row = {"arm": arm.name, "question_id": question.question_id, "sample": sample}
        samples.append(row | sample_fields(outcome))
        progress.step(arm.name)

    async def likelihood(question: Question, index: int) -> None:
        text = question.answers[index]
        span = renderer.span(messages(arm, question.question, inputs.system, inputs.examples), text)
        outcome: Outcome | None = None
        if span is not None and len(span.ids) < server_models.max_model_len:
            outcome = await attempt(
                lambda: client.completions.create(
                    model=model, prompt=span.ids, max_tokens=1, extra_body={"prompt_logprobs": 0}
                )
            )
        row: Row = {"arm": arm.name, "question_id": question.question_id, "answer": index}
        likelihoods.append(row | likelihood_fields(text, span, outcome))
        progress.step(arm.name)

    questions = inputs.questions
    todo = [
        partial(likelihood, question, index)
        for question in questions
        for index in range(min(len(question.answers), config.references))
        if (arm.name, question.question_id, index) not in likelihoods.done
    ] + [
        partial(answer, question, sample)
        for question in questions
        for sample in range(config.samples)
        if (arm.name, question.question_id, sample) not in samples.done
    ]
    await run_bounded(todo, config.concurrency)


def likelihood_fields(answer: str, span: Span | None, outcome: Outcome | None) -> Row:
    """The fields of a likelihood.jsonl row; `outcome` is None when nothing was sent."""
    row: Row = {"nll_nats": None, "tokens": None, "bytes": len(answer.encode()), "attempts": 0, "error": None}
    if span is None:
        return row | {"error": NOT_RENDERED}
    row["bytes"] = len(span.text.encode())
    if outcome is None:
        return row | {"error": TOO_LONG}
    row |= {"attempts": outcome.attempts, "error": outcome.error}
    if outcome.error is None:
        try:
            row["nll_nats"] = span_nll(span, getattr(_first_choice(outcome.response), "prompt_logprobs", None) or [])
        except UserError as error:
            # Of this answer only: one token that a model rules out does not end the evaluation.
            return row | {"error": str(error)}
        row["tokens"] = len(span.ids) - span.start
    return row


def sample_fields(outcome: Outcome) -> Row:
    """The fields of a samples.jsonl row that one chat completion fills."""
    fields: Row = {"text": "", "finish_reason": None, "prompt_tokens": None, "completion_tokens": None}
    error = outcome.error
    if error is None:
        choice, usage = _first_choice(outcome.response), getattr(outcome.response, "usage", None)
        error = None if getattr(choice, "message", None) else NO_CHOICE
    if error is None:
        fields = {
            "text": (choice.message.content or "").strip(),
            "finish_reason": choice.finish_reason,
            # Not every server counts them.
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
        }
    return fields | {
        "latency_s": round(outcome.latency_s, 4),
        "attempts": outcome.attempts,
        "error": error,
    }


def _first_choice(response: Any) -> Any:
    """The only choice of a reply, None where it has none: the SDK passes on whatever a server sends with status 200."""
    choices = getattr(response, "choices", None)
    return choices[0] if choices else None


async def attempt(request: Callable[[], Awaitable[Any]]) -> Outcome:
    """Send a request, again after a lost connection, a time-out, 429 or 5xx: up to 4 times, 0.5, 1, 2 s apart.

    A refusal (another 4xx) is final. A server that cannot be reached at all ends the evaluation with UserError: going
    on would only fill the log with errors, and the same command continues later.
    """
    for number in range(1, ATTEMPTS + 1):
        started = time.perf_counter()
        try:
            response = await request()
            return Outcome(response, None, number, time.perf_counter() - started)
        except openai.APIError as error:
            latency_s = time.perf_counter() - started
            if number < ATTEMPTS and isinstance(error, _TRIED_AGAIN):
                await asyncio.sleep(0.5 * 2 ** (number - 1))
                continue
            if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
                raise UserError(
                    f"the server at {error.request.url} stopped answering; start it and give the same command again: "
                    "what is done is kept"
                ) from error
            return Outcome(None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", number, latency_s)
    raise AssertionError("unreachable: the last attempt returns or raises")


async def server_version(client: openai.AsyncOpenAI) -> str | None:
    """What vLLM's `GET /version` says, which stands beside `/v1`; None from a server that has no such route.

    Raises openai.APIConnectionError when nobody answers.
    """
    try:
        found: Any = await client.get(str(client.base_url.join("/version")), cast_to=object)
    except openai.APIStatusError:
        return None
    return str(found["version"]) if isinstance(found, dict) and "version" in found else None


async def run_bounded(todo: Sequence[Callable[[], Awaitable[None]]], concurrency: int) -> None:
    """Run the jobs in order, `concurrency` at a time; the first exception cancels the rest and is raised."""
    pending = iter(todo)

    async def worker() -> None:
        for job in pending:
            await job()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(todo))):
                group.create_task(worker())
    except* UserError as errors:
        raise errors.exceptions[0] from None


class Progress:
    """One line on stderr: rows done, the arm at work, and the time left at the pace so far."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._first, self._started, self._shown = done, time.monotonic(), 0.0
        self._live = sys.stderr.isatty()

    def step(self, arm: str) -> None:
        """Count one row of `arm`; print at most once a second on a terminal, every ten seconds elsewhere."""
        self.done += 1
        now = time.monotonic()
        if now - self._shown < (1 if self._live else 10) and self.done < self.total:
            return
        self._shown = now
        left_s = (now - self._started) / (self.done - self._first) * (self.total - self.done)
        line = f"{self.done}/{self.total} rows, {left_s:.0f} s left, asking {arm}"
        end = "\n" if self.done == self.total or not self._live else ""
        print(f"\r{line:<70}" if self._live else line, end=end, file=sys.stderr, flush=True)
