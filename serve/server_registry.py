"""Which servers follow a store, so that `publish` and `list` can say beforehand what those will not serve.

A server keeps a small file in the store, and a lock on it for as long as it lives: a file that nobody locks is that of
a server that is gone.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from counsel.store import SERVERS, Manifest

log = logging.getLogger("vllm.counsel")


@dataclass(frozen=True)
class Presence:
    """A server at `url`, and what decides which versions it can serve."""

    url: str
    base_fingerprint: str
    max_lora_rank: int

    def unservable_reason(self, manifest: Manifest) -> str | None:
        """Why it cannot serve a version; None when it can."""
        if manifest.base["fingerprint"] != self.base_fingerprint:
            return f"it was made for base {manifest.base['name']} ({manifest.base['fingerprint'][:12]}), not this one"
        if manifest.rank > self.max_lora_rank:
            return f"its rank {manifest.rank} is above this server's --max-lora-rank {self.max_lora_rank}"
        return None


def announce(store: Path, presence: Presence) -> IO[str] | None:
    """Say that a server is there, until the file that is returned is closed; None where the store cannot be written."""
    # Containers that share a store may have the same process ids.
    hidden = store / SERVERS / f".{secrets.token_hex(8)}"
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(hidden.open("x", encoding="utf-8"))
            undo.callback(hidden.unlink, missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            json.dump(dataclasses.asdict(presence), file)
            file.flush()
            # Seen only now, locked and whole: `present` removes what nobody locks.
            hidden.rename(hidden.with_name(f"{hidden.name[1:]}.json"))
            undo.pop_all()
    except OSError as error:
        log.info("publish will not know of this server: %s", error)
        return None
    return file


def present(store: Path) -> list[Presence]:
    """The servers of this machine that follow the store now."""
    found = []
    for path in sorted((store / SERVERS).glob("*.json")):
        try:
            with path.open(encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(Presence(**json.load(file)))
                else:
                    path.unlink()
        except (OSError, ValueError, TypeError):
            continue  # it went while we looked, or is not ours
    return found
