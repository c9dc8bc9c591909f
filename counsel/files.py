"""Files and folders that are complete or absent: written under a temporary name, then renamed."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from counsel.errors import UserError


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part of it.

    mode: the file's permissions, before the umask.
    """
    _write(path, [text.encode()], mode)


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write `content` to `path` like `write_text`."""
    _write(path, [content], mode)


def _write(path: Path, parts: Iterable[bytes], mode: int = 0o666) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {str(path)!r}: {error.strerror}; free some space or choose another place"
        ) from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` to `path` like `write_text`. NaN is refused, because it is not JSON."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line to `path` like `write_text`, one row at a time."""
    _write(path, ((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode() for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError when the file is absent or is not a JSON object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(document).__name__}; an object is needed")
    return document


def read_jsonl(path: Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """Read one JSON object per line. Raises UserError with the number of the first bad line.

    With `torn`, a last line without a newline is skipped: a killed writer or a full disk cut it short.
    """
    try:
        # Not splitlines(): it also splits at U+2028 and U+0085, which JSON strings may contain.
        lines = path.read_text(encoding="utf-8", errors="replace" if torn else "strict").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if torn:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{str(path)!r} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{str(path)!r} line {number} is a JSON {type(row).__name__}; an object is needed")
        rows.append(row)
    return rows


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` if the block succeeds, else remove it.

    Raises UserError when `path` exists by then or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}; remove it or choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make what was created, renamed or removed in a folder survive a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, created if absent, against the other processes of this machine; wait until it is free."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; if the block succeeds, it replaces what is at `path`.

    Until then `path` is not touched. The caller decides whether it may be replaced. Raises UserError when the folder
    cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            yield new
            try:
                if path.exists():
                    path.rename(old)
                new.rename(path)
            except BaseException:
                # Also on an interruption: the old folder would be removed with the scratch folder.
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
    # When the disk is full, save_file raises SafetensorError with the system's message.
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {str(path)!r}: {reason}; free some space or choose another place") from error


def _beside(path: Path) -> Path:
    """A unique hidden name in the folder of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
