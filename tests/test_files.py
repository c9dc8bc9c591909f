"""Files and folders are complete or absent."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.files import (
    new_directory,
    read_json,
    read_jsonl,
    replaced_directory,
    sha256_of,
    write_json,
    write_jsonl,
    write_text,
)


def test_new_directory_leaves_nothing_when_the_block_fails(tmp_path):
    """A failure inside the block leaves neither the directory nor its temporary sibling."""

    def half_written():
        with new_directory(tmp_path / "run") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        half_written()
    assert list(tmp_path.iterdir()) == []


def test_new_directory_refuses_an_existing_path(tmp_path):
    """An existing directory with files in it is never replaced."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").write_text("x")

    with pytest.raises(UserError, match="cannot write"), new_directory(tmp_path / "run"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "kept"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("at", ["old", "new"])
@pytest.mark.parametrize("done", [False, True])
def test_an_interrupted_replacement_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch, stop, at, done):
    """Interrupted before or after either of its two renames: one complete folder has the name, nothing else is left."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "which").write_text("old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> None:
        if path.name == "new" if at == "new" else target.name == "old":
            monkeypatch.undo()
            if done:
                rename(path, target)
            raise stop
        rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(UserError if stop is OSError else stop), replaced_directory(tmp_path / "run") as folder:
        (folder / "which").write_text("new")
    assert (tmp_path / "run" / "which").read_text() == ("new" if at == "new" and done else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_jsonl_survives_unicode_line_separators(tmp_path):
    """U+2028 inside a string is data, not the end of a line."""
    rows = [{"text": "a\u2028b\u0085c"}, {"text": "d\ne"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    assert read_jsonl(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("text", "message"), [('{"a": 1}\n{"b"', "line 2 is not JSON"), ("3\n", "an object is needed")]
)
def test_bad_jsonl_names_the_line(tmp_path, text, message):
    """A broken row is an error with its line number; it is not skipped."""
    (tmp_path / "rows.jsonl").write_text(text)

    with pytest.raises(UserError, match=message):
        read_jsonl(tmp_path / "rows.jsonl")


def test_json_refuses_not_a_number(tmp_path):
    """NaN is not JSON, so it is never written."""
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "a.json")


def test_sha256_of_a_file(tmp_path):
    """The digest of the file's bytes."""
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_permissions_follow_the_umask(tmp_path, umask, file_mode, folder_mode):
    """So that, if the umask allows it, a server under another account can read them."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "open", "x")
        write_text(tmp_path / "secret", "x", mode=0o600)
        with new_directory(tmp_path / "run"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"open": file_mode, "secret": 0o600, "run": folder_mode}
