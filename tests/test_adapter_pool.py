"""Loading, eviction and draining, on an engine that only keeps a log."""

import asyncio

import pytest

from serve.api_errors import ApiError
from tests.fake_engine import new_pool, new_watcher, put_in_store, until
from tests.tiny import tiny_manifest


def test_concurrent_first_requests_share_one_load(tmp_path):
    """Twenty first requests cause one load; one that disconnects meanwhile does not cancel it for the others."""

    async def scene() -> list[str]:
        pool, engine = new_pool(4, tmp_path)
        waiting = [asyncio.create_task(pool.acquire(tiny_manifest("a"))) for _ in range(20)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert pool.loaded_adapters[tiny_manifest("a").id].in_flight == 19
        return engine.log

    assert asyncio.run(scene()) == ["+a"]


def test_the_least_recently_used_idle_adapter_is_evicted(tmp_path):
    """With room for two, a third waits until one is idle, and takes the place of the one idle longest."""

    async def scene() -> list[str]:
        pool, engine = new_pool(2, tmp_path)
        a, b = await pool.acquire(tiny_manifest("a")), await pool.acquire(tiny_manifest("b"))
        third = asyncio.create_task(pool.acquire(tiny_manifest("c")))
        await until(lambda: pool.state(tiny_manifest("c")) != "published")
        pool.release(b)
        pool.release(a)
        await third
        return engine.log

    assert asyncio.run(scene()) == ["+a", "+b", "-b", "+c"]


def test_a_version_is_unloaded_only_after_its_last_request(tmp_path):
    """Drain, then unload: in that order."""

    async def scene() -> tuple[list[str], list[int]]:
        pool, engine = new_pool(4, tmp_path)
        held, in_flight = await pool.acquire(tiny_manifest("a")), []
        engine.on_unload = lambda: in_flight.append(held.in_flight)
        unload = asyncio.create_task(pool.unload_when_idle(tiny_manifest("a").id))
        await until(lambda: pool.state(tiny_manifest("a")) != "loaded")
        pool.release(held)
        await unload
        return engine.log, in_flight

    assert asyncio.run(scene()) == (["+a", "-a"], [0])


def test_a_second_unload_returns_when_the_first_does(tmp_path):
    """It returns only once the adapter is out of the engine."""

    async def scene() -> None:
        watcher, engine = new_watcher(4, tmp_path)
        pool = watcher.pool
        put_in_store(tmp_path, tiny_manifest("a"))
        await watcher.start()
        held = await pool.acquire(tiny_manifest("a"))
        unloads = [asyncio.create_task(pool.unload_when_idle(held.manifest.id)) for _ in range(2)]
        pool.names.unloaded_by_admin.add(held.manifest.id)
        await until(lambda: pool.state(held.manifest) == "draining")
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(unload.done() for unload in unloads)
        pool.release(held)
        await unloads[1]
        assert engine.log == ["+a", "-a"]
        await unloads[0]

    asyncio.run(scene())


def test_every_waiter_gets_the_error_of_a_failed_load_and_the_next_request_retries(tmp_path):
    """Nothing of the failed load is listed as loaded, and the next request loads it once that is possible."""

    async def scene() -> list[str]:
        pool, engine = new_pool(4, tmp_path)
        engine.refuses.add(tiny_manifest("a").id)
        outcomes = await asyncio.gather(*(pool.acquire(tiny_manifest("a")) for _ in range(3)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ApiError] * 3
        assert pool.loaded_adapters == {}
        engine.refuses.clear()
        await pool.acquire(tiny_manifest("a"))
        return engine.log

    assert asyncio.run(scene()) == ["+a"]


def test_a_load_fails_at_once_when_all_places_are_pinned(tmp_path):
    """No request waits for room that cannot come. One that waited would get the error that all are busy."""

    async def scene() -> None:
        watcher, engine = new_watcher(1, tmp_path)
        put_in_store(tmp_path, tiny_manifest("a"), pinned=True)
        put_in_store(tmp_path, tiny_manifest("b"))
        await watcher.start()
        assert engine.log == ["+a"]
        with pytest.raises(ApiError, match="all 1 adapters are pinned"):
            await watcher.pool.acquire(await watcher.resolve("b"))
        assert list(watcher.pool.loaded_adapters) == [tiny_manifest("a").id]

    asyncio.run(scene())
