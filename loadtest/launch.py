"""Starts Locust as a child process: gevent rewrites the standard library there, never here."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

from loadtest.scenario import Scenario
from train.errors import UserError

LOCUSTFILE = Path(__file__).parent / "locustfile.py"


def locust_argv(scenario: Scenario, directory: Path, port: int) -> list[str]:
    """The command line of Locust; `port` is where its processes meet when there are several."""
    users = scenario.sources
    argv = [
        sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless",
        "--users", str(users), "--spawn-rate", str(users),
        # Users end on their own; these bound what goes wrong.
        "--stop-timeout", f"{math.ceil(scenario.drain_s) + 5}s",
        "--run-time", f"{math.ceil(scenario.duration_s + scenario.drain_s) + 30}s",
        "--only-summary", "--loglevel", "INFO", "--logfile", str(directory / "locust.log"),
        "--json-file", str(directory / "locust"),  # without it, Locust prints its tables on stderr
        "--exit-code-on-error", "0",
    ]  # fmt: skip
    if scenario.workers > 1:
        argv += ["--processes", str(scenario.workers), "--master-bind-host", "127.0.0.1", "--master-host", "127.0.0.1",
                 "--master-bind-port", str(port), "--master-port", str(port)]  # fmt: skip
    return argv


def run_locust(scenario: Scenario, directory: Path) -> None:
    """Play the plan in `directory`; return when requests.jsonl and client.jsonl are whole.

    Progress goes to stderr, Locust's own talk to locust.log. Raises UserError when Locust does not end well.
    """
    environment = {**os.environ, "COUNSEL_LOADTEST": str(directory.resolve())}
    with (directory / "locust.out").open("w", encoding="utf-8") as out:
        child = subprocess.Popen(
            locust_argv(scenario, directory, _free_port()), env=environment, stdin=subprocess.DEVNULL, stdout=out
        )
        try:
            status = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=30)
    if status != 0:
        raise UserError(f"locust ended with status {status}; see {directory / 'locust.log'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
