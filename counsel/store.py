"""The adapter store: immutable, checked versions of adapters on disk, and which version a name means.

    store/<name>/<version>/   adapter_model.safetensors adapter_config.json README.md manifest.json
    store/<name>/current      the version that model="<name>" means; replaced by rename
    store/<name>/history      every version that it meant, one a line, the current one last: where a rollback goes
    store/<name>/pinned       present when a server should always keep the current version in memory

A version is named by its content and its base, written under a temporary name and renamed whole: readers need no lock,
and a path never changes its meaning. Writers take turns by a lock on the store's folder. The manifest's keys are those
of `Manifest`; docs/architecture.md explains them.
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
from counsel.catalog import Base
from counsel.cli import nearest
from counsel.errors import UserError
from counsel.files import locked, new_directory, sha256_of, write_json, write_text
from counsel.fingerprint import fingerprint
from counsel.manifest import FORMAT, MANIFEST, read_manifest
from counsel.manifest import Manifest as Manifest

CURRENT, HISTORY, PINNED = "current", "history", "pinned"
# Where servers say that they are there.
SERVERS = ".servers"
STALE_S = 3600.0
MAX_SYSTEM_CHARS = 8000

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9a-f]{12}")
# What a killed command leaves: a publish's scratch, a file half written, a version half removed.
_LEFT_BEHIND = re.compile(r"\.(publish\.\w{8}|[a-z0-9][a-z0-9._-]*\.([0-9a-f]{16}|[0-9]{19}))")


@dataclass(frozen=True)
class AdapterVersions:
    """All versions of one name, oldest first; the current one is None while the first is being published.

    history: the versions that the name meant, the current one last. broken: what cannot be read -> why.
    """

    name: str
    current: str | None
    versions: dict[str, Manifest]
    pinned: bool
    history: tuple[str, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)


def publish(
    store: Path, name: str, adapter_dir: Path, base: Base, *, system: str = "", run: str | None = None
) -> Manifest:
    """Check the adapter in `adapter_dir` against `base`, put it into the store and make it what `name` means.

    The same content published again is not copied twice, unless what is there is damaged: then it is replaced. Raises
    UserError, and leaves nothing, when a rule is broken.
    """
    check_name(name)
    if name == base.name:
        raise UserError(f"an adapter cannot be named {name!r}: its base is served under that name")
    if len(system) > MAX_SYSTEM_CHARS:
        raise UserError(f"the system prompt has {len(system)} characters; at most {MAX_SYSTEM_CHARS} are allowed")
    check_files(adapter_dir)
    with _scratch(store) as scratch:
        # Check the copy, not the source: what was checked is then what is served, whoever writes to the source.
        copy = _copy(adapter_dir, scratch)
        facts = check(copy, base.path)
        files = {p.name: {"sha256": sha256_of(p), "bytes": p.stat().st_size} for p in sorted(copy.iterdir())}
        described = {"name": base.name, "hub_id": base.hub_id, "fingerprint": fingerprint(base.path)}
        manifest = Manifest(
            format=FORMAT,
            name=name,
            version=_version(files, system, described["fingerprint"]),
            created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            base=described,
            rank=facts.rank,
            alpha=facts.alpha,
            target_modules=list(facts.target_modules),
            files=files,
            prompt={"system": system},
            run=run,
        )
        tried = _tried(store, manifest) or dataclasses.asdict(trial.run(copy, base.path))
        manifest = dataclasses.replace(manifest, trial=tried)
        with locked(store):
            manifest = _shelve(store, manifest, copy)
            _make_current(store, manifest)
    return manifest


def _tried(store: Path, manifest: Manifest) -> dict[str, list[float]] | None:
    """What the same weights did on the same base when they were published before."""
    for known in read_versions(store, manifest.name).versions.values():
        same = known.base["fingerprint"] == manifest.base["fingerprint"]
        if same and all(known.files.get(name) == manifest.files[name] for name in (WEIGHTS, CONFIG)):
            return known.trial
    return None


def _shelve(store: Path, manifest: Manifest, copy: Path) -> Manifest:
    """Put a version's files in their place, unless they are there and whole; return the manifest that is there."""
    if (store / manifest.name).is_symlink():
        raise UserError(f"{str(store / manifest.name)!r} is a symbolic link; an adapter's folder must be in the store")
    target = version_dir(store, manifest)
    with contextlib.suppress(UserError):
        found = read_manifest(store, manifest.name, manifest.version)
        if not target.is_symlink() and not damage(store, found):
            return found
    with contextlib.suppress(FileNotFoundError):
        _discard(target)
    with new_directory(target) as folder:
        for file in manifest.files:
            (copy / file).rename(folder / file)
        write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    return manifest


