"""Which adapters are in the engine: each loaded once, however many requests ask for it, and unloaded when idle.

Only the pool loads and unloads, and it never holds more adapters than the engine's host cache. So the engine never
evicts by itself, and never reads an adapter's files in the middle of a step.

The states of a version (`AdapterPool.state`):

| state     | what it is                            | next state, and what leads to it                                |
|-----------|---------------------------------------|-----------------------------------------------------------------|
| published | servable, not in the engine           | loading: a request names it, or StoreWatcher loads it unasked   |
| loading   | waiting for room, or being read       | loaded; published or refused: the load failed                   |
| loaded    | in the engine                         | draining: replaced, removed or unloaded; published: evicted     |
| draining  | finishing its last requests           | published: idle; refused: idle, and an admin unloaded it;       |
|           |                                       | loaded: its name means it again meanwhile                       |
| refused   | see `NameTable.unservable_reason`     | published: its name changed in the store, or an admin loads it  |
| (pending  | the name's current version changed    | done: that version is loaded and the name means it, it is       |
| swap)     | and is not what the name means yet    | refused, or it is left until a request names it                 |

A removed version drains like a replaced one and then has no state. Pending swaps are kept by serve/store_watcher.py.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from counsel import store as adapter_store
from counsel.store import Manifest
from serve.api_errors import ApiError
from serve.engine import Engine
from serve.name_table import NameTable

log = logging.getLogger("vllm.counsel")

# A request that was cut short may remain in the engine for one step after its connection closed.
SETTLE_S = 0.5
ROOM_WAIT_S = 30.0


@dataclass
class LoadedAdapter:
    """A version that is in the engine, or is being loaded."""

    manifest: Manifest
    loading: asyncio.Task[None] = field(repr=False)
    room_wait_s: float = 0.0
    in_flight: int = 0
    idle_since_s: float = field(default_factory=time.monotonic)
    draining: bool = False

    @property
    def idle_s(self) -> float:
        """Seconds since its last request ended; 0 while it loads or answers."""
        return time.monotonic() - self.idle_since_s if self.loading.done() and not self.in_flight else 0.0


class AdapterPool:
    """The adapters that one engine holds. Lives on one event loop."""

    def __init__(
        self,
        engine: Engine,
        store: Path,
        names: NameTable,
        capacity: int,
        on_event: Callable[[str, Manifest, float], None],
    ) -> None:
        """`on_event(event, manifest, seconds)` gets each `load`, `unload`, `evict`, `fail` and `gone`."""
        self.engine, self.store, self.names = engine, store, names
        self.capacity, self.on_event = capacity, on_event
        self.loaded_adapters: dict[str, LoadedAdapter] = {}
        self._one_load = asyncio.Lock()

    def state(self, manifest: Manifest) -> str:
        """One of the states in the module's table."""
        loaded = self.loaded_adapters.get(manifest.id)
        if loaded is None:
            return "published" if self.names.unservable_reason(manifest) is None else "refused"
        if loaded.draining:
            return "draining"
        return "loaded" if loaded.loading.done() else "loading"

    def in_flight(self, manifest: Manifest) -> int:
        """The number of requests that a version is answering."""
        return loaded.in_flight if (loaded := self.loaded_adapters.get(manifest.id)) else 0

    async def acquire(self, manifest: Manifest, room_wait_s: float | None = None) -> LoadedAdapter:
        """Hold a version in the engine, and load it if necessary. Pair with `release`. Raises ApiError on failure.

        room_wait_s: how long to wait while all places are busy; by default ROOM_WAIT_S.
        """
        wait_s = ROOM_WAIT_S if room_wait_s is None else room_wait_s
        while True:
            loaded = self.loaded_adapters.get(manifest.id) or self._begin_load(manifest, wait_s)
            loaded.in_flight += 1
            with contextlib.ExitStack() as undo:
                undo.callback(self.release, loaded)
                try:
                    # Shielded: a caller that disconnects must not cancel the load that others wait for.
                    await asyncio.shield(loaded.loading)
                except ApiError as error:
                    # This caller joined a load that waits for room less long than this caller would.
                    if error.status == 503 and loaded.room_wait_s < wait_s:
                        continue
                    raise
                undo.pop_all()
            break
        if self.names.is_store_current(manifest):
            # From now on its name means it until the next version is loaded, not just published.
            self.names.serving.setdefault(manifest.name, manifest.version)
        return loaded

    def release(self, loaded: LoadedAdapter) -> None:
        """Give back what `acquire` returned."""
        loaded.in_flight -= 1
        loaded.idle_since_s = time.monotonic()

    async def unload_when_idle(self, served_id: str) -> None:
        """Unload a version after its running requests; return once it is unloaded, also if another call began it."""
        loaded = self.loaded_adapters.get(served_id)
        if loaded is None:
            return
        if loaded.draining:
            while self.loaded_adapters.get(served_id) is loaded and loaded.draining:
                await asyncio.sleep(0.05)
            return
        loaded.draining = True
        try:
            while loaded.idle_s < SETTLE_S:
                await asyncio.sleep(0.05)
            if self.loaded_adapters.get(served_id) is not loaded:
                return
            # A rollback, or a canary, may have made its name mean it again while it drained.
            if (
                not self.names.answers_with(loaded.manifest)
                or self.names.unservable_reason(loaded.manifest) is not None
            ):
                await self._unload(loaded, "unload")
        finally:
            loaded.draining = False

    def _begin_load(self, manifest: Manifest, room_wait_s: float) -> LoadedAdapter:
        loaded = LoadedAdapter(manifest, asyncio.create_task(self._load(manifest, room_wait_s)), room_wait_s)
        # Every waiting caller gets the exception. Reading it here keeps asyncio quiet when none is left.
        loaded.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.loaded_adapters[manifest.id] = loaded
        return loaded

    async def _load(self, manifest: Manifest, room_wait_s: float) -> None:
        started_s = time.monotonic()
        with contextlib.ExitStack() as undo:
            # However the load fails, a version that is not in the engine must not be listed as if it were.
            undo.callback(self.loaded_adapters.__delitem__, manifest.id)
            try:
                async with self._one_load:
                    await self._make_room(manifest, give_up_s=started_s + room_wait_s)
                    await self.engine.load(manifest, adapter_store.version_dir(self.store, manifest))
            except Exception as error:
                self.on_event("fail", manifest, time.monotonic() - started_s)
                if isinstance(error, ApiError):
                    # A load that does not wait for room is retried often, so it is not logged each time.
                    if error.status != 503 or room_wait_s > 0:
                        log.warning("could not load %s: %s", manifest.id, error.message)
                    raise
                # A bug or a machine fault: the traceback is logged, and callers get an ordinary error.
                log.exception("could not load %s", manifest.id)
                raise ApiError(500, f"{manifest.id} could not be loaded: {type(error).__name__}") from error
            undo.pop_all()
        self.on_event("load", manifest, time.monotonic() - started_s)

    async def _make_room(self, manifest: Manifest, give_up_s: float) -> None:
        """Evict the least recently used until one more fits; ApiError 503 when all stay busy, or are pinned."""
        while sum(loaded.loading.done() for loaded in self.loaded_adapters.values()) >= self.capacity:
            evictable = [
                loaded
                for loaded in self.loaded_adapters.values()
                if loaded.loading.done() and not self.names.pinned(loaded.manifest)
            ]
            idle = [loaded for loaded in evictable if loaded.idle_s >= SETTLE_S]
            if idle:
                await self._unload(min(idle, key=lambda loaded: loaded.idle_since_s), "evict")
            elif not evictable:
                raise ApiError(
                    503, f"no room for {manifest.id}: all {self.capacity} adapters are pinned", retry_after_s=60
                )
            elif time.monotonic() > give_up_s:
                raise ApiError(
                    503, f"no room for {manifest.id}: all {self.capacity} adapters are busy", retry_after_s=5
                )
            else:
                await asyncio.sleep(0.05)

    async def _unload(self, loaded: LoadedAdapter, event: str) -> None:
        manifest = loaded.manifest
        del self.loaded_adapters[manifest.id]
        await self.engine.unload(manifest)
        self.on_event(event, manifest, 0.0)
