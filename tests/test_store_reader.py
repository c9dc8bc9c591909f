"""A store that is damaged, away or changing: what was read before is still served, and what is repaired is read."""

import asyncio
import dataclasses
import errno
import json
import os
import time

import pytest

from counsel import store as adapter_store
from serve.api_errors import ApiError
from tests.fake_engine import new_watcher, put_in_store, until
from tests.tiny import tiny_manifest


def test_one_broken_version_leaves_the_others_served_and_is_logged_once(tmp_path, caplog):
    """The watcher survives an adapter that cannot be read, and the log does not fill."""

    async def scene() -> None:
        watcher, _ = new_watcher(4, tmp_path)
        put_in_store(tmp_path, tiny_manifest("good"))
        put_in_store(tmp_path, tiny_manifest("broken"))
        (tmp_path / "broken" / ("0" * 12) / "manifest.json").write_text("{")
        put_in_store(tmp_path, dataclasses.replace(tiny_manifest("odd"), base={}))
        await watcher.start()
        for _ in range(3):
            await watcher.refresh()
        assert await watcher.resolve("good") == tiny_manifest("good")

    asyncio.run(scene())
    assert len([record for record in caplog.records if "cannot read broken" in record.getMessage()]) == 1


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"nonsense", b""], ids=["bytes", "unknown", "empty"])
def test_a_broken_current_file_leaves_all_names_served(tmp_path, caplog, damage):
    """The watcher survives it, the name keeps its meaning, new names are still found, and a restart does not fail."""

    async def scene() -> None:
        watcher, _ = new_watcher(4, tmp_path)
        put_in_store(tmp_path, tiny_manifest("a"))
        await watcher.start()
        (tmp_path / "a" / "new").write_bytes(damage)
        (tmp_path / "a" / "new").replace(tmp_path / "a" / "current")
        watch = asyncio.create_task(watcher.watch())
        put_in_store(tmp_path, tiny_manifest("b"))
        await until(
            lambda: watcher.pool.state(tiny_manifest("b")) == "loaded" if "b" in watcher.names.published else False
        )
        assert await watcher.resolve("a") == tiny_manifest("a")
        assert not watch.done()
        watch.cancel()
        restarted, _ = new_watcher(4, tmp_path)
        await restarted.start()
        assert await restarted.resolve("b") == tiny_manifest("b")

    asyncio.run(scene())


@pytest.mark.parametrize("spoiled", [{"sha256": None}, {"sha256": "0" * 64, "bytes": "many"}, 3])
def test_a_manifest_without_valid_files_does_not_stop_a_start(tmp_path, spoiled):
    """It is reported as broken when it is read, not when it is loaded."""

    async def scene() -> None:
        put_in_store(tmp_path, tiny_manifest("good"))
        put_in_store(tmp_path, tiny_manifest("odd"))
        path = tmp_path / "odd" / ("0" * 12) / "manifest.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "files": {"adapter_model.safetensors": spoiled}}))
        watcher, _ = new_watcher(4, tmp_path)
        await watcher.start()
        assert await watcher.resolve("good") == tiny_manifest("good")
        with pytest.raises(ApiError, match="does not exist"):
            await watcher.resolve("odd")

    asyncio.run(scene())


def test_a_store_that_is_away_for_a_moment_unloads_nothing(tmp_path):
    """Renamed, or unmounted so that an empty folder is left: adapters stay served, and later changes are found."""

    async def scene() -> list[str]:
        store = tmp_path / "store"
        watcher, engine = new_watcher(4, store)
        put_in_store(store, tiny_manifest("a"))
        await watcher.start()
        store.rename(tmp_path / "away")
        await watcher.refresh()
        store.mkdir()
        await watcher.refresh()
        assert await watcher.resolve("a") == tiny_manifest("a")
        store.rmdir()
        (tmp_path / "away").rename(store)
        put_in_store(store, tiny_manifest("b"))
        await watcher.refresh()
        await until(lambda: watcher.pool.state(tiny_manifest("b")) == "loaded")
        return engine.log

    assert asyncio.run(scene()) == ["+a", "+b"]


def test_an_unknown_name_is_answered_without_reading_the_store(tmp_path, monkeypatch):
    """A name of 1 MB included: the store is not read for it, and the error does not repeat all of it."""

    async def scene() -> None:
        watcher, _ = new_watcher(4, tmp_path)
        put_in_store(tmp_path, tiny_manifest("gentle"))
        await watcher.start()
        monkeypatch.setattr(watcher._reader, "changes", lambda known: pytest.fail("the store was read"))
        for name in ("gentel", "gentle@"):
            with pytest.raises(ApiError, match="does not exist; did you mean 'gentle"):
                await watcher.resolve(name)
        for name in ("x" * 1_000_000, "gentle@" + "0" * 1_000_000, "../etc", "\ud800"):
            with pytest.raises(ApiError, match="does not exist") as refused:
                await watcher.resolve(name)
            assert len(refused.value.message) < 1000

    asyncio.run(scene())


def test_stamps_ahead_of_the_clock_are_read_once(tmp_path, monkeypatch):
    """A file server's clock may be ahead of ours: an unchanged folder is not read at every look."""
    reads: list[str] = []
    read_versions = adapter_store.read_versions

    async def scene() -> None:
        watcher, _ = new_watcher(4, tmp_path)
        put_in_store(tmp_path, tiny_manifest("a"))
        ahead_ns = time.time_ns() + 3600 * 10**9
        os.utime(tmp_path / "a", ns=(ahead_ns, ahead_ns))
        reads.clear()
        await watcher.start()
        for _ in range(5):
            await watcher.refresh()

    monkeypatch.setattr(
        adapter_store, "read_versions", lambda store, name: reads.append(name) or read_versions(store, name)
    )
    asyncio.run(scene())
    assert reads == ["a", "a"]


def test_a_version_that_could_not_be_read_is_served_once_it_can_be(tmp_path):
    """Its manifest is repaired in place, which does not change the time of the name's folder."""

    async def scene() -> None:
        watcher, _ = new_watcher(4, tmp_path)
        put_in_store(tmp_path, tiny_manifest("a"))
        path = tmp_path / "a" / ("0" * 12) / "manifest.json"
        text = path.read_text()
        path.write_text("{")
        await watcher.start()
        for _ in range(3):
            await watcher.refresh()
        path.write_text(text)
        await watcher.refresh()
        assert await watcher.resolve("a") == tiny_manifest("a")

    asyncio.run(scene())


def test_a_store_that_could_not_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch):
    """No file could be opened for three looks (EMFILE): the adapter is served afterwards."""

    async def scene() -> None:
        watcher, _ = new_watcher(4, tmp_path)
        put_in_store(tmp_path, tiny_manifest("a"))
        with monkeypatch.context() as patch:
            patch.setattr(adapter_store, "read_versions", no_file)
            await watcher.start()
            for _ in range(3):
                await watcher.refresh()
        await watcher.refresh()
        assert await watcher.resolve("a") == tiny_manifest("a")

    def no_file(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    asyncio.run(scene())
