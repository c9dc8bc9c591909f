"""The adapter store: immutable, checked versions of adapters on disk, and which version a name means.

    store/<name>/<version>/   adapter_model.safetensors adapter_config.json README.md manifest.json
    store/<name>/current      the version that model="<name>" means; replaced by rename
    store/<name>/pinned       present when a server should always keep the current version in memory

A version is named by its content, written under a temporary name and renamed whole: readers need no lock, and a path
never changes its meaning. The manifest's keys are those of `Manifest`; docs/architecture.md explains them.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.adapter import CARD, CONFIG, WEIGHTS, check, check_files
from train.catalog import Base
from train.command import nearest
from train.errors import UserError
from train.files import new_directory, read_json, sha256_of, write_json, write_text
from train.fingerprint import fingerprint

FORMAT = 1
MANIFEST, CURRENT, PINNED = "manifest.json", "current", "pinned"
STALE_S = 3600.0
MAX_SYSTEM_CHARS = 8000

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Manifest:
    """What is known of one version; `prompt["system"]` is the system text to use where a request brings none."""

    format: int
    name: str
    version: str
    created_utc: str
    base: dict[str, str]
    rank: int
    alpha: float
    target_modules: list[str]
    files: dict[str, dict[str, Any]]
    prompt: dict[str, str]
    run: str | None

    @property
    def id(self) -> str:
        """The exact served name: `name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def n_bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.files.values())


@dataclass(frozen=True)
class Shelf:
    """All versions of one name, oldest first; the current one is None while the first is being published."""

    name: str
    current: str | None
    versions: dict[str, Manifest]
    pinned: bool


def publish(
    store: Path, name: str, adapter_dir: Path, base: Base, *, system: str = "", run: str | None = None
) -> Manifest:
    """Check the adapter in `adapter_dir` against `base`, put it into the store and make it what `name` means.

    The same content published again is not copied twice. Raises UserError, and leaves nothing, when a rule is broken.
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
        manifest = Manifest(
            format=FORMAT,
            name=name,
            version=_version(files, system),
            created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            base={"name": base.name, "hub_id": base.hub_id, "fingerprint": fingerprint(base.path)},
            rank=facts.rank,
            alpha=facts.alpha,
            target_modules=list(facts.target_modules),
            files=files,
            prompt={"system": system},
            run=run,
        )
        target = store / name / manifest.version
        if target.is_dir():
            manifest = read_manifest(store, name, manifest.version)
        else:
            with new_directory(target) as folder:
                for file in files:
                    (copy / file).rename(folder / file)
                write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    write_text(store / name / CURRENT, manifest.version + "\n")
    return manifest


def check_name(name: str) -> None:
    """Raise UserError unless `name` may name an adapter."""
    if not _NAME.fullmatch(name):
        raise UserError(f"adapter name {name!r} is not allowed: lower-case letters, digits, '.', '_', '-'; 1 to 64")


def names(store: Path) -> list[str]:
    """Every name with a folder in the store, sorted; empty when there is no store yet."""
    if not store.is_dir():
        return []
    return sorted(entry.name for entry in store.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())


def read_shelf(store: Path, name: str) -> Shelf:
    """What the store holds under `name`. A broken version raises UserError; an absent name has no versions."""
    folder = store / name
    found = []
    if folder.is_dir() and not folder.is_symlink():
        found = [
            read_manifest(store, name, entry.name)
            for entry in folder.iterdir()
            if _VERSION.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
        ]
    found.sort(key=lambda manifest: manifest.created_utc)
    versions = {manifest.version: manifest for manifest in found}
    try:
        current = (folder / CURRENT).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        current = ""
    return Shelf(name, current if current in versions else None, versions, (folder / PINNED).exists())


def read_manifest(store: Path, name: str, version: str) -> Manifest:
    """The manifest of one version. Raises UserError when it is absent, of another format, or not about itself."""
    path = store / name / version / MANIFEST
    document = read_json(path)
    try:
        manifest = Manifest(**document)
    except TypeError as error:
        raise UserError(f"{str(path)!r} is no adapter manifest: {error}") from error
    fits = {
        "base": isinstance(manifest.base, dict) and {"name", "fingerprint"} <= manifest.base.keys(),
        "rank": isinstance(manifest.rank, int),
        "files": isinstance(manifest.files, dict) and all(isinstance(file, dict) for file in manifest.files.values()),
        "prompt": isinstance(manifest.prompt, dict),
        "created_utc": isinstance(manifest.created_utc, str),
    }
    if wrong := [key for key, good in fits.items() if not good]:
        raise UserError(f"{str(path)!r} is no adapter manifest: {wrong[0]} is {getattr(manifest, wrong[0])!r}")
    if (manifest.format, manifest.name, manifest.version) != (FORMAT, name, version):
        raise UserError(f"{str(path)!r} describes {manifest.id} in format {manifest.format}; publish the adapter again")
    return manifest


def find(store: Path, served_name: str) -> Manifest:
    """The version that `name` or `name@version` means. Raises UserError that names the nearest known one."""
    name, _, version = served_name.partition("@")
    check_name(name)
    shelf = read_shelf(store, name)
    version = version or shelf.current or ""
    if version in shelf.versions:
        return shelf.versions[version]
    if shelf.versions:
        raise UserError(f"adapter {name!r} has no version {version!r}; it has {', '.join(shelf.versions)}")
    known = names(store)
    raise UserError(f"no adapter {name!r} in store {str(store)!r}; {nearest(name, known) if known else 'it is empty'}")


def version_dir(store: Path, manifest: Manifest) -> Path:
    """Where a version's files are."""
    return store / manifest.name / manifest.version


def rollback(store: Path, name: str, version: str = "") -> Manifest:
    """Make `name` mean `version`, or by default the one published just before the current."""
    current = find(store, name)
    if not version:
        older = list(read_shelf(store, name).versions)
        place = older.index(current.version)
        if place == 0:
            raise UserError(f"adapter {name!r} has no version before {current.version}; nothing was changed")
        version = older[place - 1]
    manifest = find(store, f"{name}@{version}")
    write_text(store / name / CURRENT, manifest.version + "\n")
    return manifest


def pin(store: Path, name: str, pinned: bool) -> Manifest:
    """Say whether a server should always keep the current version of `name` in memory."""
    manifest = find(store, name)
    if pinned:
        (store / name / PINNED).touch()
    else:
        (store / name / PINNED).unlink(missing_ok=True)
    return manifest


def remove(store: Path, served_name: str) -> list[str]:
    """Remove `name` with all versions, or `name@version` if it is not the current one; return the ids removed."""
    name, _, version = served_name.partition("@")
    manifest = find(store, served_name)
    shelf = read_shelf(store, name)
    if version and version == shelf.current:
        raise UserError(f"{served_name} is the current version of {name!r}; roll back first, or remove {name!r}")
    _discard(store / name / version if version else store / name)
    return [manifest.id] if version else [found.id for found in shelf.versions.values()]


def collect_garbage(store: Path, keep: int) -> list[str]:
    """Remove all but each name's current and its `keep` newest other versions, and what killed commands left."""
    removed = []
    leftovers = list(store.glob(".*"))
    for name in names(store):
        shelf = read_shelf(store, name)
        others = [version for version in shelf.versions if version != shelf.current]
        for version in others[: max(0, len(others) - keep)]:
            _discard(store / name / version)
            removed.append(f"{name}@{version}")
        leftovers += (store / name).glob(".*")
    for left in leftovers:
        # Younger ones may belong to a publish that is running now.
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
            removed.append(str(left))
    return removed


def _version(files: dict[str, dict[str, Any]], system: str) -> str:
    lines = [f"{files[name]['sha256']} {name}\n" for name in (CONFIG, WEIGHTS)]
    lines.append(f"{hashlib.sha256(system.encode()).hexdigest()} system\n")
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
    for name in (WEIGHTS, CONFIG, CARD):
        if (source / name).is_file():
            # A link slipped in after check_files is copied as a link, for `check` to refuse.
            shutil.copy2(source / name, target / name, follow_symlinks=False)
    return target


def _discard(folder: Path) -> None:
    """Rename, then delete: a reader sees the folder whole or not at all."""
    doomed = folder.with_name(f".{folder.name}.{time.time_ns()}")
    folder.rename(doomed)
    shutil.rmtree(doomed)
