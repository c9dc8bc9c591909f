"""`python -m serve chat`: talk to a running server in the terminal; each answer streams as it is written."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from train.chat import NOTICE, Message
from train.command import Result, option
from train.errors import UserError


@dataclass(frozen=True)
class Chat:
    model: str = option("", "who answers: an adapter, name@version, or the base (default: the newest the server lists)")
    url: str = option("http://127.0.0.1:8000/v1", "the server's address, with /v1")
    system: str = option("", "system text (default: the one the adapter was published with)")
    max_tokens: int = option(300, "longest answer in tokens")
    temperature: float = option(0.7, "0 always gives the likeliest answer")


def chat(options: Chat) -> Result:
    """Read lines, print answers; an empty line or end of input ends the conversation."""
    # Inside, so that every other command's --help does not wait for the SDK.
    import openai

    from serve.client import make_client

    client = make_client(options.url)
    try:
        model = options.model or _first_adapter(client)
        print(f"{NOTICE}\n\nYou are talking to {model}. An empty line ends the conversation.", file=sys.stderr)
        messages: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
        n_turns = 0
        for line in _lines():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(client, model, messages, options)})
            n_turns += 1
    except openai.APIConnectionError as error:
        raise UserError(f"no server answers at {options.url}; start one with python -m serve") from error
    except openai.APIStatusError as error:
        raise UserError(str(error.body["message"] if isinstance(error.body, dict) else error)) from error
    return Result({"model": model, "turns": n_turns})


def _first_adapter(client: Any) -> str:
    cards = list(client.models.list())
    return str(next((card.id for card in cards if getattr(card, "parent", None)), cards[0].id))


def _lines() -> Iterator[str]:
    while True:
        print("\nyou> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answer(client: Any, model: str, messages: list[Message], options: Chat) -> str:
    parts = []
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_completion_tokens=options.max_tokens,
        temperature=options.temperature,
        stream=True,
    )
    for chunk in stream:
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            print(parts[-1], end="", flush=True)
    print()
    return "".join(parts)
