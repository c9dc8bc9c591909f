"""A base's fingerprint: its weights' content and nothing else, also where it is remembered."""

import os

import pytest

from counsel import fingerprint as module
from counsel.errors import UserError
from counsel.fingerprint import fingerprint
from tests.tiny import tiny_base


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "counsel-stack" / "fingerprints"


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read whole so far."""
    files, whole = [], module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda file: files.append(file) or whole(file))
    return files


def test_it_is_the_content(tmp_path, cache):
    """Two different models of one shape have different fingerprints; a copy has the same."""
    one, two, again = (tiny_base(tmp_path / name, "llama", seed) for name, seed in (("a", 1), ("b", 2), ("c", 1)))

    assert fingerprint(one) == fingerprint(again) != fingerprint(two)


def test_files_that_stay_the_same_are_read_once(tmp_path, cache, hashed, monkeypatch):
    """The second time nothing is read; a weight changed in place, size and written time kept, is read again."""
    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    weights = tiny_base(tmp_path / "a", "llama") / "model.safetensors"
    first = fingerprint(weights.parent)
    assert fingerprint(weights.parent) == first
    assert hashed == [weights]

    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert fingerprint(weights.parent) != first
    assert hashed == [weights, weights]


def test_a_file_that_just_changed_is_not_remembered(tmp_path, cache, hashed, monkeypatch):
    """Within the clock's grain it might change again unseen."""
    monkeypatch.setattr(module, "SETTLED_S", float("inf"))
    base = tiny_base(tmp_path / "a", "llama")

    assert fingerprint(base) == fingerprint(base)
    assert len(hashed) == 2
    assert not cache.exists()


@pytest.mark.parametrize("trouble", [PermissionError("not yours"), RuntimeError("no home directory")])
def test_without_a_place_to_remember_it_is_computed(tmp_path, hashed, monkeypatch, trouble):
    """A home that is another's, or none at all, costs time and nothing else."""

    def refuse(*_args):
        raise trouble

    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    monkeypatch.setattr(module, "cache_dir", refuse)
    base = tiny_base(tmp_path / "a", "llama")

    assert fingerprint(base) == fingerprint(base)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff"])
def test_a_damaged_memory_is_mended(tmp_path, cache, hashed, monkeypatch, damage):
    """What cannot be what was kept is computed and kept anew."""
    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    base = tiny_base(tmp_path / "a", "llama")
    first = fingerprint(base)
    (file,) = cache.iterdir()
    file.write_bytes(damage)

    assert fingerprint(base) == fingerprint(base) == first
    assert len(hashed) == 2


def test_times_alone_do_not_make_it_the_same(tmp_path, cache, monkeypatch):
    """On file systems that keep no times of change, two models of one shape differ in a few blocks."""
    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    weights, others = (
        tiny_base(tmp_path / name, "llama", seed) / "model.safetensors" for name, seed in (("a", 1), ("b", 2))
    )
    same = weights.stat()
    monkeypatch.setattr(module.os, "fstat", lambda _file: same)
    first = fingerprint(weights.parent)
    weights.write_bytes(others.read_bytes())

    assert fingerprint(weights.parent) != first


def test_without_weights_there_is_none(tmp_path, cache):
    """A folder without safetensors is not silently one and the same base."""
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        fingerprint(tmp_path)
