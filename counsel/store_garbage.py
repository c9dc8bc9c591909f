"""Removes from the adapter store what nobody will ask for: old versions, damaged ones, leftovers of killed commands."""

import contextlib
import fcntl
import re
import time
from pathlib import Path

from counsel import store as adapter_store
from counsel.canary import CANARY
from counsel.store import CURRENT, SERVERS

STALE_S = 3600.0
# What a killed command leaves: a publish's scratch folder, a partly written file, a partly removed version.
_LEFTOVER = re.compile(r"\.(publish\.\w{8}|[a-z0-9][a-z0-9._-]*\.([0-9a-f]{16}|[0-9]{19}))")
# What a server that was killed at its start leaves in SERVERS.
_SERVER_LEFTOVER = re.compile(r"\.[0-9a-f]{16}")


def collect_garbage(store: Path, keep: int) -> list[str]:
    """Remove old versions, damaged ones and leftovers; return what was removed.

    Each name keeps its current version, its canary's, and the `keep` others that it meant last. Damaged versions are
    removed, except the current one, and so are the leftovers of killed commands and servers.
    """
    removed = []
    with adapter_store.write_lock(store):
        hidden = list(store.glob(".*"))
        for name in adapter_store.names(store):
            adapter = adapter_store.read_versions(store, name)
            in_use = (adapter.current, adapter.canary.version if adapter.canary else None)
            others = [version for version in adapter.versions if version not in in_use]
            last_meant = {version: place for place, version in enumerate(adapter.history, start=1)}
            others.sort(key=lambda version, last_meant=last_meant: last_meant.get(version, 0))  # type: ignore[misc]
            current = adapter_store.read_words(store / name / CURRENT)
            damaged = [version for version in adapter.broken if version not in (CURRENT, CANARY, *current)]
            for version in [*others[: max(0, len(others) - keep)], *damaged]:
                adapter_store.discard(store / name / version)
                removed.append(f"{name}@{version}")
            hidden += (store / name).glob(".*")
        # Other hidden names are not the store's.
        leftovers = [path for path in hidden if _LEFTOVER.fullmatch(path.name)]
        leftovers += (path for path in (store / SERVERS).glob(".*") if _SERVER_LEFTOVER.fullmatch(path.name))
        for path in leftovers:
            # A server that is starting renames its file.
            with contextlib.suppress(FileNotFoundError):
                # A younger one may belong to a publish or a server start that is still running.
                if time.time() - path.lstat().st_mtime > STALE_S and not _is_locked(path):
                    adapter_store.delete(path)
                    removed.append(str(path))
    return removed


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine, such as a server that is starting, holds a lock on a file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
