"""`python -m serve`: start a server; manage the adapter store and the API keys; chat in the terminal."""

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from counsel import cli
from counsel import store as adapter_store
from counsel.cli import Command, Result, as_typed
from serve import chat, commands
from serve.canary import commands as canary_commands
from serve.config import ServeConfig
from serve.safety import commands as safety_commands
from serve.safety.commands import OFF_LINES, safety_lines
from serve.server import Server
from serve.supervise import Terminated, raise_terminated, supervise


def serve(config: ServeConfig) -> Result:
    """Serve until Ctrl-C or SIGTERM; restart a server that dies."""
    signal.signal(signal.SIGTERM, raise_terminated)
    server = Server(config)
    print(server.plan().explain(), file=sys.stderr)
    if server.policy is None:
        print(OFF_LINES, file=sys.stderr)
    leave = False
    try:
        server.start()
        if server.policy is not None:
            print(safety_lines(server.config.log_dir), file=sys.stderr)
        print(_welcome(server), file=sys.stderr, flush=True)
        supervise(server, threading.Event())
    except KeyboardInterrupt as signalled:
        leave = isinstance(signalled, Terminated)
        print("stopping: running requests may finish first", file=sys.stderr)
    finally:
        server.stop(leave)
    return Result({"base_url": server.base_url, "log": str(server.log), "restarts": server.restarts})


def _welcome(server: Server) -> str:
    """What is served, how to send a request and how to stop."""
    store = Path(server.config.store)
    adapters = adapter_store.names(store)
    shown = ", ".join(adapters[:5]) + (", ..." if len(adapters) > 5 else "")
    return "\n".join(
        (
            f"serves   {server.base.name}" + (f" and the adapters of {store}/: {shown}" if adapters else ""),
            as_typed(f"ask      python -m serve chat --url {server.base_url}, or any OpenAI client with this base_url"),
            *([f"page     {server.base_url.removesuffix('/v1')}/ui"] if server.config.ui else []),
            "stop     Ctrl-C",
        )
    )


COMMANDS = {
    "": Command(ServeConfig, serve, "serve a base model and the adapters of a store"),
    "plan": Command(
        "serve.plan_command:Plan",
        "serve.plan_command:plan_server",
        "show what would be started, here or on GPUs you describe, and why",
    ),
    **commands.COMMANDS,
    "fleet": Command(
        "serve.fleet.config:FleetConfig",
        "serve.fleet.commands:serve_fleet",
        "serve from several servers behind one HAProxy",
    ),
    "fleet status": Command(
        "serve.fleet.commands:FleetFolder", "serve.fleet.commands:show_status", "show a fleet's replicas and homes"
    ),
    "fleet config": Command(
        "serve.fleet.commands:FrontConfig", "serve.fleet.commands:show_config", "print a fleet's HAProxy configuration"
    ),
    **canary_commands.COMMANDS,
    **safety_commands.COMMANDS,
    "chat": Command(chat.Chat, chat.chat, "talk to a running server in the terminal"),
}


def main(argv: Sequence[str] | None = None, launcher: str = "python -m") -> int:
    """Run one of COMMANDS; return the exit status."""
    return cli.main("serve", COMMANDS, argv, launcher)


if __name__ == "__main__":
    sys.exit(main())
