"""Starts Locust as a child process: gevent rewrites the standard library there, never here."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from counsel.errors import UserError
from loadtest.scenario import Scenario, host_port

# Locust's status where the collector gave the run up, and has said why.
GIVEN_UP = 3

_LOCUST = (
    sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).parent / "locustfile.py"),
    # Failed requests are rows; Locust's status says only whether Locust itself went well.
    "--exit-code-on-error", "0",
)  # fmt: skip


def locust_argv(scenario: Scenario, directory: Path, port: int) -> list[str]:
    """The command line of Locust; `port` is where its processes meet when there are several on this machine."""
    users = str(scenario.sources)
    argv = [
        *_LOCUST, "--users", users, "--spawn-rate", users,
        # Users end on their own; these bound what goes wrong.
        "--stop-timeout", f"{math.ceil(scenario.drain_s) + 5}s",
        "--run-time", f"{math.ceil(scenario.duration_s + scenario.drain_s) + 30}s",
        "--logfile", str(directory / "locust.log"),
        # Without a JSON file, Locust prints its own tables on stderr.
        "--only-summary", "--json-file", str(directory / "locust"),
    ]  # fmt: skip
    if scenario.web:
        argv += ["--autostart", "--web-host", "127.0.0.1", "--web-port", str(scenario.web_port)]
    else:
        argv += ["--headless"]
    if scenario.bind:
        host, bind_port = host_port("bind", scenario.bind)
        argv += ["--master", "--master-bind-host", host, "--master-bind-port", str(bind_port)]
        argv += ["--expect-workers", str(scenario.workers)]
    elif scenario.workers > 1:
        argv += ["--processes", str(scenario.workers), "--master-bind-host", "127.0.0.1", "--master-host", "127.0.0.1",
                 "--master-bind-port", str(port), "--master-port", str(port)]  # fmt: skip
    return argv


def worker_argv(directory: Path, master: str) -> list[str]:
    """The command line of a Locust worker that joins `master` (HOST:PORT)."""
    host, port = host_port("master", master)
    log = directory / f"worker-{socket.gethostname()}-{os.getpid()}.log"
    return [*_LOCUST, "--worker", "--master-host", host, "--master-port", str(port), "--logfile", str(log)]


def run_locust(scenario: Scenario, directory: Path) -> bool:
    """Play the plan in `directory`; return whether Ctrl-C ended it, when requests.jsonl and client.jsonl are whole.

    Progress goes to stderr, Locust's own talk to locust.log. Raises UserError when Locust does not end well.
    """
    if scenario.web:
        print(f"live page: http://127.0.0.1:{scenario.web_port}; Ctrl-C ends the run", file=sys.stderr)
    if scenario.bind:
        print(f"waiting for {scenario.workers} workers: python -m loadtest worker {directory} --master {scenario.bind}",
              file=sys.stderr)  # fmt: skip
    with _reserved_port() as port:
        return _run(locust_argv(scenario, directory, port), directory)


def run_worker(directory: Path, master: str) -> None:
    """Send a share of the plan in `directory` for a run that waits at `master`; return when it has ended."""
    _run(worker_argv(directory, master), directory)


def _run(argv: Sequence[str], directory: Path) -> bool:
    """Run Locust to its end, or to Ctrl-C: then it finishes what runs. Return whether that was the end."""
    environment = {**os.environ, "COUNSEL_LOADTEST": str(directory.resolve())}
    with (directory / "locust.out").open("a", encoding="utf-8") as out:
        # A session of its own: Ctrl-C is for us, who then tell Locust once, wherever the signal came from.
        child = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=out, start_new_session=True)
        try:
            status, stopped = _wait(child)
        finally:
            if child.poll() is None:
                # Its workers are in its session too.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if status == GIVEN_UP:
        raise UserError(f"the run in {directory} was given up, for the reason above")
    if status != 0:
        raise UserError(f"locust ended with status {status}; see {directory / 'locust.log'}")
    return stopped


def _wait(child: "subprocess.Popen[bytes]") -> tuple[int, bool]:
    try:
        return child.wait(), False
    except KeyboardInterrupt:
        pass
    print("ending: running requests may finish first (Ctrl-C again: give them up; `report` judges what came)",
          file=sys.stderr)  # fmt: skip
    # Not SIGINT: Python would raise KeyboardInterrupt in whichever greenlet runs, mostly one that reads a reply.
    # For SIGTERM, Locust has a handler in a greenlet of its own.
    child.send_signal(signal.SIGTERM)
    return child.wait(), True


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port for Locust's own workers. Bound here and never listened on, it is given to nobody else meanwhile."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield int(reserved.getsockname()[1])
