"""The parent's side of an engine without a port, with a pipe instead of a child."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

from counsel.catalog import Base
from serve.config import ServeConfig
from serve.offline import OfflineAnswer, OfflineEngine


def test_cancelling_one_request_leaves_the_others(tiny_model: Base, tmp_path: Path) -> None:
    """An answer to a request that was just cancelled, whose task has not run since, does not block the next answer."""

    async def run() -> list[object]:
        engine = OfflineEngine(ServeConfig(model=str(tiny_model.path)), tmp_path / "engine.log")
        stdout = asyncio.StreamReader()
        engine.process, engine._ready = SimpleNamespace(stdout=stdout), asyncio.Event()
        engine._stdin = SimpleNamespace(write=lambda line: None)
        engine._listening = asyncio.create_task(engine._listen())
        first, second = (asyncio.create_task(engine.ask("/v1/completions", {})) for _ in range(2))
        while len(engine._pending) < 2:
            await asyncio.sleep(0)

        stdout.feed_data(json.dumps({"number": 1, "status": 200, "body": {}}).encode() + b"\n")
        first.cancel()
        stdout.feed_data(json.dumps({"number": 2, "status": 200, "body": {"id": "two"}}).encode() + b"\n")
        return await asyncio.gather(first, second, return_exceptions=True)

    cancelled, answer = asyncio.run(run())

    assert isinstance(cancelled, asyncio.CancelledError)
    assert answer == OfflineAnswer(200, {"id": "two"})
