"""Follows the store while the server runs: loads what is published, and swaps what a name means.

A swap only changes what a name means. Running requests end on the version where they began, new ones go to the new
version, and then the old one is unloaded. A published version is loaded before a request names it if there is room, or
if its name is in the engine already. These loads run one at a time, so that loads for requests get in between.

A fleet gives each replica a list of names, and changes it (`preload`). Then only listed names are loaded before a
request names them, in that order; a name that is added to the list is loaded even if another is evicted for it.
"""

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from counsel.store import AdapterVersions, Manifest
from counsel.values import nearest
from serve.adapter_pool import AdapterPool
from serve.api_errors import ApiError
from serve.store_reader import StoreReader

log = logging.getLogger("vllm.counsel")

POLL_S = 0.25
RETRY_S = 1.0
# The longest name and version, and as much again for typing errors.
MAX_SEARCHED = 160


class StoreWatcher:
    """Keeps the names and the pool in step with the store. Lives on the pool's event loop."""

    def __init__(self, pool: AdapterPool, preload: Path | None = None) -> None:
        """preload: the file with the names to load first, one per line; None where there is none."""
        self.pool, self.names, self.preload = pool, pool.names, preload
        # Names in the file, and those of them that were added and are not loaded yet. A dict for its order.
        self._listed: dict[str, None] = {}
        self._added: set[str] = set()
        self._reader = StoreReader(pool.store)
        # Name -> the last warning that its current version cannot be served.
        self._warned: dict[str, str] = {}
        # A dict for its order.
        self._pending_swaps: dict[str, None] = {}
        self._swapping: asyncio.Task[None] | None = None
        self._refreshing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Read the store and load what names mean now: pinned ones first, then listed ones, or the newest, that fit."""
        await self.refresh(swap=False)
        current = [manifest for name in self.names.published if (manifest := self.names.current_version(name))]
        servable = [manifest for manifest in current if self.names.unservable_reason(manifest) is None]
        servable.sort(key=lambda manifest: manifest.created_utc, reverse=True)
        if self.preload:
            place = {name: number for number, name in enumerate(self._listed)}
            servable = [m for m in servable if m.name in place or self.names.pinned(m)]
            servable.sort(key=lambda manifest: place.get(manifest.name, 0))
        servable.sort(key=self.names.pinned, reverse=True)
        for manifest in servable[: self.pool.capacity]:
            await self._try_serving(manifest)
        for name in self.names.published:
            await self._load_canary(name)
        self._added.clear()

    async def watch(self) -> None:
        """Follow the store forever: load what is published, unload what is replaced or removed."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception:
                # Keep polling: the next look may succeed.
                log.exception("could not follow the store")

    async def refresh(self, swap: bool = True) -> None:
        """Read what changed in the store since the last time, and act on it if `swap`."""
        async with self._refreshing:
            changed = await asyncio.to_thread(self._reader.changes, dict(self.names.published))
            if self.preload:
                self._update_list(await asyncio.to_thread(_words_in, self.preload), swap)
            for adapter in changed.values():
                before = self.names.published.get(adapter.name)
                self.names.update(adapter)
                if swap:
                    self._apply_changes(before, adapter)
                self._warn_unserved(adapter.name)
            if swap and self._pending_swaps and (self._swapping is None or self._swapping.done()):
                self._swapping = self._spawn(self._make_swaps())

    async def resolve(self, model: str) -> Manifest:
        """The version that `model` (`name` or `name@version`) means. Raises ApiError: 404 with the nearest names."""
        manifest = self.names.find(model)
        if manifest is None:
            if await asyncio.to_thread(self._reader.is_new, model.partition("@")[0]):
                await self.refresh()
            elif self._refreshing.locked():
                # The look that is under way may have read the name; it is known when the look ends. Not read again:
                # unknown names must cost no more than a wait.
                async with self._refreshing:
                    pass
            manifest = self.names.find(model)
        if manifest is None:
            known = [self.names.base_name, *{m.name for m in self.names.servable()}]
            if "@" in model:
                known += [m.id for m in self.names.servable()]
            # A name longer than any possible one is neither repeated in full nor searched for.
            shown = model[:MAX_SEARCHED]
            if shown == model:
                hint = await asyncio.to_thread(nearest, model, known)
            else:
                hint = f"it is longer than {MAX_SEARCHED} characters and is cut here"
            raise ApiError(404, f"the model {shown!r} does not exist; {hint}", param="model", code="model_not_found")
        reason = self.names.unservable_reason(manifest)
        if reason is not None:
            raise ApiError(404, f"the model {model!r} is not served: {reason}", param="model", code="model_not_found")
        return manifest

    def switch_to(self, manifest: Manifest) -> None:
        """Let a name mean its current version, which is in the engine, and unload its other versions once idle."""
        if not self.names.is_store_current(manifest):
            return
        self.names.serving[manifest.name] = manifest.version
        canary = self.names.canary_version(manifest.name)
        kept = {manifest.id, canary.id if canary else manifest.id}
        for served_id, loaded in self.pool.loaded_adapters.items():
            if loaded.manifest.name == manifest.name and served_id not in kept and not loaded.draining:
                self._spawn(self.pool.unload_when_idle(served_id))

    def _update_list(self, listed: dict[str, None] | None, swap: bool) -> None:
        """Take a new list. A list that cannot be read is taken as unchanged."""
        if listed is None or listed == self._listed:
            return
        added = [name for name in listed if name not in self._listed]
        self._listed = listed
        self._added = {*self._added, *added} & listed.keys()
        if swap:
            self._pending_swaps |= dict.fromkeys(added)

    def _warn_unserved(self, name: str) -> None:
        """Log which version, of the store's current one and a canary's, cannot be served; once per reason."""
        adapter, meant = self.names.published.get(name), self.names.current_version(name)
        canary = adapter.versions[adapter.canary.version] if adapter and adapter.canary else None
        problems = []
        for wanted in (self.names.store_current(name), canary):
            if wanted is not None and (reason := self.names.unservable_reason(wanted)):
                instead = f"{meant.id} is still served" if meant and meant.id != wanted.id else "its name is not served"
                problems.append(f"{wanted.id} cannot be served: {reason}; {instead}")
        message = "; ".join(problems)
        if message and self._warned.get(name) != message:
            log.warning("%s", message)
        self._warned[name] = message

    def _apply_changes(self, before: AdapterVersions | None, after: AdapterVersions) -> None:
        for version, manifest in (before.versions if before else {}).items():
            if version not in after.versions:
                self._spawn(self._forget(manifest))
        if after.current is None:
            return
        if before is not None and before.current != after.current:
            # A new publish or rollback ends an admin's unload.
            self.names.unloaded_by_admin.discard(after.versions[after.current].id)
        self._pending_swaps[after.name] = None

    async def _make_swaps(self) -> None:
        """Load what changed, one name at a time, and retry what there was no room for."""
        while self._pending_swaps:
            for name in list(self._pending_swaps):
                current = self.names.store_current(name)
                if current is None or self.names.unservable_reason(current) is not None:
                    self._pending_swaps.pop(name, None)
                elif not self._loads_beforehand(current):
                    # A request will load it. The engine holds no earlier version that could answer until then.
                    self._pending_swaps.pop(name, None)
                    self.names.serving.pop(name, None)
                else:
                    await self._try_serving(current, room_wait_s=0.0)
                    if self.names.serving.get(name) == current.version:
                        self._pending_swaps.pop(name, None)
                        self._added.discard(name)
                        self.switch_to(current)
                await self._load_canary(name)
            if self._pending_swaps:
                await asyncio.sleep(RETRY_S)

    def _loads_beforehand(self, current: Manifest) -> bool:
        """Whether a version is loaded before a request names it: not where it would evict another name."""
        loaded_adapters = self.pool.loaded_adapters
        if any(other.manifest.name == current.name for other in loaded_adapters.values()) or self.names.pinned(current):
            return True
        if self.preload and current.name not in self._listed:
            return False
        return current.name in self._added or len(loaded_adapters) < self.pool.capacity

    async def _load_canary(self, name: str) -> None:
        """Load a canary's version before a request needs it, if its name is in the engine and there is room."""
        new, loaded_adapters = self.names.canary_version(name), self.pool.loaded_adapters
        if new is None or new.id in loaded_adapters or len(loaded_adapters) >= self.pool.capacity:
            return
        if any(other.manifest.name == name for other in loaded_adapters.values()):
            await self._try_serving(new, room_wait_s=0.0)

    async def _forget(self, manifest: Manifest) -> None:
        await self.pool.unload_when_idle(manifest.id)
        adapter = self.names.published.get(manifest.name)
        if adapter is not None and manifest.version in adapter.versions:
            return  # it was published again meanwhile
        self.names.unloaded_by_admin.discard(manifest.id)
        self.names.failed.pop(manifest.id, None)
        self.pool.on_event("gone", manifest, 0.0)

    async def _try_serving(self, manifest: Manifest, room_wait_s: float | None = None) -> None:
        """Load a version and let its name mean it; on failure keep the reason, and what the name meant."""
        try:
            loaded = await self.pool.acquire(manifest, room_wait_s)
        except ApiError as error:
            if error.status != 503:
                self.names.failed[manifest.id] = error.message
                self._warn_unserved(manifest.name)
            return
        self.pool.release(loaded)
        if self.names.is_store_current(manifest):
            self.names.serving[manifest.name] = manifest.version

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # Kept here: the event loop itself holds tasks only weakly. asyncio logs a failure when the task is dropped.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _words_in(path: Path) -> dict[str, None] | None:
    """The words in a small file, in order; None when it cannot be read."""
    try:
        return dict.fromkeys(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return None
