"""A replica whose engine only waits: the real gateway, limits, pool, store watcher and private port, without vLLM.

COMMAND is started in place of `python -m serve`, with Times as JSON in the environment variable STAND_IN. So a fleet of
many replicas runs on two cores with service times that are known. A request takes a slot for `service_s`, loading an
adapter takes `load_s`. Adapters need no files but a manifest (`put_in_store`). A request whose text is `hold PATH` is
not finished until the file PATH exists.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from counsel import store as adapter_store
from counsel.cli import load_config
from counsel.files import write_json
from counsel.manifest import FORMAT, Manifest
from serve.access_log import AccessLog
from serve.adapter_pool import AdapterPool
from serve.chat_turns import ACCEPTS_ALL
from serve.config import DEFAULT_MAX_CPU_LORAS, DEFAULT_MAX_LORA_RANK, ServeConfig
from serve.connections import BoundedConnection, per_address
from serve.gateway import Gateway, Service
from serve.keys import KeyRing
from serve.limits import Limits
from serve.metrics import ServerMetrics
from serve.name_table import NameTable
from serve.private_port import PrivatePort
from serve.reply import Send
from serve.request_body import Receive, Scope, read_body
from serve.server_registry import ServerRecord
from serve.store_watcher import StoreWatcher
from serve.vllm_plugin import _states

ENVIRONMENT = "STAND_IN"
COMMAND = (sys.executable, "-c", "from benchmarks.stand_in import main; main()")
BASE, FINGERPRINT = "stand-in", "f00d"
CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class Times:
    """What the engine pretends: seconds per answer and per load, and how many answers it works on at a time."""

    service_s: float = 0.0
    load_s: float = 0.0
    slots: int = 64


def put_in_store(store: Path, name: str, version: str = "0" * 12, rank: int = 8) -> Manifest:
    """Publish an adapter without weights; a higher version is a later one."""
    manifest = Manifest(
        format=FORMAT,
        name=name,
        version=version,
        created_utc=f"2026-01-01T00:00:00.{int(version, 16):06d}+00:00",
        base={"name": BASE, "hub_id": BASE, "fingerprint": FINGERPRINT},
        rank=rank,
        alpha=16.0,
        target_modules=["q_proj"],
        files={},
        prompt={"system": ""},
        run=None,
    )
    write_json(store / name / version / "manifest.json", dataclasses.asdict(manifest))
    adapter_store.make_current(store, manifest)
    return manifest


class _Engine:
    """Loads and unloads by waiting."""

    def __init__(self, load_s: float) -> None:
        self.load_s = load_s

    async def load(self, manifest: Manifest, path: Path) -> None:
        await asyncio.sleep(self.load_s)

    async def unload(self, manifest: Manifest) -> None:
        pass


class _Answers:
    """The application behind the gateway."""

    def __init__(self, times: Times) -> None:
        self.times, self.slots = times, asyncio.Semaphore(times.slots)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await _send(send, b"", b"text/plain", more=False, status=200)
            return
        body = json.loads(await read_body(receive, 1 << 20))
        text = str(body["messages"][-1]["content"])
        async with self.slots:
            await self._answer(body, text.removeprefix("hold ") if text.startswith("hold ") else "", send)

    async def _answer(self, body: dict[str, Any], held: str, send: Send) -> None:
        if not body.get("stream"):
            await self._work(1, held)
            await _send(
                send, json.dumps({"model": body["model"], "choices": []}).encode(), b"application/json", False, 200
            )
            return
        for number in range(CHUNKS):
            chunk = {"model": body["model"], "choices": [{"index": 0, "delta": {"content": f"{number} "}}]}
            status = None if number else 200
            await _send(send, f"data: {json.dumps(chunk)}\n\n".encode(), b"text/event-stream", True, status)
            await self._work(CHUNKS, held if number == 0 else "")
        await _send(send, b"data: [DONE]\n\n", b"", more=False)

    async def _work(self, parts: int, held: str) -> None:
        await asyncio.sleep(self.times.service_s / parts)
        while held and not Path(held).exists():
            await asyncio.sleep(0.02)


async def _send(send: Send, body: bytes, content_type: bytes, more: bool, status: int | None = None) -> None:
    if status is not None:
        headers = [(b"content-type", content_type)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more})


class _Server(uvicorn.Server):
    """Signals are handled below."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: ServeConfig, times: Times) -> None:
    """Serve until SIGTERM (after `leave_s`) or SIGINT, and until what runs has ended."""
    server_record = ServerRecord(
        f"http://{config.host}:{config.port}", FINGERPRINT, config.max_lora_rank or DEFAULT_MAX_LORA_RANK
    )
    metrics = ServerMetrics()
    pool = AdapterPool(
        engine=_Engine(times.load_s),
        store=Path(config.store),
        names=NameTable(BASE, server_record),
        capacity=config.max_cpu_loras or DEFAULT_MAX_CPU_LORAS,
        on_event=metrics.adapter_event,
    )
    watcher = StoreWatcher(pool, Path(config.preload) if config.preload else None)
    service = Service(
        config=config,
        pool=pool,
        watcher=watcher,
        keys=KeyRing(Path(config.keys) if config.keys else None),
        limits=Limits(config.key_running, config.key_queued, config.queued),
        metrics=metrics,
        access_log=AccessLog(config.log_dir),
        template=ACCEPTS_ALL,
        max_model_len=4096,
    )
    holder = types.SimpleNamespace(state=types.SimpleNamespace(counsel=service))
    gateway = Gateway(_Answers(times))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gateway({**scope, "app": holder}, receive, send)

    await watcher.start()
    BoundedConnection.max_per_address = per_address(config.queued)
    tasks = [asyncio.create_task(watcher.watch())]
    if config.metrics_port:
        tasks.append(
            asyncio.create_task(PrivatePort(config.metrics_host, config.metrics_port, lambda: _states(pool)).answer())
        )
    uvicorn_config = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=BoundedConnection,
        log_config=None,
        access_log=False,
        lifespan="off",
    )
    server = _Server(uvicorn_config)

    async def stop(leave_s: float) -> None:
        service.leaving = True
        await asyncio.sleep(leave_s)
        service.draining = True
        give_up_s = time.monotonic() + config.drain_s
        while service.limits.in_flight and time.monotonic() < give_up_s:
            await asyncio.sleep(0.02)
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number, leave_s in ((signal.SIGTERM, config.leave_s), (signal.SIGINT, 0.0)):
        loop.add_signal_handler(number, lambda leave_s=leave_s: tasks.append(asyncio.create_task(stop(leave_s))))  # type: ignore[misc]
    await server.serve()


def main() -> None:
    """Serve with the config file that a fleet wrote."""
    asyncio.run(
        serve(load_config(ServeConfig, sys.argv[2], {}), Times(**json.loads(os.environ.get(ENVIRONMENT, "{}"))))
    )
