"""Which base an adapter was trained against: the hash of the base's weights, computed once for files that stay.

Hashing takes a second for every gigabyte or two, each time an adapter is published and a server started. So the result
is kept in the cache folder, one small file for each state of the weight files: their paths, inodes, sizes, and times of
change, by which git too tells that a file is as it was. Its caution is taken over as well: a file changed a moment ago
may change again without a new time, so the hash of such a file is not kept.
"""

import contextlib
import hashlib
import json
import time
from pathlib import Path

from train.catalog import cache_dir, weight_files
from train.errors import UserError
from train.files import sha256_of, write_text

SETTLED_S = 2.0


def fingerprint(base: Path) -> str:
    """The SHA-256 over a base's weight files (names and contents): what an adapter was trained against."""
    files = weight_files(base)
    state = [_state(file) for file in files]
    settled = all(time.time() - changed_ns / 1e9 > SETTLED_S for *_, changed_ns in state)
    kept = cache_dir() / "fingerprints" / hashlib.sha256(json.dumps(state).encode()).hexdigest()
    if settled and kept.is_file():
        return kept.read_text(encoding="utf-8")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    if settled and state == [_state(file) for file in files]:
        # Where nothing can be kept (a read-only home), it is computed each time.
        with contextlib.suppress(OSError, UserError):
            write_text(kept, digest.hexdigest())
    return digest.hexdigest()


def _state(file: Path) -> tuple[str, str, int, int, int, int]:
    """Changes with the file's name and content; the last is when anything about it changed, in nanoseconds."""
    real = file.resolve()
    about = real.stat()
    return file.name, str(real), about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
