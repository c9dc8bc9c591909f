"""The stack's cache folder, and small JSON documents kept in it. An unusable cache costs time, never a run."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json, write_json


def cache_dir() -> Path:
    """The cache folder: $XDG_CACHE_HOME/counsel-stack, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "counsel-stack"


def read_cached(kind: str, key: str) -> dict[str, Any] | None:
    """The document stored under `kind` and `key`; None if it does not exist or cannot be read."""
    try:
        # RuntimeError, here and below: there is no home directory.
        return read_json(cache_dir() / kind / f"{key}.json")
    except (OSError, RuntimeError, UserError):
        return None


def save(kind: str, key: str, document: Mapping[str, Any]) -> None:
    """Store `document` for `read_cached`; do nothing when the cache cannot be written."""
    with contextlib.suppress(OSError, RuntimeError, UserError):
        write_json(cache_dir() / kind / f"{key}.json", document)
