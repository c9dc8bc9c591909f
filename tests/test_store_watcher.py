"""What a name means while versions are published, rolled back, unloaded and removed."""

import asyncio
import dataclasses
import shutil
import threading

import pytest

from counsel.store import Manifest
from serve.api_errors import ApiError
from serve.vllm_plugin import _load, _unload
from tests.fake_engine import new_watcher, put_in_store, until
from tests.tiny import tiny_manifest
from tests.waiting import HANG_S


def test_a_new_version_without_room_is_served_once_there_is_room(tmp_path, monkeypatch):
    """While every place is busy the name keeps its old version; when one is free, it gets the new one unasked."""

    async def scene() -> None:
        events = []
        watcher, _ = new_watcher(1, tmp_path, lambda event, manifest, _s: events.append((event, manifest)))
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        put_in_store(tmp_path, old)
        await watcher.start()
        held = await watcher.pool.acquire(old)
        put_in_store(tmp_path, new)
        watch = asyncio.create_task(watcher.watch())
        await until(lambda: events.count(("fail", new)) >= 2)
        assert watcher.names.current_version("a") == old
        watcher.pool.release(held)
        await until(lambda: watcher.names.current_version("a") == new)
        watch.cancel()

    monkeypatch.setattr("serve.adapter_pool.ROOM_WAIT_S", 0.2)
    monkeypatch.setattr("serve.store_watcher.RETRY_S", 0.1)
    asyncio.run(scene())


def test_a_name_first_loaded_on_demand_keeps_its_version_until_the_next_is_loaded(tmp_path):
    """Its next version cannot be served here (rank 128): the one that works is still served."""

    async def scene() -> str:
        watcher, _ = new_watcher(1, tmp_path)
        for name in ("a", "b"):
            put_in_store(tmp_path, tiny_manifest(name))
        await watcher.start()
        for name in ("a", "b"):
            watcher.pool.release(await watcher.pool.acquire(await watcher.resolve(name)))
        for name in ("a", "b"):
            put_in_store(tmp_path, tiny_manifest(name, "1" * 12, rank=128))
        await watcher.refresh()
        return [(await watcher.resolve(name)).version for name in ("a", "b")]

    assert asyncio.run(scene()) == ["0" * 12, "0" * 12]


def test_a_request_waits_for_the_look_at_the_store_that_has_read_its_name(tmp_path, monkeypatch):
    """The look is held between its read of the name and its end. A 404 for a published name would be wrong."""
    reading, asked = threading.Event(), threading.Event()

    async def scene() -> Manifest:
        watcher, _ = new_watcher(1, tmp_path)
        await watcher.start()
        put_in_store(tmp_path, tiny_manifest("a"))
        read, is_new = watcher._reader._read, watcher._reader.is_new

        def read_held(*given):
            reading.set()
            assert asked.wait(HANG_S)
            return read(*given)

        def ask(name):
            found = is_new(name)
            asked.set()
            return found

        monkeypatch.setattr(watcher._reader, "_read", read_held)
        monkeypatch.setattr(watcher._reader, "is_new", ask)
        look = asyncio.create_task(watcher.refresh())
        assert await asyncio.to_thread(reading.wait, HANG_S)
        found = await watcher.resolve("a")
        await look
        return found

    assert asyncio.run(scene()).id == tiny_manifest("a").id


def test_a_version_rolled_back_to_while_it_drains_stays(tmp_path):
    """A name that returns to a version still answering keeps it in the engine."""

    async def scene() -> list[str]:
        watcher, engine = new_watcher(4, tmp_path)
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        put_in_store(tmp_path, old)
        await watcher.start()
        held = await watcher.pool.acquire(old)
        put_in_store(tmp_path, new)
        await watcher.refresh()
        await until(lambda: watcher.pool.state(old) == "draining")
        put_in_store(tmp_path, old)
        await watcher.refresh()
        await until(lambda: watcher.names.current_version("a") == old)
        watcher.pool.release(held)
        await until(lambda: watcher.pool.state(old) == "loaded" and watcher.pool.state(new) == "published")
        return engine.log

    assert asyncio.run(scene()) == ["+a", "+a", "-a"]


def test_an_unexpected_exception_in_a_load_blocks_no_name(tmp_path, caplog):
    """The log has it with its traceback, and the name gets its next version."""

    async def scene() -> None:
        watcher, engine = new_watcher(4, tmp_path)
        one, two, three = (tiny_manifest("a", digit * 12) for digit in "123")
        put_in_store(tmp_path, one)
        await watcher.start()
        engine.breaks.add(two.id)
        put_in_store(tmp_path, two)
        watch = asyncio.create_task(watcher.watch())
        await until(lambda: watcher.names.unservable_reason(two) is not None)
        assert await watcher.resolve("a") == one
        put_in_store(tmp_path, three)
        await until(lambda: watcher.names.current_version("a") == three)
        assert not watch.done()
        watch.cancel()

    asyncio.run(scene())
    assert any(record.exc_info and "could not load" in record.getMessage() for record in caplog.records)
    assert any("cannot be served" in r.getMessage() and "is still served" in r.getMessage() for r in caplog.records)


