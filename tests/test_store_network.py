"""A store on a network file system: times as coarse as two seconds, cached, ahead or behind, and stale handles."""

import asyncio
import errno
import os
import stat
import subprocess
import types
from pathlib import Path

import pytest

from counsel import store as adapter_store
from serve import engine, store_reader
from serve.api_errors import ApiError
from serve.engine import _verify
from serve.store_reader import StoreReader
from tests.fake_engine import new_watcher, put_in_store
from tests.tiny import tiny_manifest

V1, V2, V3 = (f"{number:012x}" for number in (1, 2, 3))
LOOK_S = 0.25


class Network:
    """Modification times as a file server gives them, and this machine's clock, which the test moves.

    Times are those of the server's clock (`skew_s` ahead), cut to `coarse_s`; names in `stale` cannot be asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, coarse_s: float, skew_s: float) -> None:
        self.now_s = 1000.0
        self.stale: set[str] = set()
        self.coarse_s, self.skew_s = coarse_s, skew_s
        # Path -> the real modification time, and what the server calls it.
        self.told: dict[str, tuple[int, int]] = {}
        self.real = {name: getattr(os, name) for name in ("stat", "lstat", "listdir", "scandir", "open")}
        monkeypatch.setattr(store_reader, "time", types.SimpleNamespace(monotonic=lambda: self.now_s))
        for name in ("stat", "lstat"):
            monkeypatch.setattr(os, name, self.asked(self.real[name]))

    def asked(self, ask):
        def asked(path, **options):
            if Path(os.fsdecode(path) if not isinstance(path, int) else "").name in self.stale:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            found = ask(path, **options)
            if not stat.S_ISDIR(found.st_mode):
                return found
            key = os.fsdecode(path)
            if self.told.get(key, (None,))[0] != found.st_mtime_ns:
                server_s = self.now_s + self.skew_s
                self.told[key] = found.st_mtime_ns, int((server_s - server_s % self.coarse_s) * 1e9)
            return os.stat_result(tuple(found), {"st_mtime_ns": self.told[key][1]})

        return asked


@pytest.mark.parametrize("skew_s", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("coarse_s", [0.001, 1.0, 2.0])
@pytest.mark.parametrize("n_looks", [0, 1, 2, 5, 8])
def test_every_change_is_seen_within_two_seconds(tmp_path, monkeypatch, coarse_s, skew_s, n_looks):
    """A change after any number of looks, also in the same tick of the server's clock as the one before."""
    network = Network(monkeypatch, coarse_s, skew_s)
    known: dict[str, adapter_store.AdapterVersions] = {}
    reader = StoreReader(tmp_path)

    def look() -> None:
        known.update(reader.changes(known))
        network.now_s += LOOK_S

    put_in_store(tmp_path, tiny_manifest("a", V1))
    look()
    for version in (V2, V3):
        for _ in range(n_looks):
            look()
        put_in_store(tmp_path, tiny_manifest("a", version))
        for _ in range(int(2 / LOOK_S)):
            look()
        assert known["a"].current == version


def test_a_settled_name_is_not_read_again(tmp_path, monkeypatch):
    """Five reads after a change, then none: a large store is not read four times a second."""
    network, reads = Network(monkeypatch, 1.0, 5.0), []
    read_versions = adapter_store.read_versions
    monkeypatch.setattr(adapter_store, "read_versions", lambda *given: (reads.append(given), read_versions(*given))[1])
    put_in_store(tmp_path, tiny_manifest("a", V1))
    reads.clear()
    reader, known = StoreReader(tmp_path), {}
    for _ in range(100):
        known.update(reader.changes(known))
        network.now_s += LOOK_S
    assert len(reads) == 6


