"""The adapter store: immutable, checked versions of adapters on disk, and which version a name means.

    store/<name>/<version>/   adapter_model.safetensors adapter_config.json README.md manifest.json
    store/<name>/current      the version that model="<name>" means; replaced by rename
    store/<name>/history      every version that the name meant, one per line, the current one last; read by rollback
    store/<name>/pinned       present when a server should always keep the current version in memory
    store/<name>/canary       present while a share of the conversations gets another version (counsel/canary.py)
    store/.servers/           what running servers write about themselves (serve/server_registry.py)

A version is named by the hash of its content and its base, written under a temporary name and renamed when it is
complete: readers need no lock, and a path never changes its meaning. Writers lock the store's folder. The manifest's
keys are those of `Manifest`; docs/architecture.md explains them.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counsel import trial
from counsel.adapter_check import CARD, CONFIG, WEIGHTS, check, check_files
from counsel.canary import CANARY, Canary, read_canary
from counsel.catalog import Base
from counsel.errors import UserError
from counsel.files import locked, new_directory, sha256_of, write_json, write_text
from counsel.fingerprint import fingerprint
from counsel.manifest import FORMAT, MANIFEST, read_manifest
from counsel.manifest import Manifest as Manifest
from counsel.values import nearest

CURRENT, HISTORY, PINNED = "current", "history", "pinned"
SERVERS = ".servers"
MAX_SYSTEM_CHARS = 8000

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class AdapterVersions:
    """All versions of one name, oldest first; `current` is None while the first one is being published.

    history: the versions that the name meant, the current one last.
    canary: the one that runs; its version is in `versions` and is not the current one.
    broken: a version, or CURRENT or CANARY, that cannot be read -> the reason.
    """

    name: str
    current: str | None
    versions: dict[str, Manifest]
    pinned: bool
    history: tuple[str, ...] = ()
    canary: Canary | None = None
    broken: dict[str, str] = field(default_factory=dict)


def publish(
    store: Path,
    name: str,
    adapter_dir: Path,
    base: Base,
    *,
    system: str = "",
    run: str | None = None,
    current: bool = True,
) -> Manifest:
    """Check the adapter in `adapter_dir` against `base`, copy it into the store and make it what `name` means.

    current: False leaves what the name means as it is. Publishing the same content again copies nothing, unless the
    stored version is damaged: then it is replaced. Raises UserError, and leaves nothing behind, when the adapter breaks
    a rule, or while a canary of the name runs.
    """
    check_name(name)
    if name == base.name:
        raise UserError(f"an adapter cannot be named {name!r}: its base is served under that name; choose another")
    if len(system) > MAX_SYSTEM_CHARS:
        raise UserError(f"the system prompt has {len(system)} characters; at most {MAX_SYSTEM_CHARS} are allowed")
    check_files(adapter_dir)
    check_no_canary(read_versions(store, name))
    with _scratch(store) as scratch:
        # Check the copy, not the source, which others may write to: what is checked is then what is served.
        copy = _copy(adapter_dir, scratch)
        facts = check(copy, base.path)
        files = {p.name: {"sha256": sha256_of(p), "bytes": p.stat().st_size} for p in sorted(copy.iterdir())}
        base_identity = {"name": base.name, "hub_id": base.hub_id, "fingerprint": fingerprint(base.path)}
        manifest = Manifest(
            format=FORMAT,
            name=name,
            version=_version(files, system, base_identity["fingerprint"]),
            created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            base=base_identity,
            rank=facts.rank,
            alpha=facts.alpha,
            target_modules=list(facts.target_modules),
            files=files,
            prompt={"system": system},
            run=run,
        )
        result = _earlier_trial(store, manifest) or dataclasses.asdict(trial.run(copy, base.path))
        manifest = dataclasses.replace(manifest, trial=result)
        with locked(store):
            check_no_canary(read_versions(store, name))
            manifest = _store_version(store, manifest, copy)
            if current:
                make_current(store, manifest)
    return manifest


def check_no_canary(adapter: AdapterVersions) -> None:
    """Raise UserError while a canary of the name runs."""
    if adapter.canary:
        raise UserError(
            f"a canary of {adapter.name!r} runs ({adapter.name}@{adapter.canary.version}), and nothing was changed: "
            f"python -m serve canary promote {adapter.name}, or canary rollback {adapter.name}, ends it"
        )


def _earlier_trial(store: Path, manifest: Manifest) -> dict[str, list[float]] | None:
    """The trial of the same weights on the same base, if they were published before."""
    for known in read_versions(store, manifest.name).versions.values():
        same = known.base["fingerprint"] == manifest.base["fingerprint"]
        if same and all(known.files.get(name) == manifest.files[name] for name in (WEIGHTS, CONFIG)):
            return known.trial
    return None


def _store_version(store: Path, manifest: Manifest, copy: Path) -> Manifest:
    """Move a version's files into the store, unless it has them undamaged; return the stored manifest."""
    if (store / manifest.name).is_symlink():
        raise UserError(
            f"{str(store / manifest.name)!r} is a symbolic link; the store must hold the folder itself: remove the link"
        )
    target = version_dir(store, manifest)
    with contextlib.suppress(UserError):
        stored = read_manifest(store, manifest.name, manifest.version)
        if not target.is_symlink() and not damage(store, stored):
            return stored
    with contextlib.suppress(FileNotFoundError):
        discard(target)
    with new_directory(target) as folder:
        for file in manifest.files:
            (copy / file).rename(folder / file)
        write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    return manifest


