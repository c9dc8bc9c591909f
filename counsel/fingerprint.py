"""A base's fingerprint: the hash of its weights, which identifies the base of an adapter.

Hashing takes about a second per one or two gigabytes, at each publish and each server start. So the result is cached,
one small file per base, with the state of the weight files at that time: inode, size, times of change (git relies on
the same) and a few blocks of each file, because some file systems do not keep those times. As in git, a file that
changed a moment ago is not cached: it may change again without a new time.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from counsel import cache
from counsel.catalog import weight_files
from counsel.errors import UserError
from counsel.files import sha256_of

SETTLED_S = 2.0
SAMPLES, SAMPLE_BYTES = 16, 4096


def fingerprint(base: Path) -> str:
    """The SHA-256 over the names and contents of a base's weight files. Raises UserError when it has none."""
    files = weight_files(base)
    if not files:
        raise UserError(f"{str(base)!r} holds no *.safetensors, which identify a base; give a folder with weights")
    key = hashlib.sha256(str(base.resolve()).encode()).hexdigest()[:16]
    state = [_state(file) for file in files]
    settled = all(time.time() - entry["changed_ns"] / 1e9 > SETTLED_S for entry in state)
    cached = cache.read_cached("fingerprints", key) if settled else None
    if cached and cached.get("state") == state and "fingerprint" in cached:
        return str(cached["fingerprint"])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    if settled and state == [_state(file) for file in files]:
        cache.save(
            "fingerprints", key, {"base": str(base.resolve()), "fingerprint": digest.hexdigest(), "state": state}
        )
    return digest.hexdigest()


def _state(file: Path) -> dict[str, Any]:
    """What changes when the file changes, at the cost of reading a few pages."""
    with file.open("rb") as opened:
        stat = os.fstat(opened.fileno())
        sample = hashlib.sha256()
        for i in range(SAMPLES):
            opened.seek(stat.st_size * i // SAMPLES)
            sample.update(opened.read(SAMPLE_BYTES))
    return {
        "name": file.name,
        "inode": stat.st_ino,
        "bytes": stat.st_size,
        "written_ns": stat.st_mtime_ns,
        "changed_ns": stat.st_ctime_ns,
        "sample": sample.hexdigest(),
    }
