"""`python -m serve chat [MODEL]`: talk to a running server in the terminal; each answer streams as it is written."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from counsel.chat import NOTICE, Message
from counsel.cli import Result, argument, nearest, option
from counsel.errors import UserError

# What vLLM's refusals of a conversation that is too long have in common.
TOO_LONG = ("maximum context length", "maximum model length")


@dataclass(frozen=True)
class Chat:
    model: str = argument("who answers: an adapter, name@version, or the base (default: the first adapter served)", "")
    url: str = option("http://127.0.0.1:8000/v1", "the server's address, with /v1")
    system: str = option("", "system text (default: the one the adapter was published with)")
    max_tokens: int = option(300, "longest answer in tokens")
    temperature: float = option(0.7, "0 always gives the likeliest answer")


def chat(options: Chat) -> Result:
    """Read lines, print answers; an empty line or end of input ends the conversation.

    Ctrl-C ends an answer, not the conversation. What the server refuses is said, and the conversation goes on without
    it; one that no longer fits the model goes on without its oldest turns. Raises UserError for a model that is not
    served, and where no server answers at the start.
    """
    # Inside, so that every other command's --help does not wait for the SDK.
    import httpx2
    import openai

    from counsel.client import make_client

    client = make_client(options.url)
    try:
        model = _served(client, options.model)
    except openai.APIConnectionError as error:
        raise UserError(f"no server answers at {options.url}; start one with python -m serve") from error
    except openai.APIStatusError as error:
        raise UserError(_message(error)) from error
    print(
        f"{NOTICE}\n\nYou are talking to {model}. An empty line ends the conversation, Ctrl-C an answer.",
        file=sys.stderr,
    )
    messages: list[Message] = []
    n_turns = 0
    for line in _lines():
        messages.append({"role": "user", "content": line})
        try:
            answer = _fitting_answer(client, model, messages, options)
        except (openai.APIConnectionError, httpx2.TransportError):
            print(f"no server answers at {options.url}; say it again when it is back", file=sys.stderr)
        except openai.APIError as error:
            print(f"the server refused: {_message(error)}", file=sys.stderr)
        else:
            if answer:
                messages.append({"role": "assistant", "content": answer})
                n_turns += 1
                continue
        messages.pop()
    return Result({"model": model, "turns": n_turns})


def _served(client: Any, asked: str) -> str:
    """The model to talk to. Raises UserError for a name that the server does not list; a version it need not list."""
    cards = list(client.models.list())
    served = [card.id for card in cards]
    if asked and asked.partition("@")[0] not in served:
        raise UserError(f"the server has no model {asked!r}; {nearest(asked, served)}")
    return asked or str(next((card.id for card in cards if getattr(card, "parent", None)), cards[0].id))


def _lines() -> Iterator[str]:
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        importlib.import_module("readline")  # makes input() edit lines, and keep them while this runs
    while True:
        try:
            if is_terminal:
                line = input("\nyou> ").strip()
            else:
                print("\nyou> ", end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(an empty line ends the conversation)", file=sys.stderr)
            continue
        if not line:
            return
        yield line


def _fitting_answer(client: Any, model: str, messages: list[Message], options: Chat) -> str:
    """The answer to `messages`, from which the oldest turns are taken where the model can read it only without them."""
    import openai

    asked = list(messages)
    while True:
        try:
            answer = _answer(client, model, asked, options)
        except openai.BadRequestError as error:
            if len(asked) < 3 or not any(words in _message(error) for words in TOO_LONG):
                raise
            del asked[:2]
            continue
        if len(asked) < len(messages):
            print("(the oldest turns no longer fit the model, and are left out from here on)", file=sys.stderr)
            messages[:] = asked
        return answer


def _answer(client: Any, model: str, messages: list[Message], options: Chat) -> str:
    """Print an answer as it comes, and return it; Ctrl-C ends it where it is."""
    system: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    parts: list[str] = []
    try:
        with client.chat.completions.create(
            model=model,
            messages=[*system, *messages],
            max_completion_tokens=options.max_tokens,
            temperature=options.temperature,
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


def _message(error: Any) -> str:
    return str(error.body["message"] if isinstance(error.body, dict) and "message" in error.body else error)
