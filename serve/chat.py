"""`python -m serve chat [MODEL]`: talk to a running server in the terminal; each answer streams as it is written."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from counsel.chat import NOTICE, Message
from counsel.cli import Result, argument, option
from counsel.errors import UserError
from counsel.values import NonNegativeFloat, PositiveInt, nearest

# vLLM's errors for a conversation that is too long contain one of these.
_TOO_LONG = ("maximum context length", "maximum model length")


@dataclass(frozen=True)
class Chat:
    """Which model to talk to, and how it answers."""

    model: str = argument("an adapter, name@version, or the base model", "", shown="the first adapter served")
    url: str = option("http://127.0.0.1:8000/v1", "the server's OpenAI base URL, with /v1", metavar="URL")
    system: str = option("", "system prompt", shown="the one that the adapter was published with")
    max_tokens: PositiveInt = option(300, "longest answer, in tokens")
    temperature: NonNegativeFloat = option(0.7, "sampling temperature; 0 always gives the likeliest answer")


def chat(options: Chat) -> Result:
    """Read lines and print answers until an empty line or the end of input.

    Ctrl-C ends an answer, not the conversation. A turn that the server refuses is dropped, with the server's reason;
    a conversation that no longer fits the model loses its oldest turns. Raises UserError for a model that is not
    served, and if no server answers at the start.
    """
    # Imported here, so that no other command's --help waits for the SDK.
    import httpx2
    import openai

    from counsel.client import error_message, list_models, make_client

    client = make_client(options.url)
    served = list_models(client)
    # The server answers for more exact versions than it lists.
    if options.model and options.model.partition("@")[0] not in served.names:
        raise UserError(f"the server has no model {options.model!r}; {nearest(options.model, served.names)}")
    model = options.model or (served.adapters[0] if served.adapters else served.base)
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
            print(f"no server answers at {options.url}; repeat the line when it is back", file=sys.stderr)
        except openai.APIError as error:
            print(f"the server refused: {error_message(error)}", file=sys.stderr)
        else:
            if answer:
                messages.append({"role": "assistant", "content": answer})
                n_turns += 1
                continue
        messages.pop()
    return Result({"model": model, "turns": n_turns})


def _lines() -> Iterator[str]:
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        importlib.import_module("readline")  # lets input() edit lines and recall earlier ones
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
    """The answer to `messages`; while they are too long for the model, their oldest turn is removed."""
    import openai

    from counsel.client import error_message

    asked = list(messages)
    while True:
        try:
            answer = _answer(client, model, asked, options)
        except openai.BadRequestError as error:
            if len(asked) < 3 or not any(words in error_message(error) for words in _TOO_LONG):
                raise
            del asked[:2]
            continue
        if len(asked) < len(messages):
            print("(the oldest turns no longer fit the model, and are left out from now on)", file=sys.stderr)
            messages[:] = asked
        return answer


def _answer(client: Any, model: str, messages: list[Message], options: Chat) -> str:
    """Print an answer as it streams, and return it; Ctrl-C ends it early."""
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
