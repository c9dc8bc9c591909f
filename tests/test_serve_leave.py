"""What a balancer sees while a server stops: it leaves and still works, then it drains, and lives to the end."""

import asyncio
import types
from pathlib import Path

import httpx
import prometheus_client
import pytest

from serve import metrics, vllm_plugin
from serve.access_log import AccessLog
from serve.chat_turns import ACCEPTS_ALL
from serve.config import ServeConfig
from serve.gateway import Gateway, Service
from serve.keys import KeyRing
from serve.limits import Limits
from serve.metrics import ServerMetrics

ASK = {"messages": [{"role": "user", "content": "hi"}]}


async def engine(scope, receive, send):
    """Stands behind the gate and answers everything."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge", "Histogram"):
        made = getattr(prometheus_client, kind)
        monkeypatch.setattr(metrics, kind, lambda *given, made=made, **more: made(*given, registry=registry, **more))
    return Service(
        config=ServeConfig(),
        pool=types.SimpleNamespace(names=types.SimpleNamespace(base_name="base")),  # type: ignore[arg-type]
        watcher=types.SimpleNamespace(),  # type: ignore[arg-type]
        keys=KeyRing(None, {}),
        limits=Limits(4, 4, 8),
        metrics=ServerMetrics(),
        access_log=AccessLog(tmp_path),
        template=ACCEPTS_ALL,
        max_model_len=512,
    )


def test_it_leaves_then_drains_and_is_alive_to_the_end(service, monkeypatch):
    """/ready says 503 at once while work is taken; then work is refused, until what runs has ended; then it stops."""
    killed: list[int] = []
    monkeypatch.setattr(vllm_plugin.os, "kill", lambda pid, number: killed.append(number))
    leaving = asyncio.Event()

    async def rest(seconds: float) -> None:
        if seconds == 600:
            await leaving.wait()
        else:
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)

    async def scene() -> None:
        app = types.SimpleNamespace(state=types.SimpleNamespace(counsel=service))

        async def gate(scope, receive, send):
            await Gateway(engine)({**scope, "app": app}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:

            async def seen() -> tuple[int, int, int]:
                work = await client.post("/v1/chat/completions", json=ASK)
                ready, health = await client.get("/ready"), await client.get("/health")
                return ready.status_code, work.status_code, health.status_code

            assert await seen() == (200, 200, 200)
            running = service.limits.enter("somebody", 1)
            monkeypatch.setattr(vllm_plugin, "asyncio", types.SimpleNamespace(sleep=rest))
            stopping = asyncio.create_task(vllm_plugin._stop(service, 600))
            while not service.leaving:
                await asyncio.sleep(0)
            assert await seen() == (503, 200, 200)
            leaving.set()
            while not service.draining:
                await asyncio.sleep(0)
            assert await seen() == (503, 503, 200)
            assert killed == []
            service.limits.leave("somebody", 1, running)
            await stopping
            assert killed == [vllm_plugin.signal.SIGTERM]

    asyncio.run(scene())
