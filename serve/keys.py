"""Who is asking: API keys with a role, hashed at rest, compared in constant time, reread when their file changes.

The key file has one key a line, `role name sha256`; `python -m serve key` writes it and shows the key once. Keys in
clear may come from the environment instead: COUNSEL_USER_KEYS and COUNSEL_ADMIN_KEYS, comma-separated. A key is 256
random bits, so one plain SHA-256 cannot be searched, and needs no salt.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from counsel.errors import UserError
from counsel.files import locked, write_text

USER, ADMIN = "user", "admin"
ROLES = (USER, ADMIN)
ENVIRONMENT = {USER: "COUNSEL_USER_KEYS", ADMIN: "COUNSEL_ADMIN_KEYS"}
RECHECK_S = 1.0

_DIGEST = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("vllm.counsel")


@dataclass(frozen=True)
class Key:
    """One caller: `digest` is the SHA-256 of the key, in hex."""

    role: str
    name: str
    digest: str

    def line(self) -> str:
        return f"{self.role} {self.name} {self.digest}\n"


class KeyRing:
    """All keys a server knows. One that started without any is open: everybody is a user and nobody an admin."""

    def __init__(self, path: Path | None, environ: Mapping[str, str] = os.environ) -> None:
        self.path = path
        self._given = _from_environment(environ)
        self._checked_s = time.monotonic()
        self._complaint = ""
        self._keys = [*self._given, *(read_keys(path) if path else [])]
        self._started_open = not self._keys

    @property
    def open(self) -> bool:
        """Whether no key is needed. Keys that are added later close the ring; keys that vanish never open it."""
        if self._started_open:
            self._reread()
        return self._started_open and not self._keys

    def find(self, token: str) -> Key | None:
        """The key whose secret is `token`; an empty one is nobody's."""
        self._reread()
        if not token:
            return None
        digest = digest_of(token)
        found = None
        for key in self._keys:
            # No early exit: the time taken says nothing of which key matched, or how nearly.
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _reread(self) -> None:
        if self.path is None or time.monotonic() - self._checked_s < RECHECK_S:
            return
        self._checked_s = time.monotonic()
        # Read whole, whatever its time and size: a key that was revoked within one tick of the clock is revoked.
        try:
            self._keys = [*self._given, *read_keys(self.path)]
            self._complaint = ""
        except UserError as error:
            if str(error) != self._complaint:
                log.warning("kept the keys as they were: %s", error)
            self._complaint = str(error)


def digest_of(token: str) -> str:
    """The SHA-256 of a key, in hex."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys in a file. Raises UserError when it cannot be read or a line is not `role name sha256`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the key file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is no key file: {error}") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 3 or words[0] not in ROLES or not _DIGEST.fullmatch(words[2]):
            raise UserError(f"{str(path)!r} line {number} is not `role name sha256` with role user or admin")
        keys.append(Key(*words))
    return keys


def add_key(path: Path, role: str, name: str) -> str:
    """Make a key, write its hash to the file, and return the key itself, which is nowhere else."""
    if role not in ROLES:
        raise UserError(f"role is {role!r}; it must be user or admin")
    if not name or len(name.split()) != 1:
        raise UserError(f"key name is {name!r}; it must be one word, such as the caller's")
    with locked(path.parent):
        keys = read_keys(path) if path.exists() else []
        if any(key.name == name for key in keys):
            raise UserError(f"{str(path)!r} already has a key named {name!r}; remove its line first")
        token = f"cs-{role}-{secrets.token_urlsafe(32)}"
        write_text(path, "".join(key.line() for key in [*keys, Key(role, name, digest_of(token))]), mode=0o600)
    return token


def _from_environment(environ: Mapping[str, str]) -> list[Key]:
    keys = []
    for role, variable in ENVIRONMENT.items():
        # Stripped first: what is left of "secret, " after its comma is no key.
        tokens = filter(None, map(str.strip, environ.get(variable, "").split(",")))
        keys += [Key(role, f"{role}{n}", digest_of(token)) for n, token in enumerate(tokens, start=1)]
    return keys
