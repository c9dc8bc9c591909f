"""Which base an adapter was trained against: the hash of the base's weights, computed once for files that stay.

Hashing takes a second for every gigabyte or two, each time an adapter is published and a server started. So the result
is kept in the cache folder, one small file a base, with the state that the weight files had: inode, size, times of
change, by which git too tells that a file is as it was, and a few blocks of each, since some file systems keep no such
times. As git does, it leaves out a file that changed a moment ago, which may change again without a new time.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from counsel.catalog import cache_dir, weight_files
from counsel.errors import UserError
from counsel.files import read_json, sha256_of, write_json

SETTLED_S = 2.0
SAMPLES, SAMPLE_BYTES = 16, 4096


def fingerprint(base: Path) -> str:
    """The SHA-256 over a base's weight files (names and contents): what an adapter was trained against."""
    files = weight_files(base)
    if not files:
        raise UserError(f"{str(base)!r} holds no *.safetensors: a base is known by its weights")
    state = [_state(file) for file in files]
    settled = all(time.time() - entry["changed_ns"] / 1e9 > SETTLED_S for entry in state)
    kept = _kept(base, state) if settled else None
    if kept:
        return kept
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    if settled and state == [_state(file) for file in files]:
        _keep(base, state, digest.hexdigest())
    return digest.hexdigest()


def _state(file: Path) -> dict[str, Any]:
    """What tells a file from any other, and from what it was before, at the cost of reading a few pages."""
    with file.open("rb") as opened:
        about = os.fstat(opened.fileno())
        sample = hashlib.sha256()
        for i in range(SAMPLES):
            opened.seek(about.st_size * i // SAMPLES)
            sample.update(opened.read(SAMPLE_BYTES))
    return {
        "name": file.name,
        "inode": about.st_ino,
        "bytes": about.st_size,
        "written_ns": about.st_mtime_ns,
        "changed_ns": about.st_ctime_ns,
        "sample": sample.hexdigest(),
    }


# Where nothing can be kept or read (no home, or one that is read-only or another's), the hash is computed each time.


def _kept(base: Path, state: list[dict[str, Any]]) -> str | None:
    try:
        known = read_json(_place(base))
        return str(known["fingerprint"]) if known["state"] == state else None
    except (OSError, RuntimeError, UserError, KeyError):
        return None


def _keep(base: Path, state: list[dict[str, Any]], found: str) -> None:
    try:
        write_json(_place(base), {"base": str(base.resolve()), "fingerprint": found, "state": state})
    except (OSError, RuntimeError, UserError):
        return


def _place(base: Path) -> Path:
    name = hashlib.sha256(str(base.resolve()).encode()).hexdigest()[:16]
    return cache_dir() / "fingerprints" / f"{name}.json"
