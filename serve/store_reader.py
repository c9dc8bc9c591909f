"""What changed in a store since the last look: one stat a name, and a reading where its folder's time is another.

What cannot be read, or is away, is told once in the log and left as it was: no reason to stop serving it.
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
        # Each name's folder: when it changed last, and whether it was read whole once more since.
        self._stamps: dict[str, tuple[int, bool]] = {}
        self._place = (0, 0)
        self._complaints: dict[str, str] = {}

    def is_new(self, name: str) -> bool:
        """Whether the store holds something under `name` that was not read yet; one stat, however large the store."""
        try:
            adapter_store.check_name(name)
            return (self.store / name).stat().st_mtime_ns != self._stamps.get(name, (0, False))[0]
        except (UserError, OSError):
            return False

    def changes(self, known: Mapping[str, AdapterVersions]) -> dict[str, AdapterVersions]:
        """The adapters that changed since the last time; one without versions is gone. `known`: all that was read."""
        try:
            about = self.store.stat()
            seen = adapter_store.names(self.store)
        except OSError as error:
            if self._stamps:
                self._warn_once(str(self.store), str(error))
            return {}
        place = (about.st_dev, about.st_ino)
        if not seen and self._stamps and place != self._place:
            self._warn_once(str(self.store), "it is another folder now, and empty")
            return {}
        self._place = place
        self._complaints.pop(str(self.store), None)
        changed: dict[str, AdapterVersions] = {}
        for name in seen:
            try:
                stamp = (self.store / name).stat().st_mtime_ns
                before, settled = self._stamps.get(name, (0, False))
                if stamp == before and settled:
                    continue
                self._stamps[name] = (stamp, False)
                adapter = self._read(name, known.get(name))
                # A folder may change again within one tick of the clock: it is read once more at the next look. What
                # could not be read may be mended inside a version's folder, which the name's does not show.
                self._stamps[name] = (stamp, stamp == before and not adapter.broken)
            except (UserError, OSError) as error:
                self._warn_once(name, str(error))
                continue
            if stamp != before or adapter != known.get(name):
                changed[name] = adapter
        for name in set(self._stamps) - set(seen):
            del self._stamps[name]
            changed[name] = AdapterVersions(name, None, {}, pinned=False)
        return changed

    def _read(self, name: str, known: AdapterVersions | None) -> AdapterVersions:
        adapter = adapter_store.read_versions(self.store, name)
        if not adapter.broken:
            self._complaints.pop(name, None)
            return adapter
        self._warn_once(name, "; ".join(adapter.broken.values()))
        if known is None:
            return adapter
        # A version that cannot be read for the moment is not one that was removed.
        kept = {version: known.versions[version] for version in adapter.broken if version in known.versions}
        versions = {**kept, **adapter.versions}
        current = adapter.current or (known.current if known.current in versions else None)
        return dataclasses.replace(adapter, versions=versions, current=current)

    def _warn_once(self, name: str, what: str) -> None:
        """Log what is wrong once, not four times a second until it is mended."""
        if self._complaints.get(name) != what:
            self._complaints[name] = what
            log.warning("left %s in the store as it was: %s", name, what)
