"""An engine without a port: send hundreds of requests at once, and get each answer when it is done.

    async with OfflineEngine(ServeConfig(model="smollm2-135m", store="store"), Path("engine.log")) as engine:
        answer = await engine.ask("/v1/chat/completions", {"model": "gentle", "messages": messages})

The engine runs in a child process (serve/offline_process.py) with a server's launch plan and request handlers, so the
same request gets the same answer. Parent and child exchange JSON lines over the child's standard input and output. The
child exits when its stdin closes, so no engine outlives its parent.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from counsel.catalog import Base, resolve
from counsel.errors import UserError
from counsel.lora_layers import targets
from serve import config as configs
from serve import hardware, launch
from serve.config import ServeConfig
from serve.int8_base import INT8, make_int8
from serve.server import reason_in, store_ranks
from serve.vllm_api import require_tested

STOP_S = 15.0
# A line holds one request or one answer. Likelihoods of long prompts take megabytes.
MAX_LINE_BYTES = 1 << 30


class OfflineAnswer(NamedTuple):
    """A server's reply: its HTTP status and its body, which holds `error` unless the status is 200."""

    status: int
    body: dict[str, Any]


class OfflineEngine:
    """A running `serve.offline_process` child. Entering starts it and waits until it is ready; leaving stops it."""

    def __init__(self, config: ServeConfig, log: Path) -> None:
        """`log` gets vLLM's output and is overwritten. Raises UserError for an untested vLLM or an unknown base."""
        require_tested(config.untested_vllm)
        self.base: Base = resolve(config.model)
        self.config, self.log = config, log
        self.process: asyncio.subprocess.Process | None = None
        self._pending: dict[int, asyncio.Future[OfflineAnswer]] = {}
        self._last_number = 0

    def plan(self) -> launch.LaunchPlan:
        """What will be started, and why."""
        ranks = store_ranks(Path(self.config.store))
        return launch.plan(self.config, self.base, hardware.detect(), ranks, targets(self.base.path))

    def flags(self) -> tuple[str, ...]:
        """The vLLM flags for the child."""
        return (*self.plan().argv[3:], *launch.gateway_flags(self.config), "--disable-log-stats")

    async def ask(self, path: str, body: dict[str, Any]) -> OfflineAnswer:
        """The answer to one request; any number can wait at once. Raises UserError if the engine has exited."""
        if self._listening.done():
            raise self._exit_error()
        self._last_number += 1
        number = self._last_number
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            # No drain: the waiting requests bound what is written.
            self._stdin.write(json.dumps({"number": number, "path": path, "body": body}).encode() + b"\n")
            return await future
        finally:
            del self._pending[number]

    async def __aenter__(self) -> Self:
        print(f"starting an engine for {self.base.name} (log: {self.log})", file=sys.stderr, flush=True)
        started_s = time.monotonic()
        flags, environment = self.flags(), self.plan().env
        if self.config.quantization == INT8:
            make_int8(self.base)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "serve.offline_process", *flags),
                env={**os.environ, **environment, configs.ENVIRONMENT: self.config.to_json()},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=MAX_LINE_BYTES,
                # Ctrl-C reaches this process only, which then stops the child.
                start_new_session=True,
            )
        assert self.process.stdin is not None
        self._stdin = self.process.stdin
        self._ready = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._kill)
            await self._wait_until_ready()
            undo.pop_all()
        print(f"ready after {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process is not None
        self._stdin.close()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), STOP_S)
        finally:
            await self._kill()

    async def _wait_until_ready(self) -> None:
        ready = asyncio.create_task(self._ready.wait())
        waited = (ready, self._listening)
        await asyncio.wait(waited, timeout=self.config.start_s, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._listening.done():
            raise self._exit_error()
        if not self._ready.is_set():
            raise UserError(f"the engine is not ready after {self.config.start_s:.0f} s (start_s); see {self.log}")

    async def _listen(self) -> None:
        """Hand each answer to the request that waits for it; when the child exits, fail all that still wait."""
        assert self.process is not None
        assert self.process.stdout is not None
        try:
            async for line in self.process.stdout:
                message = json.loads(line)
                if message["number"] == 0:
                    self._ready.set()
                    continue
                future = self._pending.get(message["number"])
                # A cancelled future stays here until its task runs again.
                if future is not None and not future.done():
                    future.set_result(OfflineAnswer(message["status"], message["body"]))
        finally:
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(self._exit_error())

    def _exit_error(self) -> UserError:
        reason = reason_in(self.log) or "no reason in its log"
        return UserError(f"the engine ended: {reason} (log: {self.log})")

    async def _kill(self) -> None:
        """Kill the child and every process it started."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        await self._listening
