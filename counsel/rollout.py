"""Starting and ending canaries in the adapter store."""

import dataclasses
import datetime
import secrets
from pathlib import Path
from typing import NamedTuple

from counsel import store as adapter_store
from counsel.canary import CANARY, CONVERSATION, Canary
from counsel.errors import UserError
from counsel.files import write_json
from counsel.store import Manifest


class CanarySides(NamedTuple):
    """Both versions of a canary."""

    canary: Canary
    current: Manifest
    new: Manifest


def start_canary(store: Path, served_name: str, share: float, sticky: str = CONVERSATION) -> CanarySides:
    """Let `share` of the conversations with a name get the version `name@version`.

    While one runs, only the share may be changed: conversations that had the new version then keep it if it grows.
    Raises UserError.
    """
    if not 0 < share < 1:
        raise UserError(f"share is {share}; it must be above 0 and below 1")
    name, at, _ = served_name.partition("@")
    if not at:
        raise UserError(f"{served_name!r} names no version; write {name}@VERSION (python -m serve list shows them)")
    with adapter_store.write_lock(store):
        new = adapter_store.find(store, served_name)
        adapter = adapter_store.read_versions(store, name)
        if adapter.current is None or adapter.current == new.version:
            raise UserError(
                f"{new.id} is what {name!r} means already; publish the new version with --canary, or roll back first"
            )
        running = adapter.canary
        if running and (running.version, running.sticky) != (new.version, sticky):
            adapter_store.check_no_canary(adapter)
        if running:
            canary = dataclasses.replace(running, share=share)
        else:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            canary = Canary(new.version, share, sticky, secrets.token_hex(16), now)
        write_json(store / name / CANARY, dataclasses.asdict(canary))
    return CanarySides(canary, adapter.versions[adapter.current], new)


def canary_sides(store: Path, name: str) -> CanarySides:
    """The canary of a name. Raises UserError when none runs."""
    adapter_store.check_name(name)
    adapter = adapter_store.read_versions(store, name)
    if not adapter.versions:
        adapter_store.find(store, name)
    if adapter.canary is None or adapter.current is None:
        reason = adapter.broken.get(CANARY)
        raise UserError(reason or f"no canary of {name!r} runs; start one with: python -m serve canary {name}@VERSION")
    return CanarySides(adapter.canary, adapter.versions[adapter.current], adapter.versions[adapter.canary.version])


def promote_canary(store: Path, name: str, only: str = "") -> Manifest:
    """Make the canary's version what the name means for everybody, and end the canary.

    only: the id of the canary that is meant; another one raises UserError.
    """
    with adapter_store.write_lock(store):
        found = canary_sides(store, name)
        _check_same(found, only)
        # In this order: killed in between, the name means the new version, and a canary of the current one is none.
        adapter_store.make_current(store, found.new)
        (store / name / CANARY).unlink()
    return found.new


def end_canary(store: Path, name: str, only: str = "") -> Manifest | None:
    """End the canary: the name means its current version for everybody. Returns that version.

    A damaged canary is ended too. only: as for `promote`.
    """
    with adapter_store.write_lock(store):
        adapter = adapter_store.read_versions(store, name)
        if CANARY not in adapter.broken:
            _check_same(canary_sides(store, name), only)
        (store / name / CANARY).unlink()
    return adapter.versions.get(adapter.current or "")


def _check_same(found: CanarySides, only: str) -> None:
    if only and found.canary.id != only:
        raise UserError(f"{found.new.name}: another canary runs since {found.canary.started_utc}; nothing was changed")
