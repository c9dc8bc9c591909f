"""Ask a server for the answers and likelihoods of an evaluation, one arm at a time.

With one arm at a time no answer shares a batch with another model's, so no answer depends on how a server separates
adapters within a batch, and an adapter stays loaded while it is asked.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import openai

from counsel.chat import Message
from counsel.client import ServerModels
from counsel.errors import UserError
from eval.arms import Arm, history, messages
from eval.config import EvalConfig
from eval.conversations import HeldOutReply
from eval.likelihood import Renderer, Span, span_nll
from eval.questions import Question, planned_rows
from eval.requests import Outcome, Progress, attempt, run_bounded
from eval.samples import NOT_RENDERED, TOO_LONG, Row, RowLog

NO_CHOICE = "the server's reply has no message"


class EvalInputs(NamedTuple):
    """What every arm is asked: the questions, the run's system prompt, and the examples that few-shot arms see.

    replies: those of held-out conversations, whose likelihood is measured too.
    """

    questions: list[Question]
    system: str
    examples: list[dict[str, Any]]
    replies: list[HeldOutReply]


@dataclass(frozen=True)
class Asker:
    """Asks one server, and appends a row to `samples`, `likelihoods` or `turns` per reply.

    turns: None where there are no held-out conversations.
    """

    client: openai.AsyncOpenAI
    server_models: ServerModels
    renderer: Renderer
    inputs: EvalInputs
    config: EvalConfig
    samples: RowLog
    likelihoods: RowLog
    turns: RowLog | None
    progress: Progress

    async def ask(self, arm: Arm) -> None:
        """Append the rows of one arm that the logs lack, likelihoods first."""
        config, questions = self.config, {question.question_id: question for question in self.inputs.questions}
        planned = planned_rows([arm.name], self.inputs.questions, config.samples, config.references)
        jobs = [
            partial(measure, arm, questions[question_id], number)
            for measure, log, keys in (
                (self._likelihood, self.likelihoods, planned.likelihoods),
                (self._answer, self.samples, planned.samples),
            )
            for _, question_id, number in (key for key in keys if key not in log.done)
        ]
        if self.turns is not None:
            jobs += [
                partial(self._turn, self.turns, arm, reply)
                for reply in self.inputs.replies
                if reply.key(arm.name) not in self.turns.done
            ]
        await run_bounded(jobs, config.concurrency)

    async def _answer(self, arm: Arm, question: Question, sample: int) -> None:
        penalty = self.config.repetition_penalty
        outcome = await attempt(
            lambda: self.client.chat.completions.create(
                model=self.server_models.exact(arm.model),
                messages=self._messages(arm, question),  # type: ignore[arg-type]
                max_tokens=self.config.max_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=self.config.seed + sample,
                extra_body={"repetition_penalty": penalty} if penalty > 1 else None,
            )
        )
        row: Row = {"arm": arm.name, "question_id": question.question_id, "sample": sample}
        self.samples.append(row | sample_fields(outcome))
        self.progress.step(arm.name)

    async def _likelihood(self, arm: Arm, question: Question, index: int) -> None:
        row: Row = {"arm": arm.name, "question_id": question.question_id, "answer": index}
        fields = await self._measured(arm, self._messages(arm, question), question.answers[index])
        self.likelihoods.append(row | fields)
        self.progress.step(arm.name)

    async def _turn(self, log: RowLog, arm: Arm, reply: HeldOutReply) -> None:
        row: Row = {"arm": arm.name, "question_id": reply.question_id, "answer": reply.answer, "turn": reply.turn}
        before = history(arm, reply.history, self.inputs.system, self.inputs.examples)
        log.append(row | await self._measured(arm, before, reply.text))
        self.progress.step(arm.name)

    async def _measured(self, arm: Arm, before: list[Message], answer: str) -> Row:
        """The likelihood of `answer` after these messages: see likelihood_fields."""
        span = self.renderer.span(before, answer)
        outcome: Outcome | None = None
        limit = self.server_models.max_model_len
        if span is not None and (limit is None or len(span.ids) < limit):
            outcome = await attempt(
                lambda: self.client.completions.create(
                    model=self.server_models.exact(arm.model),
                    prompt=span.ids,
                    max_tokens=1,
                    extra_body={"prompt_logprobs": 0},
                )
            )
        return likelihood_fields(answer, span, outcome)

    def _messages(self, arm: Arm, question: Question) -> list[Message]:
        return messages(arm, question.question, self.inputs.system, self.inputs.examples)


def likelihood_fields(answer: str, span: Span | None, outcome: Outcome | None) -> Row:
    """The fields of a likelihood.jsonl row; `outcome` is None when no request was sent."""
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
            # Only this answer fails: one token without a probability must not end the evaluation.
            return row | {"error": str(error)}
        row["tokens"] = len(span.ids) - span.start
    return row


def sample_fields(outcome: Outcome) -> Row:
    """The fields of a samples.jsonl row that come from one chat completion."""
    fields: Row = {"text": "", "finish_reason": None, "prompt_tokens": None, "completion_tokens": None}
    error = outcome.error
    if error is None:
        choice, usage = _first_choice(outcome.response), getattr(outcome.response, "usage", None)
        error = None if getattr(choice, "message", None) else NO_CHOICE
    if error is None:
        fields = {
            "text": (choice.message.content or "").strip(),
            "finish_reason": choice.finish_reason,
            # Not every server counts tokens.
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
        }
    return fields | {
        "latency_s": round(outcome.latency_s, 4),
        "attempts": outcome.attempts,
        "error": error,
    }


def _first_choice(response: Any) -> Any:
    """The first choice of a reply, or None: the SDK passes on whatever a server sends with status 200."""
    choices = getattr(response, "choices", None)
    return choices[0] if choices else None
