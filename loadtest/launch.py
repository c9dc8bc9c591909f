"""Starts Locust as a child process, so that gevent patches the standard library there and never here."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from counsel.cli import as_typed
from counsel.errors import UserError
from loadtest.scenario import Scenario, host_port

# Locust's exit status if the collector aborted the run and printed why.
ABORTED = 3

_LOCUST = (
    sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).parent / "locustfile.py"),
    # Failed requests are records; Locust's status shows only whether Locust itself worked.
    "--exit-code-on-error", "0",
)  # fmt: skip


def locust_argv(scenario: Scenario, directory: Path, port: int) -> list[str]:
    """The command line of Locust; `port` is for its own processes, if there are several on this machine."""
    users = str(scenario.sources)
    argv = [
        *_LOCUST, "--users", users, "--spawn-rate", users,
        # Users end by themselves; these limits are for when something goes wrong.
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
    """Send the plan in `directory`, until requests.jsonl and client.jsonl are complete; return whether Ctrl-C ended it.

    Progress goes to stderr, Locust's own log to locust.log. Raises UserError if Locust fails.
    """
    if scenario.web:
        print(f"live page: http://127.0.0.1:{scenario.web_port}; Ctrl-C ends the run", file=sys.stderr)
    if scenario.bind:
        command = as_typed(f"python -m loadtest worker {directory} --master {scenario.bind}")
        print(f"waiting for {scenario.workers} workers: {command}", file=sys.stderr)
    with _reserved_port() as port:
        return _run(locust_argv(scenario, directory, port), directory)


def run_worker(directory: Path, master: str) -> None:
    """Send a share of the plan in `directory` for the run led at `master`; return when that run has ended."""
    _run(worker_argv(directory, master), directory)


def _run(argv: Sequence[str], directory: Path) -> bool:
    """Run Locust until it ends, or until Ctrl-C, when running requests finish first. Return whether it was Ctrl-C."""
    environment = {**os.environ, "COUNSEL_LOADTEST": str(directory.resolve())}
    with (directory / "locust.out").open("a", encoding="utf-8") as out:
        # Its own session, so that Ctrl-C reaches only this process, which then signals Locust exactly once.
        child = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=out, start_new_session=True)
        try:
            status, stopped = _wait(child)
        finally:
            if child.poll() is None:
                # Its workers are in the same session.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if status == ABORTED:
        raise UserError(f"the run in {directory} was aborted, for the reason above")
    if status != 0:
        raise UserError(f"locust exited with status {status}; see {directory / 'locust.log'}")
    return stopped


def _wait(child: "subprocess.Popen[bytes]") -> tuple[int, bool]:
    try:
        return child.wait(), False
    except KeyboardInterrupt:
        pass
    print("stopping: waiting for running requests (Ctrl-C again stops at once; `report` judges what was recorded)",
          file=sys.stderr)  # fmt: skip
    # Not SIGINT: Python would raise KeyboardInterrupt in whichever greenlet runs, usually one that reads a reply.
    # For SIGTERM, Locust has a handler in a separate greenlet.
    child.send_signal(signal.SIGTERM)
    return child.wait(), True


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port for Locust's own workers. It is bound here but not listened on, so that no other process gets it."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield int(reserved.getsockname()[1])
