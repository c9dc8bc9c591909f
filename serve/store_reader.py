"""What changed in a store since the last look: one stat per name, and a read where its folder's time has changed.

A folder may change again without a new time: the time has the resolution of the file system (a second on some, and on
network ones it is a cached one). So a folder is read again, at growing distances, until UNSETTLED_S after its time was
first seen. Only this process's clock is used: the file server's may differ.

What cannot be read, or is missing, is logged once and keeps its last known content: a read error must not stop serving.
"""

import dataclasses
import logging
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from counsel import store as adapter_store
from counsel.errors import UserError
from counsel.store import AdapterVersions

log = logging.getLogger("vllm.counsel")

# A coarse file system's two seconds, and one of a cached time.
UNSETTLED_S = 3.0


@dataclass
class _Look:
    """A folder's modification time, when it was first seen with it, and when it was last read completely."""

    mtime_ns: int
    first_s: float
    read_s: float = 0.0

    def settled(self, now_s: float) -> bool:
        """Whether the folder need not be read now, as long as its time stays: reads come at doubling distances."""
        return self.read_s > 0 and (
            self.read_s - self.first_s > UNSETTLED_S or now_s - self.read_s < self.read_s - self.first_s
        )


class StoreReader:
    """Looks at one store again and again; for one caller at a time."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._looks: dict[str, _Look] = {}
        self._folder_id = (0, 0)
        self._warned: dict[str, str] = {}

    def is_new(self, name: str) -> bool:
        """Whether the store holds something under `name` that was not read yet; one stat, however large the store."""
        try:
            adapter_store.check_name(name)
            mtime_ns = (self.store / name).stat().st_mtime_ns
            return name not in self._looks or mtime_ns != self._looks[name].mtime_ns
        except (UserError, OSError):
            return False

    def changes(self, known: Mapping[str, AdapterVersions]) -> dict[str, AdapterVersions]:
        """The adapters that changed since the last time; one without versions was removed. `known`: all read so far."""
        try:
            folder = self.store.stat()
            names = adapter_store.names(self.store)
        except OSError as error:
            if self._looks:
                self._warn_once(str(self.store), str(error))
            return {}
        folder_id = (folder.st_dev, folder.st_ino)
        if not names and self._looks and folder_id != self._folder_id:
            self._warn_once(str(self.store), "it is another folder now, and empty")
            return {}
        self._folder_id = folder_id
        self._warned.pop(str(self.store), None)
        changed: dict[str, AdapterVersions] = {}
        for name in names:
            try:
                mtime_ns, now_s = (self.store / name).stat().st_mtime_ns, time.monotonic()
                look = self._looks.get(name)
                is_new = look is None or look.mtime_ns != mtime_ns
                if look is None or is_new:
                    look = self._looks[name] = _Look(mtime_ns, now_s)
                elif look.settled(now_s):
                    continue
                adapter = self._read(name, known.get(name))
                # A broken version is read at every look: a repair inside its folder does not show in the name's time.
                look.read_s = now_s if not adapter.broken else 0.0
            except (UserError, OSError) as error:
                self._warn_once(name, str(error))
                continue
            if is_new or adapter != known.get(name):
                changed[name] = adapter
        for name in set(self._looks) - set(names):
            if not self._is_gone(name):
                continue
            del self._looks[name]
            changed[name] = AdapterVersions(name, None, {}, pinned=False)
        return changed

    def _is_gone(self, name: str) -> bool:
        """Whether a name that is not listed was removed; a folder that cannot be asked for now, as on NFS, was not."""
        try:
            return not stat.S_ISDIR((self.store / name).lstat().st_mode)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._warn_once(name, str(error))
            return False

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
