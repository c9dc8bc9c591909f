"""The store's and the keys' commands of `python -m serve`: a table for people, then one JSON line for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from counsel import rollout
from counsel import store as adapter_store
from counsel.catalog import resolve
from counsel.chat import SYSTEM_PROMPT
from counsel.cli import Command, Result, argument, as_typed, option
from counsel.errors import UserError
from counsel.report.tables import text_table
from counsel.run import open_run
from counsel.store import AdapterVersions, Manifest
from counsel.store_garbage import collect_garbage
from counsel.values import NonNegativeInt, ShareBelowOne
from serve.canary.commands import print_started
from serve.keys import USER, add_key
from serve.server_registry import registered_servers

STORE = "store"


@dataclass(frozen=True)
class Publish:
    source: str = argument("a finished run (its name or folder), or a folder with a PEFT adapter")
    name: str = option("", "name to serve it under", shown="the run's name")
    model: str = option("", "base model it was trained on", shown="the run's")
    system: str = option(
        SYSTEM_PROMPT,
        "system prompt for requests that have none; empty for none",
        shown="the built-in supportive prompt",
    )
    canary: ShareBelowOne = option(
        0.0,
        "let only this share of conversations get it, beside the current version",
        metavar="SHARE",
        shown="everybody",
    )
    store: str = option(STORE, "adapter store")


@dataclass(frozen=True)
class List:
    store: str = option(STORE, "adapter store")


@dataclass(frozen=True)
class Show:
    adapter: str = argument("name or name@version")
    store: str = option(STORE, "adapter store")


@dataclass(frozen=True)
class Rollback:
    name: str = argument("adapter name")
    version: str = option("", "version to return to", shown="the one before the current")
    store: str = option(STORE, "adapter store")


@dataclass(frozen=True)
class Remove:
    adapter: str = argument("name, with all its versions, or one name@version")
    store: str = option(STORE, "adapter store")


@dataclass(frozen=True)
class Pin:
    name: str = argument("adapter name")
    off: bool = option(False, "unpin it: servers may unload it again")
    store: str = option(STORE, "adapter store")


@dataclass(frozen=True)
class Collect:
    keep: NonNegativeInt = option(2, "versions to keep per name, besides the current one")
    store: str = option(STORE, "adapter store")


@dataclass(frozen=True)
class NewKey:
    name: str = argument("the caller's name, one word")
    role: Annotated[str, Literal["user", "admin"]] = option(USER, "what the key may do")
    keys: str = option("keys.txt", "key file; it holds only hashes")


def publish(options: Publish) -> Result:
    """Check an adapter and copy it into the store; a running server loads it within 2 s."""
    folder, name, model, run = _source(options)
    store = Path(options.store)
    manifest = adapter_store.publish(
        store, name, folder, resolve(model), system=options.system, run=run, current=not options.canary
    )
    print(f"published {manifest.id}: rank {manifest.rank}, {_size(manifest)}, for {manifest.base['name']}")
    if options.canary:
        print_started(store, rollout.start_canary(store, manifest.id, options.canary))
    else:
        _print_unserved(store, [manifest])
    return Result(
        {"adapter": manifest.id, "path": str(adapter_store.version_dir(store, manifest))},
        next=f"a server on this store serves it within 2 s; ask it with python -m serve chat {name}",
    )


def list_all(options: List) -> Result:
    """Show every version of every adapter."""
    store = Path(options.store)
    if not store.is_dir():
        raise UserError(f"no store folder {options.store!r}; python -m serve publish makes one, --store names another")
    adapters = [adapter_store.read_versions(store, name) for name in adapter_store.names(store)]
    rows = [
        (
            adapter.name,
            manifest.version,
            _place(adapter, manifest),
            manifest.base["name"],
            str(manifest.rank),
            _size(manifest),
            manifest.created_utc[:16].replace("T", " "),
            manifest.run or "-",
        )
        for adapter in adapters
        for manifest in adapter.versions.values()
    ]
    _table(("name", "version", "", "base", "rank", "size", "published (UTC)", "run"), rows)
    for adapter in adapters:
        for reason in adapter.broken.values():
            print(f"{adapter.name}: damaged: {reason}")
    _print_unserved(store, [adapter.versions[adapter.current] for adapter in adapters if adapter.current])
    return Result({"adapters": len(adapters), "versions": len(rows)})


def show(options: Show) -> Result:
    """Show everything about one version."""
    manifest = adapter_store.find(Path(options.store), options.adapter)
    facts = {
        "id": manifest.id,
        "published (UTC)": manifest.created_utc,
        "base": f"{manifest.base['name']} ({manifest.base['hub_id']})",
        "base fingerprint": manifest.base["fingerprint"],
        "rank, alpha": f"{manifest.rank}, {manifest.alpha:g}",
        "changes": ", ".join(manifest.target_modules),
        "size": _size(manifest),
        "run": manifest.run or "-",
        "system prompt": manifest.prompt["system"] or "-",
        "folder": str(adapter_store.version_dir(Path(options.store), manifest)),
    }
    for label, value in facts.items():
        print(f"{label:<18}{value}")
    return Result({"adapter": manifest.id, "path": facts["folder"]})


def rollback(options: Rollback) -> Result:
    """Make an older version the current one again."""
    manifest = adapter_store.rollback(Path(options.store), options.name, options.version)
    print(f"{options.name} is {manifest.id} again, published {manifest.created_utc[:16].replace('T', ' ')} UTC")
    return Result({"adapter": manifest.id})


def remove(options: Remove) -> Result:
    """Remove an adapter, or one version of it, from the store."""
    removed = adapter_store.remove(Path(options.store), options.adapter)
    print(f"removed {', '.join(removed)}")
    return Result({"removed": removed})


def pin(options: Pin) -> Result:
    """Keep an adapter's current version loaded in every server of this store."""
    manifest = adapter_store.pin(Path(options.store), options.name, pinned=not options.off)
    print(f"{manifest.name} is {'no longer pinned' if options.off else 'pinned'}")
    return Result({"adapter": manifest.id, "pinned": not options.off})