def damage(store: Path, manifest: Manifest) -> str | None:
    """What is wrong with a version's files, held against the hashes that were taken when it was published."""
    for name, file in manifest.files.items():
        try:
            found = sha256_of(version_dir(store, manifest) / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != file["sha256"]:
            return f"{name} changed after it was published"
    return None


def check_name(name: str) -> None:
    """Raise UserError unless `name` may name an adapter."""
    if not _NAME.fullmatch(name):
        raise UserError(f"adapter name {name!r} is not allowed: lower-case letters, digits, '.', '_', '-'; 1 to 64")


def names(store: Path) -> list[str]:
    """Every name with a folder in the store, sorted; empty when there is no store yet."""
    if not store.is_dir():
        return []
    entries = [entry for entry in store.iterdir() if _NAME.fullmatch(entry.name) and not entry.is_symlink()]
    return sorted(entry.name for entry in entries if entry.is_dir())


def read_versions(store: Path, name: str) -> AdapterVersions:
    """What the store holds under `name`. An absent name has no versions; one that cannot be read is told as broken."""
    folder = store / name
    written = _words(folder / CURRENT)
    found: list[Manifest] = []
    broken: dict[str, str] = {}
    if folder.is_dir() and not folder.is_symlink():
        for entry in folder.iterdir():
            if _VERSION.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                try:
                    found.append(read_manifest(store, name, entry.name))
                except UserError as error:
                    broken[entry.name] = str(error)
    found.sort(key=lambda manifest: manifest.created_utc)
    versions = {manifest.version: manifest for manifest in found}
    current = written[0] if written and written[0] in versions else None
    if written and current is None and written[0] not in broken:
        if _words(folder / CURRENT) != written:
            # Another version was made current, and this one removed, while we looked.
            return read_versions(store, name)
        broken[CURRENT] = f"{str(folder / CURRENT)!r} names no version that is here; publish again, or roll back"
    meant = _words(folder / HISTORY) or [manifest.version for manifest in found]
    if current and current in meant:
        meant = meant[: len(meant) - meant[::-1].index(current)]
    elif current:
        meant.append(current)
    history = tuple(version for version in meant if version in versions)
    return AdapterVersions(name, current, versions, (folder / PINNED).exists(), history, broken)


def _words(path: Path) -> list[str]:
    """The words in a small file of ours; none where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_current(store: Path, manifest: Manifest, history: Sequence[str] | None = None) -> None:
    """Let a name mean `manifest`; `history`: what it meant before, by default all that it meant until now."""
    folder = store / manifest.name
    before = read_versions(store, manifest.name).history if history is None else history
    meant = [*before, *([] if before and before[-1] == manifest.version else [manifest.version])]
    # In this order: a history without its last word is mended when it is read.
    write_text(folder / HISTORY, "".join(f"{version}\n" for version in meant))
    write_text(folder / CURRENT, manifest.version + "\n")


def find(store: Path, served_name: str) -> Manifest:
    """The version that `name` or `name@version` means. Raises UserError that names the nearest known one."""
    name, version = _parted(served_name)
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


def _parted(served_name: str) -> tuple[str, str]:
    """The name and the version, empty where none is named. Raises UserError for what names no adapter."""
    name, at, version = served_name.partition("@")
    check_name(name)
    if at and not version:
        raise UserError(f"{served_name!r} ends before its version; write {name!r}, or {name}@ and a version")
    return name, version


def version_dir(store: Path, manifest: Manifest) -> Path:
    """Where a version's files are."""
    return store / manifest.name / manifest.version


def rollback(store: Path, name: str, version: str = "") -> Manifest:
    """Make `name` mean `version`, or by default what it meant before."""
    with _writing(store):
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
        meant = list(adapter.history)
        if manifest.version in meant:
            meant = meant[: len(meant) - meant[::-1].index(manifest.version)]
        _make_current(store, manifest, meant)
    return manifest


def pin(store: Path, name: str, pinned: bool) -> Manifest:
    """Say whether a server should always keep the current version of `name` in memory."""
    with _writing(store):
        manifest = find(store, name)
        if pinned:
            (store / name / PINNED).touch()
        else:
            (store / name / PINNED).unlink(missing_ok=True)
    return manifest


def remove(store: Path, served_name: str) -> list[str]:
    """Remove `name` with all versions, or `name@version` if it is not the current one; return the ids removed.

    What is damaged is removed like anything else.
    """
    name, version = _parted(served_name)
    with _writing(store):
        adapter = read_versions(store, name)
        there = [*adapter.versions, *(broken for broken in adapter.broken if broken != CURRENT)]
        if version not in there and (version or not there):
            find(store, served_name)
        if version and version == adapter.current:
            raise UserError(f"{served_name} is the current version of {name!r}; roll back first, or remove {name!r}")
        _discard(store / name / version if version else store / name)
    return [f"{name}@{gone}" for gone in ([version] if version else there)]


def collect_garbage(store: Path, keep: int) -> list[str]:
    """Remove all but each name's current version, the `keep` others that it meant last, and what killed commands left.

    A damaged version goes too, unless it is the current one.
    """
    removed = []
    with _writing(store):
        leftovers = list(store.glob(".*"))
        for name in names(store):
            adapter = read_versions(store, name)
            others = [version for version in adapter.versions if version != adapter.current]
            lately = {version: place for place, version in enumerate(adapter.history, start=1)}
            others.sort(key=lambda version, lately=lately: lately.get(version, 0))  # type: ignore[misc]
            current = _words(store / name / CURRENT)
            damaged = [version for version in adapter.broken if version != CURRENT and version not in current]
            for version in [*others[: max(0, len(others) - keep)], *damaged]:
                _discard(store / name / version)
                removed.append(f"{name}@{version}")
            leftovers += (store / name).glob(".*")
        for left in leftovers:
            # Younger ones may belong to a publish that is running now, and other hidden names are not the store's.
            if _LEFT_BEHIND.fullmatch(left.name) and time.time() - left.lstat().st_mtime > STALE_S:
                _delete(left)
                removed.append(str(left))
    return removed


@contextlib.contextmanager
def _writing(store: Path) -> Iterator[None]:
    """Take a turn at changing the store; one that is not there needs none."""
    try:
        with locked(store) if store.is_dir() else contextlib.nullcontext():
            yield
    except OSError as error:
        raise UserError(f"cannot change the store {str(store)!r}: {error}") from error


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
        raise UserError(f"cannot publish into the store {str(store)!r}: {error}") from error


def _copy(source: Path, target: Path) -> Path:
    """Copy an adapter's files, to the disk itself, with the permissions that new files get here."""
    for name in (WEIGHTS, CONFIG, CARD):
        # A link slipped in after check_files is copied as a link, for `check` to refuse.
        if (source / name).is_symlink():
            (target / name).symlink_to((source / name).readlink())
        elif (source / name).is_file():
            with (source / name).open("rb") as read, (target / name).open("wb") as written:
                shutil.copyfileobj(read, written, 1 << 20)
                written.flush()
                os.fsync(written.fileno())
    return target


def _discard(folder: Path) -> None:
    """Rename, then delete: a reader sees the folder whole or not at all."""
    doomed = folder.with_name(f".{folder.name}.{time.time_ns()}")
    folder.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