def damage(store: Path, manifest: Manifest) -> str | None:
    """How a version's files differ from the hashes taken when it was published; None when they are undamaged."""
    for name, file in manifest.files.items():
        try:
            actual = sha256_of(version_dir(store, manifest) / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if actual != file["sha256"]:
            return f"{name} changed after it was published"
    return None


def check_name(name: str) -> None:
    """Raise UserError unless `name` is a valid adapter name."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"adapter name {name!r} is not allowed; use 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )


def names(store: Path) -> list[str]:
    """Every name with a folder in the store, sorted; empty when the store does not exist."""
    if not store.is_dir():
        return []
    entries = [entry for entry in store.iterdir() if _NAME.fullmatch(entry.name) and not entry.is_symlink()]
    return sorted(entry.name for entry in entries if entry.is_dir())


def read_versions(store: Path, name: str) -> AdapterVersions:
    """What the store holds under `name`. An unknown name has no versions; what cannot be read is in `broken`."""
    folder = store / name
    written = read_words(folder / CURRENT)
    manifests: list[Manifest] = []
    broken: dict[str, str] = {}
    if folder.is_dir() and not folder.is_symlink():
        for entry in folder.iterdir():
            if _VERSION.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                try:
                    manifests.append(read_manifest(store, name, entry.name))
                except UserError as error:
                    broken[entry.name] = str(error)
    manifests.sort(key=lambda manifest: manifest.created_utc)
    versions = {manifest.version: manifest for manifest in manifests}
    current = written[0] if written and written[0] in versions else None
    if written and current is None and written[0] not in broken:
        if read_words(folder / CURRENT) != written:
            # Meanwhile another version became current and this one was removed.
            return read_versions(store, name)
        broken[CURRENT] = f"{str(folder / CURRENT)!r} names a version that does not exist; publish again, or roll back"
    meant = read_words(folder / HISTORY) or [manifest.version for manifest in manifests]
    if current and current in meant:
        meant = meant[: len(meant) - meant[::-1].index(current)]
    elif current:
        meant.append(current)
    history = tuple(version for version in meant if version in versions)
    canary = None
    try:
        canary = read_canary(folder)
        if canary and canary.version not in versions:
            broken[CANARY] = f"{str(folder / CANARY)!r} names a version that does not exist; end the canary"
    except UserError as error:
        broken[CANARY] = str(error)
    if canary and (canary.version == current or CANARY in broken):
        canary = None
    return AdapterVersions(name, current, versions, (folder / PINNED).exists(), history, canary, broken)


def read_words(path: Path) -> list[str]:
    """The words in a small file of the store; empty when it does not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except (FileNotFoundError, NotADirectoryError):
        return []


def make_current(store: Path, manifest: Manifest, history: Sequence[str] | None = None) -> None:
    """Make the name mean `manifest`, for a caller that holds the lock.

    history: the versions that it meant before; by default its whole history.
    """
    folder = store / manifest.name
    before = read_versions(store, manifest.name).history if history is None else history
    meant = [*before, *([] if before and before[-1] == manifest.version else [manifest.version])]
    # In this order: read_versions copes with a history that does not end with the current version.
    write_text(folder / HISTORY, "".join(f"{version}\n" for version in meant))
    write_text(folder / CURRENT, manifest.version + "\n")


def find(store: Path, served_name: str) -> Manifest:
    """The version that `name` or `name@version` means. Raises UserError with the nearest known name."""
    name, version = _split_name(served_name)
    adapter = read_versions(store, name)
    version = version or adapter.current or ""
    if version in adapter.versions:
        return adapter.versions[version]
    if reason := adapter.broken.get(version) or (not version and next(iter(adapter.broken.values()), "")):
        raise UserError(f"{served_name} is damaged: {reason}")
    if adapter.versions:
        raise UserError(f"adapter {name!r} has no version {version!r}; it has {', '.join(adapter.versions)}")
    known = names(store)
    raise UserError(f"no adapter {name!r} in store {str(store)!r}; {nearest(name, known) if known else 'it is empty'}")


def _split_name(served_name: str) -> tuple[str, str]:
    """The name and the version, which is empty if not given. Raises UserError when it is not a valid name."""
    name, at, version = served_name.partition("@")
    check_name(name)
    if at and not version:
        raise UserError(f"{served_name!r} has no version after the '@'; write {name!r}, or {name}@ and a version")
    return name, version


def version_dir(store: Path, manifest: Manifest) -> Path:
    """The folder of a version's files."""
    return store / manifest.name / manifest.version


def rollback(store: Path, name: str, version: str = "") -> Manifest:
    """Make `name` mean `version`, by default the one it meant before."""
    with write_lock(store):
        if version:
            manifest = find(store, f"{name}@{version}")
            adapter = read_versions(store, name)
        else:
            check_name(name)
            adapter = read_versions(store, name)
            if not adapter.history:
                find(store, name)
            earlier = [meant for meant in adapter.history if meant != adapter.current]
            if not earlier:
                raise UserError(f"adapter {name!r} has no version before {adapter.current}; nothing was changed")
            manifest = adapter.versions[earlier[-1]]
        check_no_canary(adapter)
        meant = list(adapter.history)
        if manifest.version in meant:
            meant = meant[: len(meant) - meant[::-1].index(manifest.version)]
        make_current(store, manifest, meant)
    return manifest


def pin(store: Path, name: str, pinned: bool) -> Manifest:
    """Set whether a server should always keep the current version of `name` in memory."""
    with write_lock(store):
        manifest = find(store, name)
        if pinned:
            (store / name / PINNED).touch()
        else:
            (store / name / PINNED).unlink(missing_ok=True)
    return manifest


def remove(store: Path, served_name: str) -> list[str]:
    """Remove `name` with all versions, or `name@version` if it is not the current one; return the ids removed.

    Damaged versions can be removed too.
    """
    name, version = _split_name(served_name)
    with write_lock(store):
        adapter = read_versions(store, name)
        stored = [*adapter.versions, *(broken for broken in adapter.broken if broken not in (CURRENT, CANARY))]
        if version not in stored and (version or not stored):
            # It raises the error for an unknown adapter or version.
            find(store, served_name)
        if version and version == adapter.current:
            raise UserError(f"{served_name} is the current version of {name!r}; roll back first, or remove {name!r}")
        if version and adapter.canary and version == adapter.canary.version:
            check_no_canary(adapter)
        discard(store / name / version if version else store / name)
    return [f"{name}@{removed}" for removed in ([version] if version else stored)]


@contextlib.contextmanager
def write_lock(store: Path) -> Iterator[None]:
    """Keep other writers out of the store; a store that does not exist needs no lock."""
    try:
        with locked(store) if store.is_dir() else contextlib.nullcontext():
            yield
    except OSError as error:
        raise UserError(f"cannot change the store {str(store)!r}: {error}; check its permissions") from error


def _version(files: dict[str, dict[str, Any]], system: str, base: str) -> str:
    lines = [f"{files[name]['sha256']} {name}\n" for name in (CONFIG, WEIGHTS)]
    lines.append(f"{hashlib.sha256(system.encode()).hexdigest()} system\n")
    lines.append(f"{base} base\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _scratch(store: Path) -> Iterator[Path]:
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store, prefix=".publish.") as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(
            f"cannot publish into the store {str(store)!r}: {error}; check its permissions and free space"
        ) from error


def _copy(source: Path, target: Path) -> Path:
    """Copy an adapter's files and sync them to disk, with the permissions that the umask gives new files."""
    for name in (WEIGHTS, CONFIG, CARD):
        # A link that appears after check_files is copied as a link, and `check` refuses it.
        if (source / name).is_symlink():
            (target / name).symlink_to((source / name).readlink())
        elif (source / name).is_file():
            with (source / name).open("rb") as read, (target / name).open("wb") as written:
                shutil.copyfileobj(read, written, 1 << 20)
                written.flush()
                os.fsync(written.fileno())
    return target


def discard(folder: Path) -> None:
    """Rename, then delete: a reader sees the whole folder or none."""
    hidden = folder.with_name(f".{folder.name}.{time.time_ns()}")
    folder.rename(hidden)
    delete(hidden)


def delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
