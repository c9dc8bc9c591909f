"""A pool and a store watcher on an engine that only keeps a log, and a store of adapters without weights."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

from counsel import store as adapter_store
from counsel.files import write_json
from counsel.store import Manifest
from serve.adapter_pool import AdapterPool
from serve.api_errors import ApiError
from serve.name_table import NameTable
from serve.server_registry import ServerRecord
from serve.store_watcher import StoreWatcher
from tests.waiting import HANG_S

MAX_LORA_RANK = 16


class FakeEngine:
    """Logs `+name` and `-name`, takes a moment to load, and can be made to refuse a version or to break on it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refuses: set[str] = set()
        self.breaks: set[str] = set()
        self.on_unload: Callable[[], object] = lambda: None

    async def load(self, manifest: Manifest, path: Path) -> None:
        await asyncio.sleep(0.01)
        if manifest.id in self.refuses:
            raise ApiError(500, "no")
        if manifest.id in self.breaks:
            raise KeyError("sha256")
        self.log.append(f"+{manifest.name}")

    async def unload(self, manifest: Manifest) -> None:
        self.on_unload()
        self.log.append(f"-{manifest.name}")


def new_pool(
    capacity: int, store: Path, on_event: Callable[[str, Manifest, float], None] = lambda *_: None
) -> tuple[AdapterPool, FakeEngine]:
    engine = FakeEngine()
    names = NameTable("tiny", ServerRecord("", "f00d", MAX_LORA_RANK))
    return AdapterPool(engine, store, names, capacity, on_event), engine


def new_watcher(
    capacity: int, store: Path, on_event: Callable[[str, Manifest, float], None] = lambda *_: None
) -> tuple[StoreWatcher, FakeEngine]:
    pool, engine = new_pool(capacity, store, on_event)
    return StoreWatcher(pool), engine


def put_in_store(store: Path, manifest: Manifest, *, pinned: bool = False) -> None:
    """Put a manifest without files where `publish` would, and make it current."""
    write_json(store / manifest.name / manifest.version / "manifest.json", dataclasses.asdict(manifest))
    if pinned:
        (store / manifest.name / "pinned").touch()
    adapter_store.make_current(store, manifest)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():
            await asyncio.sleep(0.02)
