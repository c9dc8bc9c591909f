"""The commands of a conversation in the terminal: lines that start with a slash."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from counsel.errors import UserError
from counsel.files import write_json
from counsel.values import nearest
from serve.chat_session import ChatSession


class ChatCommand(NamedTuple):
    """What follows the command's name, what it does, and the function that does it and returns a line to show."""

    words: str
    help: str
    run: Callable[[ChatSession, str], str]


def run_command(session: ChatSession, line: str) -> str:
    """Run a line such as `/model calm`; return what to show. A mistake in it is shown too, and changes nothing."""
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        return f"no command /{name}; {nearest(name, list(COMMANDS))}; /help lists them"
    try:
        return command.run(session, rest.strip())
    except UserError as error:
        return f"error: {error}"


def _model(session: ChatSession, name: str) -> str:
    if not name:
        names = session.served()
        return f"you are talking to {session.model}; served: {', '.join(names)}"
    session.model = session.check_model(name)
    return f"you are talking to {name} from here on"


def _system(session: ChatSession, text: str) -> str:
    session.system = text
    return "the system prompt is changed" if text else "the system prompt is the one of the adapter again"


def _compare(session: ChatSession, name: str) -> str:
    if not name:
        session.other = ""
        return f"only {session.model} answers"
    session.other = session.check_model(name)
    return f"{name} answers too; the conversation goes on with {session.model}'s answers; /compare alone ends it"


def _save(session: ChatSession, path: str) -> str:
    if not path:
        raise UserError("/save needs a file, such as /save talk.json")
    if not session.messages:
        raise UserError("there is nothing to save yet")
    if Path(path).exists():
        raise UserError(f"{path!r} exists; choose another file")
    write_json(Path(path), {"model": session.model, "messages": session.with_system()})
    return f"saved {session.n_turns} turns in {path}; the chat page can load it"


def _new(session: ChatSession, _: str) -> str:
    session.messages.clear()
    return "a new conversation"


def _help(_: ChatSession, __: str) -> str:
    return "\n".join(f"  {f'/{name} {command.words}':<18} {command.help}" for name, command in COMMANDS.items())


COMMANDS = {
    "model": ChatCommand("[NAME]", "talk to another model; without a name: which are served", _model),
    "system": ChatCommand("[TEXT]", "another system prompt; without a text: the adapter's own", _system),
    "compare": ChatCommand("[NAME]", "a second model answers too; without a name: no longer", _compare),
    "save": ChatCommand("FILE", "write the conversation to a JSON file", _save),
    "new": ChatCommand("", "forget the conversation so far", _new),
    "help": ChatCommand("", "these lines", _help),
}
