"""Keys, and what is logged of those who use them."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil

import pytest

from counsel.errors import UserError
from serve import access_log
from serve.access_log import AccessLog
from serve.api_errors import ApiError
from serve.keys import ADMIN, USER, KeyRing, add_key
from serve.routes import refuse_foreign_host


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path):
    """The file holds no key, only its owner can read it, and the ring finds each caller by the key."""
    path = tmp_path / "keys.txt"
    user, admin = add_key(path, USER, "ann"), add_key(path, ADMIN, "root")
    text = path.read_text()
    assert user not in text
    assert admin not in text
    assert path.stat().st_mode & 0o077 == 0
    ring = KeyRing(path, {"COUNSEL_ADMIN_KEYS": "from-environment"})
    assert (ring.find(user).name, ring.find(admin).role) == ("ann", ADMIN)
    assert ring.find("from-environment").role == ADMIN
    assert ring.find(user + "x") is None
    with pytest.raises(UserError, match="already has a key named 'ann'"):
        add_key(path, USER, "ann")


def test_the_ring_follows_its_file_and_survives_a_broken_one(tmp_path):
    """A new key works without a restart; a broken line changes nothing; removing every key does not open the server."""
    path = tmp_path / "keys.txt"
    first = add_key(path, USER, "ann")
    ring = KeyRing(path, {})

    def later() -> None:
        ring._checked_s -= 10  # the file is read at most once per second; the test does not wait

    second = add_key(path, USER, "bob")
    later()
    assert ring.find(second).name == "bob"
    path.write_text("user without-a-hash\n")
    later()
    assert ring.find(first).name == "ann"
    path.write_text("")
    later()
    assert ring.find(first) is None
    assert not ring.open


def test_a_key_removed_within_one_tick_of_the_clock_is_refused(tmp_path):
    """A revoked key is refused even when the file's time and size did not change."""
    path = tmp_path / "keys.txt"
    key = add_key(path, USER, "ann")
    before = path.stat()
    ring = KeyRing(path, {})
    path.write_text("#" * (before.st_size - 1) + "\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ring._checked_s -= 10
    assert ring.find(key) is None


@pytest.mark.parametrize("given", ["", " ", ",", "secret, ", "secret,\n", "\t,secret,", " , ,secret"])
@pytest.mark.parametrize("variable", ["COUNSEL_ADMIN_KEYS", "COUNSEL_USER_KEYS"])
def test_an_empty_token_is_never_a_key(variable, given):
    """Whatever blanks and commas the variable has; a variable of blanks alone leaves the server open."""
    ring = KeyRing(None, {variable: given})
    assert ring.find("") is None
    assert ring.find(" ") is None
    assert (ring.find("secret") is not None) == ("secret" in given)
    assert ring.open == ("secret" not in given)


def test_an_empty_token_is_not_a_key_of_a_file_either(tmp_path):
    """Even if the file has the hash of the empty string."""
    path = tmp_path / "keys.txt"
    path.write_text(f"admin root {hashlib.sha256(b'').hexdigest()}\n")
    assert KeyRing(path, {}).find("") is None


def test_keys_made_concurrently_are_all_kept(tmp_path):
    """Eight threads write one file: each key that was shown works."""
    path = tmp_path / "keys.txt"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        shown = list(pool.map(add_key, [path] * 8, [USER] * 8, [f"caller{n}" for n in range(8)]))
    ring = KeyRing(path, {})
    assert {ring.find(key).name for key in shown} == {f"caller{n}" for n in range(8)}


def test_a_ring_that_started_open_closes_with_its_first_key(tmp_path):
    """From then on, callers without a key are refused."""
    path = tmp_path / "keys.txt"
    path.write_text("")
    ring = KeyRing(path, {})
    assert ring.open
    add_key(path, USER, "ann")
    ring._checked_s -= 10
    assert not ring.open


def test_a_file_that_is_not_a_key_file_is_an_error(tmp_path):
    """Bytes, and an invalid hash (which could not be compared), are refused when the file is read."""
    path = tmp_path / "keys.txt"
    for raw in (b"\xff\xfe", b"user ann " + b"g" * 64, b"user ann " + "é".encode() * 64):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"not a key file|is not `role name sha256`"):
            KeyRing(path, {})


def test_an_admin_action_is_logged_whatever_its_target(tmp_path):
    """An unpaired surrogate in a name must not keep a row out of the audit log."""
    log = AccessLog(tmp_path)
    log.audit(target="\ud800")
    log.close()
    assert json.loads((tmp_path / "audit.jsonl").read_text())["target"] == "\ud800"


def test_a_row_is_written_after_its_folder_was_deleted(tmp_path):
    """The logs of a running server are cleared: the next row is in a new file, and no request fails."""
    log = AccessLog(tmp_path / "logs")
    log.request(number=1)
    shutil.rmtree(tmp_path / "logs")
    log.request(number=2)
    log.audit(number=3)
    log.close()
    numbers = [
        json.loads((tmp_path / "logs" / name).read_text())["number"] for name in ("requests.jsonl", "audit.jsonl")
    ]
    assert numbers == [2, 3]


def test_callers_without_a_key_cannot_fill_the_disk(tmp_path, monkeypatch):
    """The request log is rotated at its bound, and one older file is kept."""
    monkeypatch.setattr(access_log, "MAX_BYTES", 10_000)
    log = AccessLog(tmp_path)
    for number in range(1000):
        log.request(path="/x", number=number)
    assert sorted(path.name for path in tmp_path.glob("requests*")) == ["requests.jsonl", "requests.jsonl.1"]
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.glob("requests*"))
    assert json.loads((tmp_path / "requests.jsonl").read_text().splitlines()[-1])["number"] == 999
    log.close()


@pytest.mark.parametrize(
    ("host", "is_local"),
    [(b"127.0.0.1:8000", True), (b"localhost", True), (b"[::1]:8000", True), (b"evil.example:8000", False),
     (b"127.0.0.1.evil.example", False), (b"10.0.0.1", False), (b"[", False), (b"", False)],
)  # fmt: skip
def test_a_server_without_keys_answers_to_loopback_names_only(host, is_local):
    """A web page whose host name was changed to resolve to 127.0.0.1 still sends that name."""
    with contextlib.nullcontext() if is_local else pytest.raises(ApiError, match="answers to localhost only"):
        refuse_foreign_host({b"host": host})
