"""A base's fingerprint: its weights' content and nothing else, also where it is remembered."""

import os

import pytest

from tests.tiny import tiny_base
from train import fingerprint as module
from train.fingerprint import fingerprint


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


def test_a_file_that_just_changed_is_not_remembered(tmp_path, cache, hashed):
    """Within the clock's grain it might change again unseen."""
    base = tiny_base(tmp_path / "a", "llama")

    assert fingerprint(base) == fingerprint(base)
    assert len(hashed) == 2
    assert not cache.exists()


def test_without_a_place_to_remember_it_is_computed(tmp_path, cache, monkeypatch):
    """A read-only home costs time, not the fingerprint."""
    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    base = tiny_base(tmp_path / "a", "llama")
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")

    assert fingerprint(base) == fingerprint(base)