def test_a_name_means_its_last_servable_version_before_and_after_a_restart(tmp_path, caplog):
    """Rank 8, then rank 128 on a server for 16: rank 8 answers, and each server logs why, once."""

    async def scene() -> list[Manifest]:
        good, large = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12, rank=128)
        put_in_store(tmp_path, good)
        watcher, _ = new_watcher(4, tmp_path)
        await watcher.start()
        put_in_store(tmp_path, large)
        await watcher.refresh()
        restarted, _ = new_watcher(4, tmp_path)
        await restarted.start()
        assert restarted.names.published["a"].current == large.version
        return [await watcher.resolve("a"), await restarted.resolve("a")]

    assert {manifest.version for manifest in asyncio.run(scene())} == {"1" * 12}
    warning = "rank 128 is above this server's --max-lora-rank 16; a@111111111111 is still served"
    assert sum(warning in record.getMessage() for record in caplog.records) == 2


def test_no_older_version_replaces_one_that_an_admin_unloaded(tmp_path):
    """After an admin unloads a name nothing answers under it, not even last month's version."""

    async def scene() -> None:
        watcher, _ = new_watcher(4, tmp_path)
        for digit in "12":
            put_in_store(tmp_path, tiny_manifest("a", digit * 12))
        await watcher.start()
        await _unload(watcher, "a")
        with pytest.raises(ApiError, match="unloaded by an admin"):
            await watcher.resolve("a")

    asyncio.run(scene())


def test_many_names_published_at_once_evict_nothing(tmp_path):
    """60 new names, room for 8, 4 taken: four are loaded, none is evicted, and a request need not wait for 60."""

    async def scene() -> tuple[list[str], int]:
        watcher, engine = new_watcher(8, tmp_path)
        for n in range(4):
            put_in_store(tmp_path, tiny_manifest(f"old{n}"))
        await watcher.start()
        for n in range(60):
            put_in_store(tmp_path, tiny_manifest(f"new{n}"))
        await watcher.refresh()
        manifest = await watcher.resolve("new59")
        watcher.pool.release(await watcher.pool.acquire(manifest))
        place = engine.log.index("+new59") - 4
        await until(lambda: watcher._swapping.done())
        return engine.log, place

    log, place = asyncio.run(scene())
    assert len(log) == 8
    assert not any(entry.startswith("-") for entry in log)
    assert place <= 1


def test_a_name_in_the_engine_gets_its_new_version_even_when_the_pool_is_full(tmp_path):
    """It takes the place of an idle one; a new name is loaded only when a request names it."""

    async def scene() -> None:
        watcher, _ = new_watcher(2, tmp_path)
        for name in ("a", "b"):
            put_in_store(tmp_path, tiny_manifest(name))
        await watcher.start()
        new = tiny_manifest("a", "1" * 12)
        put_in_store(tmp_path, new)
        put_in_store(tmp_path, tiny_manifest("c"))
        watch = asyncio.create_task(watcher.watch())
        await until(lambda: watcher.names.current_version("a") == new and watcher.pool.state(new) == "loaded")
        assert watcher.pool.state(tiny_manifest("c")) == "published"
        watch.cancel()

    asyncio.run(scene())


def test_a_version_published_again_is_the_same_version(tmp_path):
    """Removed and published again with another time: its pin holds, it stays in the engine, and no event says gone."""

    async def scene() -> list[str]:
        events: list[str] = []
        watcher, engine = new_watcher(1, tmp_path, lambda event, manifest, _s: events.append(event))
        first = tiny_manifest("a")
        again = dataclasses.replace(first, created_utc="2026-06-01T00:00:00.000000+00:00")
        put_in_store(tmp_path, first, pinned=True)
        await watcher.start()
        for read_between in (False, True):
            shutil.rmtree(tmp_path / "a")
            if read_between:
                await watcher.refresh()
            put_in_store(tmp_path, again, pinned=True)
            await watcher.refresh()
            await until(lambda: not watcher._tasks and watcher._pending_swaps == {})
            assert watcher.names.means(again)
            assert watcher.names.pinned(watcher.pool.loaded_adapters[again.id].manifest)
        return [*engine.log, *events]

    assert asyncio.run(scene()) == ["+a", "load"]


def test_the_load_route_takes_the_current_version_under_a_plain_name_and_no_other(tmp_path):
    """An older version is refused under the plain name; the current one is loaded, and the name means it."""

    async def scene() -> None:
        watcher, engine = new_watcher(4, tmp_path)
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        put_in_store(tmp_path, old)
        await watcher.start()
        engine.refuses.add(new.id)
        put_in_store(tmp_path, new)
        await watcher.refresh()
        await until(lambda: watcher.names.unservable_reason(new) is not None)
        assert watcher.names.means(old)
        with pytest.raises(ApiError, match="to load a@111111111111, give that as lora_name"):
            await _load(watcher, "a", old.id, load_inplace=False)
        engine.refuses.clear()
        await _load(watcher, "a", new.id, load_inplace=False)
        assert watcher.names.means(new)

    asyncio.run(scene())
