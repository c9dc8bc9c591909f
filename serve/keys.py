"""API keys with a role: hashed at rest, compared in constant time, read again while the server runs.

The key file has one key per line, `role name sha256`; `python -m serve key` writes it and shows the key once. Plain
keys may come from the environment instead: COUNSEL_USER_KEYS and COUNSEL_ADMIN_KEYS, comma-separated. A key is 256
random bits, so one plain SHA-256 cannot be brute-forced, and needs no salt.
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
    """All keys of a server. A server that started without keys is open: every caller is a user, none is an admin."""

    def __init__(self, path: Path | None, environ: Mapping[str, str] = os.environ) -> None:
        self.path = path
        self._from_environment = _from_environment(environ)
        self._checked_s = time.monotonic()
        self._warned = ""
        self._keys = [*self._from_environment, *(read_keys(path) if path else [])]
        self._started_open = not self._keys

    @property
    def open(self) -> bool:
        """Whether no key is needed. Keys that are added later close the server; removing keys never opens it."""
        if self._started_open:
            self._reread()
        return self._started_open and not self._keys

    def find(self, token: str) -> Key | None:
        """The key whose secret is `token`; an empty token has none."""
        self._reread()
        if not token:
            return None
        digest = digest_of(token)
        match = None
        for key in self._keys:
            # No early exit: the time must not tell which key matched.
            if hmac.compare_digest(key.digest, digest):
                match = key
        return match

    def _reread(self) -> None:
        if self.path is None or time.monotonic() - self._checked_s < RECHECK_S:
            return
        self._checked_s = time.monotonic()
        # Always read: a key may be revoked within one tick of the clock, without a change of time or size.
        try:
            self._keys = [*self._from_environment, *read_keys(self.path)]
            self._warned = ""
        except UserError as error:
            if str(error) != self._warned:
                log.warning("the keys stay as they were: %s", error)
            self._warned = str(error)


def digest_of(token: str) -> str:
    """The SHA-256 of a key, in hex."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys in a file. Raises UserError if it cannot be read or a line is not `role name sha256`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the key file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not a key file: {error}") from error
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
    """Make a key, write its hash to the file, and return the key, which is kept nowhere."""
    if role not in ROLES:
        raise UserError(f"role is {role!r}; it must be user or admin")
    if not name or len(name.split()) != 1:
        raise UserError(f"key name is {name!r}; it must be one word, such as the caller's name")
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
        # Stripped first: the blank after the comma in "secret, " is not a key.
        tokens = filter(None, map(str.strip, environ.get(variable, "").split(",")))
        keys += [Key(role, f"{role}{n}", digest_of(token)) for n, token in enumerate(tokens, start=1)]
    return keys
