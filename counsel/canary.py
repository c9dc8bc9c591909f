"""A canary: a name that means its current version for most conversations, and another one for a share of them.

    store/<name>/canary      {"version", "share", "sticky", "salt", "started_utc"}; present while a canary runs

Which version a conversation gets is a hash, so every server of a store chooses the same one and none remembers it. A
larger share keeps those that had the new version, and so does a restart. counsel/rollout.py writes the file.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json

CANARY = "canary"
CONVERSATION, KEY = "conversation", "key"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "version": str, "share": (int, float), "sticky": str, "salt": str, "started_utc": str,
}  # fmt: skip


@dataclass(frozen=True)
class Canary:
    """`share` of the conversations, or of the API keys, get `version`; `sticky` says which of the two."""

    version: str
    share: float
    sticky: str
    salt: str
    started_utc: str

    @property
    def id(self) -> str:
        """Names this canary in logs; says nothing about who got which version."""
        return hashlib.sha256(self.salt.encode()).hexdigest()[:16]

    def unit(self, caller: str, opening: str) -> str:
        """What always gets the same version, as 16 hex digits: a conversation, or an API key.

        caller: the API key's digest. opening: the conversation's first user turn.
        """
        parts = (self.salt, caller) if self.sticky == KEY else (self.salt, caller, opening)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def chooses(self, unit: str) -> bool:
        """Whether a unit gets the canary's version."""
        return int(unit, 16) < self.share * 2**64


def read_canary(folder: Path) -> Canary | None:
    """The canary of a name with this folder; None when there is none. Raises UserError when its file is damaged."""
    path = folder / CANARY
    if not path.exists():
        return None
    found: Any = read_json(path)
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in _TYPES.items()):
        raise UserError(f"{str(path)!r} is not a canary's file; end it: python -m serve canary rollback {folder.name}")
    canary = Canary(**{field.name: found[field.name] for field in dataclasses.fields(Canary)})
    if not 0 < canary.share < 1 or canary.sticky not in (CONVERSATION, KEY):
        raise UserError(
            f"{str(path)!r} has share {canary.share} and sticky {canary.sticky!r}; end it: python -m serve canary "
            f"rollback {folder.name}"
        )
    return canary
