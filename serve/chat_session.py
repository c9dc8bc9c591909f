"""One conversation in the terminal: its turns, its models, and how an answer is asked for and printed."""

import sys
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from counsel.chat import Message
from counsel.client import error_message, list_models, make_client
from counsel.errors import UserError
from counsel.values import nearest

# vLLM's errors for a conversation that is too long contain one of these.
_TOO_LONG = ("maximum context length", "maximum model length")


@dataclass
class ChatSession:
    """A conversation with `model`. While `other` is set, it answers each question too, and is then forgotten."""

    client: openai.OpenAI
    model: str
    system: str
    max_tokens: int
    temperature: float
    other: str = ""
    messages: list[Message] = field(default_factory=list)
    n_turns: int = 0

    def ask(self, question: str, *, alone: bool = False) -> None:
        """Print the answer to `question` as it streams, and keep both as a turn.

        A turn without an answer is dropped with a line on stderr; if it is `alone`, with a UserError.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            if self.other:
                # First, and on the same turns; the conversation goes on with what `model` says.
                print(f"[{self.other}]", file=sys.stderr)
                self._fitting_answer(self.other)
                print(f"[{self.model}]", file=sys.stderr)
            answer = self._fitting_answer(self.model)
        except (openai.APIConnectionError, httpx2.TransportError) as error:
            self.messages.pop()
            reason = f"no server answers at {str(self.client.base_url).rstrip('/')}"
            if alone:
                raise UserError(f"{reason}; start one with python -m serve, or give --url") from error
            print(f"{reason}; repeat the line when it is back", file=sys.stderr)
        except openai.APIError as error:
            self.messages.pop()
            reason = f"the server refused: {error_message(error)}"
            if alone:
                raise UserError(reason) from error
            print(reason, file=sys.stderr)
        else:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
                self.n_turns += 1
            else:
                self.messages.pop()

    def served(self) -> tuple[str, ...]:
        """The names of the models that the server lists. Raises UserError if no server answers."""
        return list_models(self.client).names

    def check_model(self, name: str) -> str:
        """`name`, if the server serves it. Raises UserError otherwise, or if no server answers."""
        names = self.served()
        # The server answers for more exact versions than it lists.
        if name.partition("@")[0] not in names:
            raise UserError(f"the server has no model {name!r}; {nearest(name, names)}")
        return name

    def with_system(self) -> list[Message]:
        """All messages, the system prompt first where the conversation has one of its own."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def _fitting_answer(self, model: str) -> str:
        """The answer to the messages; while they are too long for the model, their oldest turn is removed."""
        before = list(self.messages)
        while True:
            try:
                answer = self._answer(model)
            except openai.BadRequestError as error:
                if len(self.messages) < 3 or not any(words in error_message(error) for words in _TOO_LONG):
                    self.messages[:] = before
                    raise
                del self.messages[:2]
                continue
            if len(self.messages) < len(before):
                print("(the oldest turns no longer fit the model, and are left out from now on)", file=sys.stderr)
            return answer

    def _answer(self, model: str) -> str:
        """Print an answer as it streams, and return it; Ctrl-C ends it early."""
        parts: list[str] = []
        messages: Any = self.with_system()
        try:
            with self.client.chat.completions.create(
                model=model,
                messages=messages,
                max_completion_tokens=self.max_tokens,
                temperature=self.temperature,
                stream=True,
            ) as stream:
                for chunk in stream:
                    for choice in chunk.choices:
                        parts.append(choice.delta.content or "")
                        print(parts[-1], end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="", file=sys.stderr)
        print()
        return "".join(parts)


def open_session(url: str, model: str, system: str, max_tokens: int, temperature: float) -> ChatSession:
    """A conversation with `model`, or with the first adapter served, or with the base.

    Raises UserError for a model that is not served, or if no server answers.
    """
    client = make_client(url)
    served = list_models(client)
    session = ChatSession(client, model, system, max_tokens, temperature)
    if model:
        session.check_model(model)
    else:
        session.model = served.adapters[0] if served.adapters else served.base
    return session
