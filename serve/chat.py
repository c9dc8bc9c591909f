"""`python -m serve chat [MODEL] [QUESTION]`: talk to a running server in the terminal; answers stream as they come."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from counsel.chat import NOTICE
from counsel.cli import Result, argument, option
from counsel.errors import UserError
from counsel.values import NonNegativeFloat, PositiveInt

FROM_PIPE = "-"


@dataclass(frozen=True)
class Chat:
    """Which model to talk to, and how it answers."""

    model: str = argument("an adapter, name@version, or the base model", "", shown="the first adapter served")
    question: str = argument("one question, answered once; - reads it from a pipe", "", shown="a conversation")
    url: str = option("http://127.0.0.1:8000/v1", "the server's OpenAI base URL, with /v1", metavar="URL")
    system: str = option("", "system prompt", shown="the one that the adapter was published with")
    max_tokens: PositiveInt = option(300, "longest answer, in tokens")
    temperature: NonNegativeFloat = option(0.7, "sampling temperature; 0 always gives the likeliest answer")


def chat(options: Chat) -> Result:
    """Read lines and print answers until an empty line or the end of input; or answer one question.

    Ctrl-C ends an answer, not the conversation. A turn that the server refuses is dropped, with the server's reason;
    a conversation that no longer fits the model loses its oldest turns. A line that starts with a slash is a command
    (serve/chat_commands.py). Raises UserError for a model that is not served, if no server answers at the start, and
    for one question that gets no answer.
    """
    # Imported here, so that no other command's --help waits for the SDK.
    from serve.chat_commands import run_command
    from serve.chat_session import open_session

    model, question = options.model, options.question
    if model == FROM_PIPE and not question:
        model, question = "", FROM_PIPE
    session = open_session(options.url, model, options.system, options.max_tokens, options.temperature)
    if question:
        session.ask(_piped() if question == FROM_PIPE else question, alone=True)
        return Result({"model": session.model, "turns": session.n_turns})
    print(
        f"{NOTICE}\n\nYou are talking to {session.model}. An empty line ends the conversation, Ctrl-C an answer; /help "
        "lists the commands.",
        file=sys.stderr,
    )
    for line in _lines():
        if line.startswith("/"):
            print(run_command(session, line), file=sys.stderr)
        else:
            session.ask(line)
    return Result({"model": session.model, "turns": session.n_turns})


def _piped() -> str:
    text = sys.stdin.read().strip()
    if not text:
        raise UserError("the question on standard input is empty; pipe some text, or give the question itself")
    return text


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
