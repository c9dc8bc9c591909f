"""What changed in a store since the last look: one stat per name, and a read where its folder's time has changed.

What cannot be read, or is missing, is logged once and keeps its last known content: a read error must not stop serving.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from counsel import store as adapter_store
from counsel.errors import UserError
from counsel.store import AdapterVersions

log = logging.getLogger("vllm.counsel")


class StoreReader:
    """Looks at one store again and again; for one caller at a time."""

    def __init__(self, store: Path) -> None:
        self.store = store
        # Name -> its folder's modification time, and whether it was read completely once more since.
        self._mtimes: dict[str, tuple[int, bool]] = {}
        self._folder_id = (0, 0)
        self._warned: dict[str, str] = {}

    def is_new(self, name: str) -> bool:
        """Whether the store holds something under `name` that was not read yet; one stat, however large the store."""
        try:
            adapter_store.check_name(name)
            return (self.store / name).stat().st_mtime_ns != self._mtimes.get(name, (0, False))[0]
        except (UserError, OSError):
            return False

    def changes(self, known: Mapping[str, AdapterVersions]) -> dict[str, AdapterVersions]:
        """The adapters that changed since the last time; one without versions was removed. `known`: all read so far."""
        try:
            stat = self.store.stat()
            names = adapter_store.names(self.store)
        except OSError as error:
            if self._mtimes:
                self._warn_once(str(self.store), str(error))
            return {}
        folder_id = (stat.st_dev, stat.st_ino)
        if not names and self._mtimes and folder_id != self._folder_id:
            self._warn_once(str(self.store), "it is another folder now, and empty")
            return {}
        self._folder_id = folder_id
        self._warned.pop(str(self.store), None)
        changed: dict[str, AdapterVersions] = {}
        for name in names:
            try:
                mtime = (self.store / name).stat().st_mtime_ns
                before, settled = self._mtimes.get(name, (0, False))
                if mtime == before and settled:
                    continue
                self._mtimes[name] = (mtime, False)
                adapter = self._read(name, known.get(name))
                # A folder may change again within one tick of the clock, so it is read once more at the next look. A
                # broken version is read at every look: a repair inside its folder does not show in the name's time.
                self._mtimes[name] = (mtime, mtime == before and not adapter.broken)
            except (UserError, OSError) as error:
                self._warn_once(name, str(error))
                continue
            if mtime != before or adapter != known.get(name):
                changed[name] = adapter
        for name in set(self._mtimes) - set(names):
            del self._mtimes[name]
            changed[name] = AdapterVersions(name, None, {}, pinned=False)
        return changed

    def _read(self, name: str, known: AdapterVersions | None) -> AdapterVersions:
        adapter = adapter_store.read_versions(self.store, name)
        if not adapter.broken:
            self._warned.pop(name, None)
            return adapter
        self._warn_once(name, "; ".join(adapter.broken.values()))
        if known is None:
            return adapter
        # A version that cannot be read at the moment was not removed.
        kept = {version: known.versions[version] for version in adapter.broken if version in known.versions}
        versions = {**kept, **adapter.versions}
        current = adapter.current or (known.current if known.current in versions else None)
        return dataclasses.replace(adapter, versions=versions, current=current)

    def _warn_once(self, name: str, reason: str) -> None:
        """Log a problem once, not four times a second until it is repaired."""
        if self._warned.get(name) != reason:
            self._warned[name] = reason
            log.warning("cannot read %s in the store, so it stays as it was: %s", name, reason)
