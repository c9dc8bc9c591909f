"""One server, seen from its parent process: start it, show progress until it is ready, watch it, stop it.

    with Server(ServeConfig(model="smollm2-135m", store="store", port=0)) as server:
        client = make_client(server.base_url)

The child's output goes to `<logs>/<port>/server.log`; if it dies, its reason comes from there.
"""

import contextlib
import dataclasses
import errno
import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from counsel import store as adapter_store
from counsel.catalog import Base, resolve
from counsel.errors import UserError
from counsel.lora_layers import targets
from counsel.safety.policy import OFF, ON, read_policy
from serve import config as configs
from serve import hardware, launch
from serve.config import ServeConfig
from serve.int8_base import INT8, make_int8
from serve.keys import KeyRing
from serve.vllm_api import require_tested

POLL_S = 0.2
PROGRESS_EVERY_S = 5.0
STOP_S = 15.0
HEALTH_S = 5.0

Health = Literal["up", "down", "silent", "unknown"]
# Errors of this process, not of the server: no file handle, memory or local port left.
_LOCAL_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL)

# vLLM's log lines during a start -> the progress shown. The last match counts.
_PHASES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "preparing the engine"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the port"),
)
_REASON = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)|error|Value error)[:,] (\S.*)")
# Lines that only report that another process failed.
_SECONDHAND = ("Engine core initialization failed", "WorkerProc initialization failed", "cancelled")


