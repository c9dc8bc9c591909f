"""Which version each name means, and why a version cannot be served.

A version is immutable and its served name (`name@version`) never means anything else. A plain name means the
version that is loaded for it, and changes its meaning only once the next version is in the engine.
"""

from counsel.store import AdapterVersions, Manifest
from serve.server_registry import ServerRecord


class NameTable:
    """The names of one store as one server answers to them. Pure: it reads no file and waits for nothing."""

    def __init__(self, base_name: str, server: ServerRecord) -> None:
        self.base_name, self.server = base_name, server
        # What the store held when it was last read.
        self.published: dict[str, AdapterVersions] = {}
        # Name -> the version that was loaded for it.
        self.serving: dict[str, str] = {}
        self.unloaded_by_admin: set[str] = set()
        # Served name -> why the last load failed.
        self.failed: dict[str, str] = {}

    def update(self, adapter: AdapterVersions) -> None:
        """Set what the store holds under one name now; no versions means that the name was removed."""
        for manifest in adapter.versions.values():
            # The name changed in the store, so a version that failed to load may load now.
            self.failed.pop(manifest.id, None)
        if adapter.versions:
            self.published[adapter.name] = adapter
        else:
            self.published.pop(adapter.name, None)
            self.serving.pop(adapter.name, None)

    def unservable_reason(self, manifest: Manifest) -> str | None:
        """Why a published version cannot be served here; None when it can."""
        if reason := self.server.unservable_reason(manifest):
            return reason
        if manifest.id in self.unloaded_by_admin:
            return "it was unloaded by an admin; load it again or publish a new version"
        return self.failed.get(manifest.id)

    def store_current(self, name: str) -> Manifest | None:
        """The version that the store calls current, whether or not it can be served."""
        adapter = self.published.get(name)
        return adapter.versions.get(adapter.current or "") if adapter else None

    def current_version(self, name: str) -> Manifest | None:
        """The version that `name` means now.

        In this order: the one that was loaded for it, the store's current one, and the earlier ones, latest first. The
        first that can be served is taken; if none can, the store's current one.
        """
        adapter = self.published.get(name)
        if adapter is None:
            return None
        current = self.store_current(name)
        serving = adapter.versions.get(self.serving.get(name, ""))
        earlier = [adapter.versions[version] for version in reversed(adapter.history)]
        candidates = [version for version in (serving, current, *earlier) if version is not None]
        # No earlier version replaces one that an admin unloaded.
        usable = (m for m in candidates if m.id in self.unloaded_by_admin or self.unservable_reason(m) is None)
        return next(usable, current)

    def canary_version(self, name: str) -> Manifest | None:
        """The version that a canary of `name` gives a share of requests; None without one that can be served."""
        adapter = self.published.get(name)
        if adapter is None or adapter.canary is None:
            return None
        new = adapter.versions[adapter.canary.version]
        return new if self.unservable_reason(new) is None else None

    def means(self, manifest: Manifest) -> bool:
        """Whether the version's name means this version now."""
        current = self.current_version(manifest.name)
        return current is not None and current.id == manifest.id

    def answers_with(self, manifest: Manifest) -> bool:
        """Whether requests for the version's name may get it: the name means it, or a canary gives it to some."""
        return self.means(manifest) or self.canary_version(manifest.name) == manifest

    def pinned(self, manifest: Manifest) -> bool:
        """Whether the version must stay in the engine: its name is pinned and means this version."""
        adapter = self.published.get(manifest.name)
        return adapter is not None and adapter.pinned and self.means(manifest)

    def servable(self) -> list[Manifest]:
        """Every version that a request may name, by name and age."""
        return [
            m
            for adapter in self.published.values()
            for m in adapter.versions.values()
            if self.unservable_reason(m) is None
        ]

    def find(self, model: str) -> Manifest | None:
        """The version that `model` (`name` or `name@version`) means; None if the store holds none."""
        name, at, version = model.partition("@")
        if not at:
            return self.current_version(name)
        adapter = self.published.get(name)
        return adapter.versions.get(version) if adapter else None

    def is_store_current(self, manifest: Manifest) -> bool:
        """Whether the store calls this version current."""
        adapter = self.published.get(manifest.name)
        return adapter is not None and adapter.current == manifest.version
