"""`python -m serve`: start a server, and look after the adapter store and the keys."""

import signal
import sys
from types import FrameType

from serve.config import ServeConfig
from serve.server import Server
from train.command import Command, Result, main


def serve(config: ServeConfig) -> Result:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    server = Server(config)
    for line in server.plan().explain().splitlines():
        print(line, file=sys.stderr)
    server.start()
    try:
        server.wait()
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr)
    finally:
        server.stop()
    return Result({"base_url": server.base_url, "log": str(server.log)})


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


COMMANDS = {"": Command(ServeConfig, serve, "serve a base model and the adapters of a store")}

if __name__ == "__main__":
    sys.exit(main("serve", COMMANDS))