class Server:
    """A running `serve.api_process` child. Entering starts it and waits until it answers; leaving stops it."""

    def __init__(self, config: ServeConfig, *, quiet: bool = False) -> None:
        """Raises UserError: untested vLLM, unknown base, bad policy, port in use, or an open address without keys."""
        require_tested(config.untested_vllm)
        self.base: Base = resolve(config.model)
        require_keys(config)
        if config.safety not in (ON, OFF):
            config = dataclasses.replace(config, safety=str(Path(config.safety).absolute()))
        self.policy = read_policy(config.safety)
        self._port = reserve_port(config.host, config.port)
        port = int(self._port.getsockname()[1])
        self.config = dataclasses.replace(config, port=port, logs=str(Path(config.logs).absolute()))
        self.quiet = quiet
        self.process: subprocess.Popen[bytes] | None = None
        self.ready_s = 0.0
        self._n_starts = 0
        self._instance = ""

    @property
    def base_url(self) -> str:
        """The base URL for an openai client, with `/v1`."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.config.port}/v1"

    @property
    def log(self) -> Path:
        return self.config.log_dir / "server.log"

    @property
    def pid(self) -> int | None:
        """The API process's id; None before the start."""
        return self.process.pid if self.process else None

    @property
    def restarts(self) -> int:
        """How often the server was restarted."""
        return max(0, self._n_starts - 1)

    def plan(self) -> launch.LaunchPlan:
        """What will be started, and why."""
        ranks = store_ranks(Path(self.config.store))
        return launch.plan(self.config, self.base, hardware.detect(), ranks, targets(self.base.path))

    def command(self) -> tuple[str, ...]:
        """The child's whole command line."""
        return (*self.plan().argv, *launch.gateway_flags(self.config))

    def start(self) -> None:
        """Start the child and wait until it is ready. Raises UserError with the child's reason if it dies first."""
        self.ready_s = 0.0
        self.config.log_dir.mkdir(parents=True, exist_ok=True)
        command = self.command()
        if self.config.quantization == INT8:
            make_int8(self.base)
        self._show(f"starting {self.base.name} on {self.base_url} (log: {self.log})")
        started_s = time.monotonic()
        # One log per start, so that a reason found there belongs to this start. The previous log stays.
        if self.log.is_file():
            self.log.replace(self.log.with_name("server.previous.log"))
        self._instance = secrets.token_hex(8)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **self.plan().env, configs.ENVIRONMENT: self.config.to_json()}
                | {configs.INSTANCE: self._instance},
                # The child exits when its stdin closes, also if this process is killed.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches this process only, which then stops the child.
                start_new_session=True,
            )
        self._n_starts += 1
        with contextlib.ExitStack() as undo:
            undo.callback(self.kill)
            self._wait_until_ready(started_s)
            undo.pop_all()
        self.ready_s = time.monotonic() - started_s
        self._show(f"ready after {self.ready_s:.0f} s: {self.base_url}")

    def stop(self, leave: bool = False) -> None:
        """Let running requests finish within `drain_s`, then stop the child; kill what is left, at once if interrupted.

        leave: first report on `/ready` for `leave_s` that the server is about to stop, and still accept requests.
        """
        self._port.close()
        if self.process is None:
            return
        try:
            # The gateway refuses new requests and, once the running ones have finished, sends itself SIGTERM.
            stopping = signal.SIGUSR1 if leave else signal.SIGUSR2
            self.process.send_signal(stopping if self.ready_s else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.config.leave_s * leave + self.config.drain_s + STOP_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the child and every process it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _close(self.process.stdin)

    def health(self, within_s: float) -> Health:
        """The state of this server, from its `/health`."""
        return health(self.base_url, within_s, self._instance)

    def exit_reason(self) -> str | None:
        """Why the child exited, in one line; None while it runs."""
        if self.process is None or self.process.poll() is None:
            return None
        return reason_in(self.log) or f"it exited with status {self.process.returncode}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, started_s: float) -> None:
        shown_s = time.monotonic()
        while self.health(HEALTH_S) != "up":
            reason = self.exit_reason()
            if reason is not None:
                raise UserError(f"the server did not start: {reason} (log: {self.log})")
            if time.monotonic() - started_s > self.config.start_s:
                raise UserError(f"the server is not ready after {self.config.start_s:.0f} s (start_s); see {self.log}")
            if time.monotonic() - shown_s >= PROGRESS_EVERY_S:
                shown_s = time.monotonic()
                self._show(f"  {shown_s - started_s:3.0f} s  {_phase(self.log)}")
            time.sleep(POLL_S)

    def _show(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def health(url: str, within_s: float, instance: str | None = None) -> Health:
    """The state of the server at an address, from its `/health`; `instance` is the one it must have been started as.

    "up"; "down": nothing listens, the engine is dead, or another program has the port; "silent": no answer in
    `within_s`; "unknown": this process could not ask.
    """
    address = urllib.parse.urlsplit(url)
    # Not urllib, which would ask an outgoing proxy for this machine too.
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=within_s)
    try:
        connection.request("GET", "/health")
        reply = connection.getresponse()
        ours = instance is None or reply.getheader(configs.INSTANCE_HEADER) == instance
        return "up" if reply.status == 200 and ours else "down"
    except TimeoutError:
        return "silent"
    except (OSError, http.client.HTTPException) as error:
        return "unknown" if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS else "down"
    finally:
        connection.close()


def reason_in(log: Path) -> str | None:
    """Why a server died, from its log: the last error that is not about another process's failure."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        match = _REASON.search(line)
        if match and not any(text in line for text in _SECONDHAND):
            return match[0]
    return None


def store_ranks(store: Path) -> list[int]:
    """The ranks of all adapters in a store."""
    ranks = []
    for name in adapter_store.names(store):
        # One broken version must not stop the others from being served: the child skips it and logs why.
        with contextlib.suppress(UserError, FileNotFoundError):
            ranks += [manifest.rank for manifest in adapter_store.read_versions(store, name).versions.values()]
    return ranks


def require_keys(config: ServeConfig) -> None:
    """Raise UserError if others can reach the address and no keys are set."""
    keys = KeyRing(Path(config.keys) if config.keys else None)
    if keys.open and not config.loopback:
        raise UserError(
            f"host {config.host} can be reached by other machines, but no keys are set; make one with "
            "`python -m serve key NAME --keys keys.txt` and start with --keys keys.txt, or use --host 127.0.0.1"
        )


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket bound to the port. Raises UserError at once if the port is taken.

    It never listens. While it is open, the system gives the port to no other program, even if any free port was asked
    for and the child needs half a minute to open it. The child can still listen on it, because both set SO_REUSEADDR.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reserved = socket.socket(family)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}; "
            "stop what listens there, or choose another port with --port (0: any free one)"
        ) from error
    return reserved


def _phase(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return next((phase for sign, phase in reversed(_PHASES) if sign in text), "importing vLLM")


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        pipe.close()
