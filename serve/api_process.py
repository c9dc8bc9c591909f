"""The server's child process: vLLM's own OpenAI server, with the command line from serve/launch.py.

`python -m serve` starts it. The child exits when its stdin closes, so no engine outlives its parent.
"""

import os
import signal
import threading
import time

from serve.config import from_environment

LINGER_S = 10.0


def main() -> None:
    """Parse vLLM's flags from the command line and serve until stopped."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serve.connections import BoundedConnection, per_address
    from serve.vllm_api import cli_env_setup, make_arg_parser, validate_parsed_serve_args

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    BoundedConnection.max_per_address = per_address(from_environment().queued)
    uvloop.run(run_server(args, http=BoundedConnection))


def _stop_with_parent() -> None:
    # Not sys.stdin: this thread would hold its lock, and the interpreter would abort at exit.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(from_environment().drain_s + LINGER_S)
    # If vLLM is interrupted during its start, it and its engine can wait for each other forever.
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
