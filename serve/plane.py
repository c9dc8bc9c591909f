"""Which adapters are in the engine: loaded when first asked for, swapped when replaced, let go when idle.

A request names an adapter; `resolve` turns the name into one exact version, `acquire` loads it once however many
requests ask together, and `release` gives it back. A version is immutable and its served name (`name@version`) stands
for nothing else, ever, so a swap only changes what `name` means: running requests end where they began, new ones go to
the new version, and then the old one is unloaded.

Only the plane loads and unloads, and it never holds more adapters than the engine's host cache. So the engine never
evicts by itself, and never reads an adapter's files in the middle of a step.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from serve.openai_errors import Refusal
from train import store as shelves
from train.command import nearest
from train.errors import UserError
from train.store import Manifest, Shelf

log = logging.getLogger("vllm.counsel")

POLL_S = 0.25
# A request that was cut short may linger in the engine for a step after its connection closed.
SETTLE_S = 0.5
ROOM_WAIT_S = 30.0
RETRY_S = 1.0


class Engine(Protocol):
    """What the plane asks of vLLM. Both return when the engine has done it; `load` raises Refusal when it cannot."""

    async def load(self, manifest: Manifest, path: Path) -> None: ...

    async def unload(self, manifest: Manifest) -> None: ...


@dataclass
class Resident:
    """A version in the engine, or on its way there."""

    manifest: Manifest
    loading: asyncio.Task[None] = field(repr=False)
    in_flight: int = 0
    idle_since_s: float = field(default_factory=time.monotonic)
    retiring: bool = False

    @property
    def idle_s(self) -> float:
        """Seconds since its last request ended; 0 while it loads or answers."""
        return time.monotonic() - self.idle_since_s if self.loading.done() and not self.in_flight else 0.0


class Plane:
    """The adapters of one store on one base, as one engine holds them. Lives on one event loop."""

    def __init__(
        self,
        engine: Engine,
        store: Path,
        base_name: str,
        base_fingerprint: str,
        capacity: int,
        max_rank: int,
        on_event: Callable[[str, Manifest, float], None],
    ) -> None:
        """`on_event(event, manifest, seconds)` is told of `load`, `unload`, `evict`, `fail` and `gone`."""
        self.engine, self.store, self.on_event = engine, store, on_event
        self.base_name, self.base_fingerprint = base_name, base_fingerprint
        self.capacity, self.max_rank = capacity, max_rank
        self.shelves: dict[str, Shelf] = {}
        self.serving: dict[str, str] = {}
        self.withdrawn: set[str] = set()
        self.failed: dict[str, str] = {}
        self.residents: dict[str, Resident] = {}
        self._stamps: dict[str, int] = {}
        self._complaints: dict[str, str] = {}
        self._behind, self._swapping = set[str](), set[str]()
        self._refreshing, self._one_load = asyncio.Lock(), asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    # What is there

    def why_not(self, manifest: Manifest) -> str | None:
        """Why a published version cannot be served here; None when it can."""
        if manifest.base["fingerprint"] != self.base_fingerprint:
            return f"it was made for base {manifest.base['name']} ({manifest.base['fingerprint'][:12]}), not this one"
        if manifest.rank > self.max_rank:
            return f"its rank {manifest.rank} is above this server's --max-rank {self.max_rank}"
        if manifest.id in self.withdrawn:
            return "it was unloaded by an admin; load it again or publish a new version"
        return self.failed.get(manifest.id)

    def meaning(self, name: str) -> Manifest | None:
        """The version that `name` means now: the newest that is loaded, or the current one to be loaded."""
        shelf = self.shelves.get(name)
        if shelf is None:
            return None
        return shelf.versions.get(self.serving.get(name, "")) or shelf.versions.get(shelf.current or "")

    def servable(self) -> list[Manifest]:
        """Every version that may be asked for, by name and age."""
        return [m for shelf in self.shelves.values() for m in shelf.versions.values() if self.why_not(m) is None]

    def state(self, manifest: Manifest) -> str:
        """`loaded`, `loading`, `draining`, `published` (loads when asked for) or `refused`."""
        resident = self.residents.get(manifest.id)
        if resident is None:
            return "published" if self.why_not(manifest) is None else "refused"
        if resident.retiring:
            return "draining"
        return "loaded" if resident.loading.done() else "loading"

    def in_flight(self, manifest: Manifest) -> int:
        """How many requests a version is answering."""
        resident = self.residents.get(manifest.id)
        return resident.in_flight if resident else 0

    async def resolve(self, model: str) -> Manifest:
        """The version that `model` (`name` or `name@version`) means. Raises Refusal: 404 with the nearest names."""
        manifest = self._find(model)
        if manifest is None:
            # It may have been published a moment ago.
            await self.refresh()
            manifest = self._find(model)
        if manifest is None:
            known = [self.base_name, *{m.name for m in self.servable()}]
            if "@" in model:
                known += [m.id for m in self.servable()]
            raise Refusal(
                404,
                f"the model {model!r} does not exist; {nearest(model, known)}",
                param="model",
                code="model_not_found",
            )
        reason = self.why_not(manifest)
        if reason is not None:
            raise Refusal(404, f"the model {model!r} is not served: {reason}", param="model", code="model_not_found")
        return manifest

    def _find(self, model: str) -> Manifest | None:
        name, _, version = model.partition("@")
        if not version:
            return self.meaning(name)
        shelf = self.shelves.get(name)
        return shelf.versions.get(version) if shelf else None

    # Requests

    async def acquire(self, manifest: Manifest) -> Resident:
        """Hold a version in the engine, loading it if need be. Pair with `release`. Raises Refusal when it cannot."""
        resident = self.residents.get(manifest.id) or self._admit(manifest)
        resident.in_flight += 1
        with contextlib.ExitStack() as undo:
            undo.callback(self.release, resident)
            # Shielded: a caller who hangs up must not cancel the load that others wait for.
            await asyncio.shield(resident.loading)
            undo.pop_all()
        shelf = self.shelves.get(manifest.name)
        if shelf is not None and shelf.current == manifest.version:
            # From now on its name means it until the next one is loaded, and not just published.
            self.serving.setdefault(manifest.name, manifest.version)
        return resident

    def release(self, resident: Resident) -> None:
        """Give back what `acquire` gave."""
        resident.in_flight -= 1
        resident.idle_since_s = time.monotonic()

    # Loading

    def _admit(self, manifest: Manifest) -> Resident:
        resident = Resident(manifest, asyncio.create_task(self._load(manifest)))
        # The failure is told to each who waits; when all of them hung up, to nobody.
        resident.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.residents[manifest.id] = resident
        return resident

    async def _load(self, manifest: Manifest) -> None:
        started_s = time.monotonic()
        with contextlib.ExitStack() as undo:
            # However it fails, nothing that is not in the engine may look as if it were.
            undo.callback(self.residents.__delitem__, manifest.id)
            try:
                async with self._one_load:
                    await self._make_room(manifest, give_up_s=started_s + ROOM_WAIT_S)
                    await self.engine.load(manifest, shelves.version_dir(self.store, manifest))
            except Refusal as refusal:
                self.on_event("fail", manifest, time.monotonic() - started_s)
                log.warning("could not load %s: %s", manifest.id, refusal.message)
                raise
            undo.pop_all()
        self.on_event("load", manifest, time.monotonic() - started_s)

    async def _make_room(self, manifest: Manifest, give_up_s: float) -> None:
        """Evict the least recently used until one more fits; Refusal 503 when all stay busy, or are pinned."""
        while sum(resident.loading.done() for resident in self.residents.values()) >= self.capacity:
            others = [r for r in self.residents.values() if r.loading.done() and not self._pinned(r.manifest)]
            idle = [r for r in others if r.idle_s >= SETTLE_S]
            if idle:
                await self._unload(min(idle, key=lambda r: r.idle_since_s), "evict")
            elif not others:
                raise Refusal(
                    503, f"no room for {manifest.id}: all {self.capacity} adapters are pinned", retry_after_s=60
                )
            elif time.monotonic() > give_up_s:
                raise Refusal(503, f"no room for {manifest.id}: all {self.capacity} adapters are busy", retry_after_s=5)
            else:
                await asyncio.sleep(0.05)

    async def _unload(self, resident: Resident, event: str) -> None:
        manifest = resident.manifest
        del self.residents[manifest.id]
        await self.engine.unload(manifest)
        self.on_event(event, manifest, 0.0)

    def _pinned(self, manifest: Manifest) -> bool:
        shelf = self.shelves.get(manifest.name)
        return shelf is not None and shelf.pinned and self.meaning(manifest.name) == manifest

    async def retire(self, served_id: str) -> None:
        """Unload a version once its running requests have ended."""
        resident = self.residents.get(served_id)
        if resident is None or resident.retiring:
            return
        resident.retiring = True
        while resident.idle_s < SETTLE_S:
            await asyncio.sleep(0.05)
        if self.residents.get(served_id) is not resident:
            return
        manifest = resident.manifest
        if self.meaning(manifest.name) == manifest and self.why_not(manifest) is None:
            # Its name was rolled back to it while it drained.
            resident.retiring = False
        else:
            await self._unload(resident, "unload")

    # The store

    async def start(self) -> None:
        """Read the store and load what names mean now: pinned first, then the newest, as many as fit."""
        await self.refresh(swap=False)
        wanted = [manifest for name in self.shelves if (manifest := self.meaning(name)) and not self.why_not(manifest)]
        wanted.sort(key=lambda manifest: (self._pinned(manifest), manifest.created_utc), reverse=True)
        for manifest in wanted[: self.capacity]:
            await self._try_serving(manifest)

    async def watch(self) -> None:
        """Follow the store for ever: what is published is loaded, what is replaced or removed is unloaded."""
        while True:
            await asyncio.sleep(POLL_S)
            await self.refresh()

    async def refresh(self, swap: bool = True) -> None:
        """Read what changed in the store since the last time, and act on it if `swap`."""
        async with self._refreshing:
            changed = await asyncio.to_thread(self._read_changes)
            for name, shelf in changed.items():
                before = self.shelves.get(name)
                for manifest in shelf.versions.values():
                    # Something was done about this name: what failed to load may load now.
                    self.failed.pop(manifest.id, None)
                if shelf.versions:
                    self.shelves[name] = shelf
                else:
                    self.shelves.pop(name, None)
                    self.serving.pop(name, None)
                if swap:
                    self._behind.add(name)
                    self._follow(before, shelf)
            self._catch_up()

    def _read_changes(self) -> dict[str, Shelf]:
        changed: dict[str, Shelf] = {}
        try:
            seen = shelves.names(self.store)
        except OSError as error:
            self._complain(str(self.store), error)
            return changed
        for name in seen:
            folder = self.store / name
            try:
                stamp = folder.stat().st_mtime_ns
                if self._stamps.get(name) == stamp:
                    continue
                changed[name] = shelves.read_shelf(self.store, name)
            except (UserError, OSError) as error:
                self._complain(name, error)
                continue
            self._complaints.pop(name, None)
            # A folder changed within the clock's grain may change again unseen: read it once more next time.
            fresh = time.time_ns() - stamp < 100_000_000
            self._stamps[name] = -1 if fresh else stamp
        for name in set(self._stamps) - set(seen):
            del self._stamps[name]
            changed[name] = Shelf(name, None, {}, pinned=False)
        return changed

    def _complain(self, name: str, error: Exception) -> None:
        """Log what is wrong once, not four times a second until it is mended."""
        if self._complaints.get(name) != str(error):
            self._complaints[name] = str(error)
            log.warning("left %s in the store as it was: %s", name, error)

    def _follow(self, before: Shelf | None, after: Shelf) -> None:
        for version, manifest in (before.versions if before else {}).items():
            if version not in after.versions:
                self._spawn(self._forget(manifest))
        if after.current is None:
            return
        current = after.versions[after.current]
        if before is not None and before.current != after.current:
            # Publishing or rolling back anew ends an admin's unload.
            self.withdrawn.discard(current.id)

    def _catch_up(self) -> None:
        """Swap in what changed, and again what there was no room for."""
        for name in list(self._behind - self._swapping):
            shelf = self.shelves.get(name)
            current = shelf.versions.get(shelf.current or "") if shelf else None
            if current is None or self.serving.get(name) == current.version or self.why_not(current) is not None:
                self._behind.discard(name)
            else:
                self._swapping.add(name)
                self._spawn(self._swap(current))

    async def _forget(self, manifest: Manifest) -> None:
        await self.retire(manifest.id)
        self.withdrawn.discard(manifest.id)
        self.failed.pop(manifest.id, None)
        self.on_event("gone", manifest, 0.0)

    async def _swap(self, manifest: Manifest) -> None:
        old = self.meaning(manifest.name)
        await self._try_serving(manifest)
        if self.serving.get(manifest.name) != manifest.version and self.why_not(manifest) is None:
            await asyncio.sleep(RETRY_S)
        self._swapping.discard(manifest.name)
        if old is not None and old != manifest and self.meaning(manifest.name) == manifest:
            await self.retire(old.id)

    async def _try_serving(self, manifest: Manifest) -> None:
        """Load a version and let its name mean it; when that fails, keep the reason and what the name meant."""
        try:
            resident = await self.acquire(manifest)
        except Refusal as refusal:
            if refusal.status != 503:
                self.failed[manifest.id] = refusal.message
            return
        self.release(resident)
        shelf = self.shelves.get(manifest.name)
        if shelf is not None and shelf.current == manifest.version:
            self.serving[manifest.name] = manifest.version

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