def collect(options: Collect) -> Result:
    """Remove old versions, and what killed commands left behind."""
    removed = collect_garbage(Path(options.store), options.keep)
    print(f"removed {', '.join(removed) or 'nothing'}")
    return Result({"removed": removed})


def new_key(options: NewKey) -> Result:
    """Make an API key; it is shown once and kept only as a hash."""
    key = add_key(Path(options.keys), options.role, options.name)
    print(f"{options.role} key for {options.name}, shown only now: {key}")
    return Result({"name": options.name, "role": options.role, "keys": options.keys})


COMMANDS = {
    "publish": Command(Publish, publish, "check an adapter and copy it into the store"),
    "list": Command(List, list_all, "list all adapters and versions in the store"),
    "show": Command(Show, show, "show one version in full"),
    "rollback": Command(Rollback, rollback, "make an older version current again"),
    "remove": Command(Remove, remove, "remove an adapter or a version from the store"),
    "pin": Command(Pin, pin, "keep an adapter loaded in every server"),
    "gc": Command(Collect, collect, "remove old versions and leftovers"),
    "key": Command(NewKey, new_key, "make an API key"),
}


def _source(options: Publish) -> tuple[Path, str, str, str | None]:
    """Folder, name, base and run of the adapter to publish."""
    folder = Path(options.source)
    if (folder / "adapter_config.json").is_file():
        return folder, options.name or folder.name, options.model or "smollm2-135m", None
    run = open_run(options.source)
    return run.adapter, options.name or run.name, options.model or str(run.config()["base"]), run.name


def _print_unserved(store: Path, current: Sequence[Manifest]) -> None:
    """Print which of these versions the servers that follow the store cannot serve."""
    for server in registered_servers(store):
        for manifest in current:
            if reason := server.unservable_reason(manifest):
                print(f"{server.url} does not serve {manifest.id}: {reason}")


def _place(adapter: AdapterVersions, manifest: Manifest) -> str:
    """What a version is to its name."""
    if adapter.canary and adapter.canary.version == manifest.version:
        return f"canary {adapter.canary.share:.1%}"
    if adapter.current != manifest.version:
        return ""
    return "current pinned" if adapter.pinned else "current"


def _size(manifest: Manifest) -> str:
    return f"{manifest.n_bytes / 1e6:.1f} MB"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        print(as_typed("the store is empty; publish something with: python -m serve publish RUN"))
        return
    print(text_table([head, *rows]))
