"""Which servers follow a store, so that `publish` and `list` can say in advance what those servers cannot serve.

A server keeps a small file in the store and holds a lock on it as long as it lives. A file without a lock belongs to a
server that has ended.
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
class ServerRecord:
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


def register(store: Path, server: ServerRecord) -> IO[str] | None:
    """Register a server until the returned file is closed; None if the store cannot be written."""
    # A random name: containers that share a store may have the same process ids.
    hidden = store / SERVERS / f".{secrets.token_hex(8)}"
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(hidden.open("x", encoding="utf-8"))
            undo.callback(hidden.unlink, missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            json.dump(dataclasses.asdict(server), file)
            file.flush()
            # Other processes see the file only once it is locked and complete: they remove files without a lock.
            hidden.rename(hidden.with_name(f"{hidden.name[1:]}.json"))
            undo.pop_all()
    except OSError as error:
        log.info("this server is not registered, so publish and list will not mention it: %s", error)
        return None
    return file


def registered_servers(store: Path) -> list[ServerRecord]:
    """The servers on this machine that follow the store now."""
    servers = []
    for path in sorted((store / SERVERS).glob("*.json")):
        try:
            with path.open(encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    servers.append(ServerRecord(**json.load(file)))
                else:
                    path.unlink()
        except (OSError, ValueError, TypeError):
            continue  # it disappeared meanwhile, or is not a server's file
    return servers
