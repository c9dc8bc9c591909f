"""Which adapters are in the engine: loaded when first asked for, swapped when replaced, let go when idle.

A request names an adapter; `resolve` turns the name into one exact version, `acquire` loads it once however many
requests ask together, and `release` gives it back. A version is immutable and its served name (`name@version`) stands
for nothing else, ever, so a swap only changes what `name` means: running requests end where they began, new ones go to
the new version, and then the old one is unloaded.

Only the pool loads and unloads, and it never holds more adapters than the engine's host cache. So the engine never
evicts by itself, and never reads an adapter's files in the middle of a step. What is published is loaded beforehand
where there is room, or where its name is in the engine already; one after the other, so that requests' loads pass.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counsel import store as adapter_store
from counsel.cli import nearest
from counsel.store import AdapterVersions, Manifest
from serve.api_errors import ApiError
from serve.engine import Engine
from serve.server_registry import Presence
from serve.store_watcher import StoreReader

log = logging.getLogger("vllm.counsel")

POLL_S = 0.25
# A request that was cut short may linger in the engine for a step after its connection closed.
SETTLE_S = 0.5
ROOM_WAIT_S = 30.0
RETRY_S = 1.0
# The longest name and version, and as much again for what was mistyped.
MAX_SEARCHED = 160


@dataclass
class LoadedAdapter:
    """A version in the engine, or on its way there."""

    manifest: Manifest
    loading: asyncio.Task[None] = field(repr=False)
    room_wait_s: float = 0.0
    in_flight: int = 0
    idle_since_s: float = field(default_factory=time.monotonic)
    retiring: bool = False

    @property
    def idle_s(self) -> float:
        """Seconds since its last request ended; 0 while it loads or answers."""
        return time.monotonic() - self.idle_since_s if self.loading.done() and not self.in_flight else 0.0


class AdapterPool:
    """The adapters of one store on one base, as one engine holds them. Lives on one event loop."""

    def __init__(
        self,
        engine: Engine,
        store: Path,
        base_name: str,
        presence: Presence,
        capacity: int,
        on_event: Callable[[str, Manifest, float], None],
    ) -> None:
        """`on_event(event, manifest, seconds)` is told of `load`, `unload`, `evict`, `fail` and `gone`."""
        self.engine, self.store, self.on_event = engine, store, on_event
        self.base_name, self.presence, self.capacity = base_name, presence, capacity
        self.published: dict[str, AdapterVersions] = {}
        self.serving: dict[str, str] = {}
        self.unloaded_by_admin: set[str] = set()
        self.failed: dict[str, str] = {}
        self.loaded_adapters: dict[str, LoadedAdapter] = {}
        self._reader = StoreReader(store)
        self._unserved: dict[str, str] = {}
        self._pending_swaps: dict[str, None] = {}
        self._catching_up: asyncio.Task[None] | None = None
        self._refreshing, self._one_load = asyncio.Lock(), asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def unservable_reason(self, manifest: Manifest) -> str | None:
        """Why a published version cannot be served here; None when it can."""
        if reason := self.presence.unservable_reason(manifest):
            return reason
        if manifest.id in self.unloaded_by_admin:
            return "it was unloaded by an admin; load it again or publish a new version"
        return self.failed.get(manifest.id)

    def current_version(self, name: str) -> Manifest | None:
        """The version that `name` means now.

        The one that is loaded for it; else the current one; where that cannot be served, the last that it meant and
        that can be.
        """
        adapter = self.published.get(name)
        if adapter is None:
            return None
        current = adapter.versions.get(adapter.current or "")
        standing = adapter.versions.get(self.serving.get(name, ""))
        earlier = [adapter.versions[version] for version in reversed(adapter.history)]
        wanted = [version for version in (standing, current, *earlier) if version is not None]
        # One that an admin unloaded is not stood in for.
        found = (m for m in wanted if m.id in self.unloaded_by_admin or self.unservable_reason(m) is None)
        return next(found, current)

    def means(self, manifest: Manifest) -> bool:
        """Whether its name means this version now."""
        meant = self.current_version(manifest.name)
        return meant is not None and meant.id == manifest.id

    def servable(self) -> list[Manifest]:
        """Every version that may be asked for, by name and age."""
        return [
            m
            for adapter in self.published.values()
            for m in adapter.versions.values()
            if self.unservable_reason(m) is None
        ]

    def state(self, manifest: Manifest) -> str:
        """`loaded`, `loading`, `draining`, `published` (loads when asked for) or `refused`."""
        loaded = self.loaded_adapters.get(manifest.id)
        if loaded is None:
            return "published" if self.unservable_reason(manifest) is None else "refused"
        if loaded.retiring:
            return "draining"
        return "loaded" if loaded.loading.done() else "loading"

    def in_flight(self, manifest: Manifest) -> int:
        """How many requests a version is answering."""
        return loaded.in_flight if (loaded := self.loaded_adapters.get(manifest.id)) else 0

    async def resolve(self, model: str) -> Manifest:
        """The version that `model` (`name` or `name@version`) means. Raises ApiError: 404 with the nearest names."""
        manifest = self._find(model)
        if manifest is None and await asyncio.to_thread(self._reader.is_new, model.partition("@")[0]):
            await self.refresh()
            manifest = self._find(model)
        if manifest is None:
            known = [self.base_name, *{m.name for m in self.servable()}]
            if "@" in model:
                known += [m.id for m in self.servable()]
            # A name longer than any that could be meant is not told in full, nor searched for.
            shown = model[:MAX_SEARCHED]
            hint = await asyncio.to_thread(nearest, model, known) if shown == model else "and it is cut here: too long"
            raise ApiError(404, f"the model {shown!r} does not exist; {hint}", param="model", code="model_not_found")
        reason = self.unservable_reason(manifest)
        if reason is not None:
            raise ApiError(404, f"the model {model!r} is not served: {reason}", param="model", code="model_not_found")
        return manifest

    def _find(self, model: str) -> Manifest | None:
        name, at, version = model.partition("@")
        if not at:
            return self.current_version(name)
        adapter = self.published.get(name)
        return adapter.versions.get(version) if adapter else None

    async def acquire(self, manifest: Manifest, room_wait_s: float | None = None) -> LoadedAdapter:
        """Hold a version in the engine, loading it if need be. Pair with `release`. Raises ApiError when it cannot.

        room_wait_s: how long to wait where all places are busy; by default ROOM_WAIT_S.
        """
        wait_s = ROOM_WAIT_S if room_wait_s is None else room_wait_s
        while True:
            loaded = self.loaded_adapters.get(manifest.id) or self._admit(manifest, wait_s)
            loaded.in_flight += 1
            with contextlib.ExitStack() as undo:
                undo.callback(self.release, loaded)
                try:
                    # Shielded: a caller who hangs up must not cancel the load that others wait for.
                    await asyncio.shield(loaded.loading)
                except ApiError as refusal:
                    # It joined a load that would not wait for room, as it would itself.
                    if refusal.status == 503 and loaded.room_wait_s < wait_s:
                        continue
                    raise
                undo.pop_all()
            break
        adapter = self.published.get(manifest.name)
        if adapter is not None and adapter.current == manifest.version:
            # From now on its name means it until the next one is loaded, and not just published.
            self.serving.setdefault(manifest.name, manifest.version)
        return loaded

    def release(self, loaded: LoadedAdapter) -> None:
        """Give back what `acquire` gave."""
        loaded.in_flight -= 1
        loaded.idle_since_s = time.monotonic()

    def _admit(self, manifest: Manifest, room_wait_s: float) -> LoadedAdapter:
        loaded = LoadedAdapter(manifest, asyncio.create_task(self._load(manifest, room_wait_s)), room_wait_s)
        # Each who waits is told of a failure; when all of them hung up, nobody is.
        loaded.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.loaded_adapters[manifest.id] = loaded
        return loaded

    async def _load(self, manifest: Manifest, room_wait_s: float) -> None:
        started_s = time.monotonic()
        with contextlib.ExitStack() as undo:
            # However it fails, nothing that is not in the engine may look as if it were.
            undo.callback(self.loaded_adapters.__delitem__, manifest.id)
            try:
                async with self._one_load:
                    await self._make_room(manifest, give_up_s=started_s + room_wait_s)
                    await self.engine.load(manifest, adapter_store.version_dir(self.store, manifest))
            except Exception as error:
                self.on_event("fail", manifest, time.monotonic() - started_s)
                if isinstance(error, ApiError):
                    if error.status != 503 or room_wait_s > 0:  # what nobody waits for is tried again and again
                        log.warning("could not load %s: %s", manifest.id, error.message)
                    raise
                # A fault of ours, or of the machine: told in full, and to who waits as a refusal like any other.
                log.exception("could not load %s", manifest.id)
                raise ApiError(500, f"{manifest.id} could not be loaded: {type(error).__name__}") from error
            undo.pop_all()
        self.on_event("load", manifest, time.monotonic() - started_s)

    async def _make_room(self, manifest: Manifest, give_up_s: float) -> None:
        """Evict the least recently used until one more fits; ApiError 503 when all stay busy, or are pinned."""
        while sum(loaded.loading.done() for loaded in self.loaded_adapters.values()) >= self.capacity:
            others = [r for r in self.loaded_adapters.values() if r.loading.done() and not self._pinned(r.manifest)]
            idle = [r for r in others if r.idle_s >= SETTLE_S]
            if idle:
                await self._unload(min(idle, key=lambda r: r.idle_since_s), "evict")
            elif not others:
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

    def _pinned(self, manifest: Manifest) -> bool:
        adapter = self.published.get(manifest.name)
        return adapter is not None and adapter.pinned and self.means(manifest)

    async def retire(self, served_id: str) -> None:
        """Unload a version once its running requests have ended; return when it is done, whoever asked for it first."""
        loaded = self.loaded_adapters.get(served_id)
        if loaded is None:
            return
        if loaded.retiring:
            while self.loaded_adapters.get(served_id) is loaded and loaded.retiring:
                await asyncio.sleep(0.05)
            return
        loaded.retiring = True
        try:
            while loaded.idle_s < SETTLE_S:
                await asyncio.sleep(0.05)
            if self.loaded_adapters.get(served_id) is not loaded:
                return
            # Its name may have been rolled back to it while it drained.
            if not self.means(loaded.manifest) or self.unservable_reason(loaded.manifest) is not None:
                await self._unload(loaded, "unload")
        finally:
            loaded.retiring = False

    async def start(self) -> None:
        """Read the store and load what names mean now: pinned first, then the newest, as many as fit."""
        await self.refresh(swap=False)
        current = [manifest for name in self.published if (manifest := self.current_version(name))]
        wanted = [manifest for manifest in current if self.unservable_reason(manifest) is None]
        wanted.sort(key=lambda manifest: (self._pinned(manifest), manifest.created_utc), reverse=True)
        for manifest in wanted[: self.capacity]:
            await self._try_serving(manifest)

    async def watch(self) -> None:
        """Follow the store for ever: what is published is loaded, what is replaced or removed is unloaded."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception:
                # Whatever it was, the next look may go well, and nobody else would look.
                log.exception("could not follow the store")

    async def refresh(self, swap: bool = True) -> None:
        """Read what changed in the store since the last time, and act on it if `swap`."""
        async with self._refreshing:
            changed = await asyncio.to_thread(self._reader.changes, dict(self.published))
            for name, adapter in changed.items():
                before = self.published.get(name)
                for manifest in adapter.versions.values():
                    # Something was done about this name: what failed to load may load now.
                    self.failed.pop(manifest.id, None)
                if adapter.versions:
                    self.published[name] = adapter
                else:
                    self.published.pop(name, None)
                    self.serving.pop(name, None)
                if swap:
                    self._apply_changes(before, adapter)
                self._tell_unserved(adapter)
            if swap and self._pending_swaps and (self._catching_up is None or self._catching_up.done()):
                self._catching_up = self._spawn(self._start_swaps())

    def _tell_unserved(self, adapter: AdapterVersions) -> None:
        current = adapter.versions.get(adapter.current or "")
        reason = self.unservable_reason(current) if current else None
        if current is None or reason is None:
            self._unserved.pop(adapter.name, None)
            return
        meant = self.current_version(adapter.name)
        goes_on = f"{meant.id} goes on" if meant and meant.id != current.id else "its name is not served"
        said = f"{current.id} cannot be served: {reason}; {goes_on}"
        if self._unserved.get(adapter.name) != said:
            self._unserved[adapter.name] = said
            log.warning("%s", said)

    def _apply_changes(self, before: AdapterVersions | None, after: AdapterVersions) -> None:
        for version, manifest in (before.versions if before else {}).items():
            if version not in after.versions:
                self._spawn(self._forget(manifest))
        if after.current is None:
            return
        current = after.versions[after.current]
        if before is not None and before.current != after.current:
            # Publishing or rolling back anew ends an admin's unload.
            self.unloaded_by_admin.discard(current.id)
        self._pending_swaps[after.name] = None

    async def _start_swaps(self) -> None:
        """Load what changed, one name after the other, and again what there was no room for."""
        while self._pending_swaps:
            for name in list(self._pending_swaps):
                adapter = self.published.get(name)
                current = adapter.versions.get(adapter.current or "") if adapter else None
                if current is None or self.unservable_reason(current) is not None:
                    self._pending_swaps.pop(name, None)
                elif not self._is_due(current):
                    # Loaded when it is asked for. Nothing of its name is in the engine to stay with until then.
                    self._pending_swaps.pop(name, None)
                    self.serving.pop(name, None)
                else:
                    await self._try_serving(current, room_wait_s=0.0)
                    if self.serving.get(name) == current.version:
                        self._pending_swaps.pop(name, None)
                        self.turn(current)
            if self._pending_swaps:
                await asyncio.sleep(RETRY_S)

    def _is_due(self, current: Manifest) -> bool:
        """Whether a version is loaded before anybody asks for it: not where it would turn another name out."""
        loaded = any(held.manifest.name == current.name for held in self.loaded_adapters.values())
        return loaded or self._pinned(current) or len(self.loaded_adapters) < self.capacity

    def turn(self, current: Manifest) -> None:
        """Let a name mean its current version, which is in the engine, and let go of the others when they are idle."""
        if self.published[current.name].current != current.version:
            return
        self.serving[current.name] = current.version
        for served_id, loaded in self.loaded_adapters.items():
            if loaded.manifest.name == current.name and served_id != current.id and not loaded.retiring:
                self._spawn(self.retire(served_id))

    async def _forget(self, manifest: Manifest) -> None:
        await self.retire(manifest.id)
        adapter = self.published.get(manifest.name)
        if adapter is not None and manifest.version in adapter.versions:
            return  # published again meanwhile
        self.unloaded_by_admin.discard(manifest.id)
        self.failed.pop(manifest.id, None)
        self.on_event("gone", manifest, 0.0)

    async def _try_serving(self, manifest: Manifest, room_wait_s: float | None = None) -> None:
        """Load a version and let its name mean it; when that fails, keep the reason and what the name meant."""
        try:
            loaded = await self.acquire(manifest, room_wait_s)
        except ApiError as refusal:
            if refusal.status != 503:
                self.failed[manifest.id] = refusal.message
                if (adapter := self.published.get(manifest.name)) is not None:
                    self._tell_unserved(adapter)
            return
        self.release(loaded)
        adapter = self.published.get(manifest.name)
        if adapter is not None and adapter.current == manifest.version:
            self.serving[manifest.name] = manifest.version

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # Held here: the event loop itself holds tasks only weakly. A failure is told by asyncio when it is dropped.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