@pytest.mark.parametrize("stale", ["a", "current", "manifest.json", "store"])
def test_a_stale_handle_changes_nothing_and_passes(tmp_path, monkeypatch, stale):
    """Whatever cannot be asked for now is as it was; it is not removed, and it is read once it can be."""
    network = Network(monkeypatch, 0.001, 0.0)
    store = tmp_path / "store"
    put_in_store(store, tiny_manifest("a", V1))
    put_in_store(store, tiny_manifest("b", V1))
    reader, known = StoreReader(store), {}
    known.update(reader.changes(known))
    before = dict(known)
    read_text = Path.read_text

    def stale_read(path: Path, **options: str) -> str:
        if path.name in network.stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", stale_read)
    network.stale.add(stale)
    network.now_s += LOOK_S
    known.update(reader.changes(known))
    assert {name: (of.current, of.versions) for name, of in known.items()} == {
        name: (of.current, of.versions) for name, of in before.items()
    }

    network.stale.clear()
    put_in_store(store, tiny_manifest("a", V2))
    for _ in range(8):
        network.now_s += LOOK_S
        known.update(reader.changes(known))
    assert known["a"].current == V2
    assert known["b"] == before["b"]


def test_a_version_whose_file_is_stale_is_tried_again(tmp_path, monkeypatch):
    """It is not refused for good, as one whose files are damaged."""
    manifest = tiny_manifest("a", V1)
    manifest.files["adapter_model.safetensors"] = {"sha256": "0", "bytes": 1}

    def sha256_of(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(engine, "sha256_of", sha256_of)
    with pytest.raises(ApiError) as raised:
        _verify(manifest, tmp_path)
    assert (raised.value.status, raised.value.retry_after_s) == (503, 1)


def test_a_replica_loads_what_its_list_names_and_not_what_it_does_not(tmp_path):
    """At the start in the list's order, as many as fit; later what is added, also where another is evicted for it."""

    async def scene() -> None:
        lists = tmp_path / "list"
        lists.write_text("c\na\nmissing\nb\n")
        for name in ("a", "b", "c", "d", "e"):
            put_in_store(tmp_path / "store", tiny_manifest(name, V1), pinned=name == "e")
        watcher, fake = new_watcher(3, tmp_path / "store")
        watcher.preload = lists
        await watcher.start()
        assert fake.log == ["+e", "+c", "+a"]

        async def settled() -> None:
            await watcher.refresh()
            while watcher._swapping and not watcher._swapping.done():
                await asyncio.sleep(0.01)

        await settled()
        put_in_store(tmp_path / "store", tiny_manifest("f", V1))
        await settled()
        assert fake.log == ["+e", "+c", "+a"], "not on the list"
        lists.write_text("a\nd\n")
        await settled()
        assert fake.log[3:] == ["-c", "+d"]
        lists.unlink()
        await settled()
        lists.write_text("a\nd\n")
        await settled()
        assert len(fake.log) == 5, "the same list, and one that cannot be read, change nothing"
        # A name without a list's word is served all the same, on its first request.
        loaded = await watcher.pool.acquire(await watcher.resolve("f"))
        watcher.pool.release(loaded)
        assert fake.log[-1] == "+f"

    asyncio.run(scene())


def test_a_copy_made_under_the_stores_lock_is_served(tmp_path):
    """The commands of docs/fleet.md: a backup restored into an empty folder means what the store meant."""
    store, backup = tmp_path / "store", tmp_path / "backup"
    for version in (V1, V2):
        put_in_store(store, tiny_manifest("a", version))
    put_in_store(store, tiny_manifest("b", V1), pinned=True)
    subprocess.run(["flock", store, "cp", "-a", store, backup], check=True)
    adapter_store.remove(store, "b")

    async def scene() -> None:
        watcher, fake = new_watcher(4, backup)
        await watcher.start()
        assert await watcher.resolve("a") == tiny_manifest("a", V2)
        assert sorted(fake.log) == ["+a", "+b"]
        assert adapter_store.rollback(backup, "a") == tiny_manifest("a", V1)

    asyncio.run(scene())
