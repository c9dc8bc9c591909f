"""A stop as a load balancer sees it: not ready but working, then draining, and healthy to the end."""

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
    """The application behind the gateway: answers everything."""
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


def test_a_stop_first_fails_ready_then_refuses_work_then_waits_for_what_runs(service, monkeypatch):
    """/ready is 503 at once while work is accepted; then work is refused; SIGTERM is sent once what runs has ended."""
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

        async def gateway(scope, receive, send):
            await Gateway(engine)({**scope, "app": app}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://localhost") as client:

            async def statuses() -> tuple[int, int, int]:
                work = await client.post("/v1/chat/completions", json=ASK)
                ready, health = await client.get("/ready"), await client.get("/health")
                return ready.status_code, work.status_code, health.status_code

            assert await statuses() == (200, 200, 200)
            running = service.limits.enter("somebody", 1)
            monkeypatch.setattr(vllm_plugin, "asyncio", types.SimpleNamespace(sleep=rest))
            stopping = asyncio.create_task(vllm_plugin._stop(service, 600))
            while not service.leaving:
                await asyncio.sleep(0)
            assert await statuses() == (503, 200, 200)
            leaving.set()
            while not service.draining:
                await asyncio.sleep(0)
            assert await statuses() == (503, 503, 200)
            assert killed == []
            service.limits.leave("somebody", 1, running)
            await stopping
            assert killed == [vllm_plugin.signal.SIGTERM]

    asyncio.run(scene())
