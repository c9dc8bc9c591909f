"""`python -m serve`: start a server, and look after the adapter store and the keys."""

import signal
import sys
import threading
from types import FrameType

from serve import chat, shelf
from serve.config import ServeConfig
from serve.server import Server
from serve.supervise import supervise
from train.command import Command, Result, main


def serve(config: ServeConfig) -> Result:
    """Serve until Ctrl-C or SIGTERM; start again what dies."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    server = Server(config)
    print(server.plan().explain(), file=sys.stderr)
    try:
        server.start()
        supervise(server, threading.Event())
    except KeyboardInterrupt:
        print("stopping: running requests may end first", file=sys.stderr)
    finally:
        server.stop()
    return Result({"base_url": server.base_url, "log": str(server.log), "restarts": server.restarts})


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


COMMANDS = {
    "": Command(ServeConfig, serve, "serve a base model and the adapters of a store"),
    **shelf.COMMANDS,
    "chat": Command(chat.Chat, chat.chat, "talk to a running server in the terminal"),
}

if __name__ == "__main__":
    sys.exit(main("serve", COMMANDS))
