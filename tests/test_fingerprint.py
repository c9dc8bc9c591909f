"""A base's fingerprint depends on the content of its weights alone, cached or not."""

import os

import pytest

from counsel import cache as cache_module
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
    """The files that have been hashed so far."""
    files, sha256_of = [], module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda file: files.append(file) or sha256_of(file))
    return files


def test_the_fingerprint_is_the_content(tmp_path, cache):
    """Two models of the same shape have different fingerprints; a copy has the same one."""
    one, two, again = (tiny_base(tmp_path / name, "llama", seed) for name, seed in (("a", 1), ("b", 2), ("c", 1)))

    assert fingerprint(one) == fingerprint(again) != fingerprint(two)


def test_unchanged_files_are_hashed_once(tmp_path, cache, hashed, monkeypatch):
    """The second call hashes nothing; a weight changed in place, with its size and mtime kept, is hashed again."""
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


def test_a_file_that_just_changed_is_not_cached(tmp_path, cache, hashed, monkeypatch):
    """Within the clock's resolution it could change again and keep its times."""
    monkeypatch.setattr(module, "SETTLED_S", float("inf"))
    base = tiny_base(tmp_path / "a", "llama")

    assert fingerprint(base) == fingerprint(base)
    assert len(hashed) == 2
    assert not cache.exists()


@pytest.mark.parametrize("trouble", [PermissionError("not yours"), RuntimeError("no home directory")])
def test_without_a_cache_it_is_computed(tmp_path, hashed, monkeypatch, trouble):
    """A home directory that is not writable, or none at all, costs time and nothing else."""

    def refuse(*_args):
        raise trouble

    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    monkeypatch.setattr(cache_module, "cache_dir", refuse)
    base = tiny_base(tmp_path / "a", "llama")

    assert fingerprint(base) == fingerprint(base)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff"])
def test_a_damaged_cache_file_is_replaced(tmp_path, cache, hashed, monkeypatch, damage):
    """A cache file that does not parse, or lacks keys, is computed and written again."""
    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    base = tiny_base(tmp_path / "a", "llama")
    first = fingerprint(base)
    (file,) = cache.iterdir()
    file.write_bytes(damage)

    assert fingerprint(base) == fingerprint(base) == first
    assert len(hashed) == 2


def test_equal_times_alone_do_not_hide_a_change(tmp_path, cache, monkeypatch):
    """On file systems that keep no times of change, sampled blocks still tell two models of the same shape apart."""
    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    weights, others = (
        tiny_base(tmp_path / name, "llama", seed) / "model.safetensors" for name, seed in (("a", 1), ("b", 2))
    )
    same = weights.stat()
    monkeypatch.setattr(module.os, "fstat", lambda _file: same)
    first = fingerprint(weights.parent)
    weights.write_bytes(others.read_bytes())

    assert fingerprint(weights.parent) != first


def test_a_folder_without_weights_is_refused(tmp_path, cache):
    """Otherwise every folder without safetensors would count as the same base."""
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        fingerprint(tmp_path)
