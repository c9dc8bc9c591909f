"""The pool on an engine that only takes notes."""

import asyncio
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from counsel import store as adapter_store
from counsel.files import write_json
from counsel.store import Manifest
from serve.adapter_pool import AdapterPool
from serve.api_errors import ApiError
from serve.engine import VllmEngine
from serve.metrics import ServerMetrics
from serve.server_registry import Presence
from serve.token_counts import Answer, Tally
from serve.vllm_plugin import _load, _unload
from tests.tiny import tiny_manifest
from tests.waiting import HANG_S


class Serving:
    """What vLLM's API process knows of its models."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, object] = {}
        self.base_model_paths = [types.SimpleNamespace(name="tiny")]
        self.model_config = types.SimpleNamespace(max_model_len=32)


class Notes:
    """An engine that writes down what it is told, takes a moment to load, and can be told to refuse."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses: set[str] = set()
        self.breaks: set[str] = set()
        self.on_unload: Callable[[], object] = lambda: None

    async def load(self, manifest: Manifest, path: Path) -> None:
        await asyncio.sleep(0.01)
        if manifest.id in self.refuses:
            raise ApiError(500, "no")
        if manifest.id in self.breaks:
            raise KeyError("sha256")
        self.told.append(f"+{manifest.name}")

    async def unload(self, manifest: Manifest) -> None:
        self.on_unload()
        self.told.append(f"-{manifest.name}")


def pool_of(
    capacity: int, store: Path, on_event: Callable[[str, Manifest, float], None] = lambda *_: None
) -> tuple[AdapterPool, Notes]:
    notes = Notes()
    return AdapterPool(notes, store, "tiny", Presence("", "f00d", 16), capacity, on_event), notes


def test_many_who_ask_at_once_share_one_load(tmp_path):
    """Twenty first requests cause one load; one that hangs up meanwhile does not undo it for the others."""

    async def scene() -> list[str]:
        pool, notes = pool_of(4, tmp_path)
        waiting = [asyncio.create_task(pool.acquire(tiny_manifest("a"))) for _ in range(20)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert pool.loaded_adapters[tiny_manifest("a").id].in_flight == 19
        return notes.told

    assert asyncio.run(scene()) == ["+a"]


def test_the_least_recently_used_idle_adapter_gives_way(tmp_path):
    """With room for two, a third waits until one is idle, and takes the place of the one idle longest."""

    async def scene() -> list[str]:
        pool, notes = pool_of(2, tmp_path)
        a, b = await pool.acquire(tiny_manifest("a")), await pool.acquire(tiny_manifest("b"))
        third = asyncio.create_task(pool.acquire(tiny_manifest("c")))
        await until(lambda: pool.state(tiny_manifest("c")) != "published")
        pool.release(b)
        pool.release(a)
        await third
        return notes.told

    assert asyncio.run(scene()) == ["+a", "+b", "-b", "+c"]


def test_a_replaced_version_is_freed_only_when_its_last_request_ends(tmp_path):
    """Drain, then unload: in that order."""

    async def scene() -> tuple[list[str], list[int]]:
        pool, notes = pool_of(4, tmp_path)
        held, in_flight = await pool.acquire(tiny_manifest("a")), []
        notes.on_unload = lambda: in_flight.append(held.in_flight)
        retiring = asyncio.create_task(pool.retire(tiny_manifest("a").id))
        await until(lambda: pool.state(tiny_manifest("a")) != "loaded")
        pool.release(held)
        await retiring
        return notes.told, in_flight

    assert asyncio.run(scene()) == (["+a", "-a"], [0])


def test_a_load_that_fails_is_told_to_each_and_tried_anew(tmp_path):
    """Waiters get the refusal, nothing stays resident, and the next request loads it when it can be loaded."""

    async def scene() -> list[str]:
        pool, notes = pool_of(4, tmp_path)
        notes.refuses.add(tiny_manifest("a").id)
        outcomes = await asyncio.gather(*(pool.acquire(tiny_manifest("a")) for _ in range(3)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ApiError] * 3
        assert pool.loaded_adapters == {}
        notes.refuses.clear()
        await pool.acquire(tiny_manifest("a"))
        return notes.told

    assert asyncio.run(scene()) == ["+a"]


def test_what_cannot_be_served_says_why(tmp_path):
    """Another base's adapter and too large a rank are refused with the reason."""

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        assert pool.unservable_reason(tiny_manifest("a")) is None
        assert "made for base" in (pool.unservable_reason(tiny_manifest("a", base="beef")) or "")
        assert "rank 64 is above" in (pool.unservable_reason(tiny_manifest("a", rank=64)) or "")

    asyncio.run(scene())


def shelve(store: Path, manifest: Manifest, *, pinned: bool = False) -> None:
    """Put a manifest (no weights: the engine only takes notes) where `publish` would, and make it current."""
    write_json(store / manifest.name / manifest.version / "manifest.json", dataclasses.asdict(manifest))
    if pinned:
        (store / manifest.name / "pinned").touch()
    adapter_store._make_current(store, manifest)


async def until(promise: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not promise():
            await asyncio.sleep(0.02)


def test_a_new_version_that_found_no_room_is_served_once_there_is(tmp_path, monkeypatch):
    """While every place is busy the name keeps its old version; when one is free it moves on by itself."""

    async def scene() -> None:
        events = []
        pool, _ = pool_of(1, tmp_path, lambda event, manifest, _s: events.append((event, manifest)))
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        shelve(tmp_path, old)
        await pool.start()
        held = await pool.acquire(old)
        shelve(tmp_path, new)
        watching = asyncio.create_task(pool.watch())
        await until(lambda: events.count(("fail", new)) >= 2)
        assert pool.current_version("a") == old
        pool.release(held)
        await until(lambda: pool.current_version("a") == new)
        watching.cancel()

    monkeypatch.setattr("serve.adapter_pool.ROOM_WAIT_S", 0.2)
    monkeypatch.setattr("serve.adapter_pool.RETRY_S", 0.1)
    asyncio.run(scene())


def test_where_all_are_pinned_the_next_is_refused_at_once(tmp_path):
    """No request waits for room that cannot come: one that waited would be told that all are busy."""

    async def scene() -> None:
        pool, notes = pool_of(1, tmp_path)
        shelve(tmp_path, tiny_manifest("a"), pinned=True)
        shelve(tmp_path, tiny_manifest("b"))
        await pool.start()
        assert notes.told == ["+a"]
        with pytest.raises(ApiError, match="all 1 adapters are pinned"):
            await pool.acquire(await pool.resolve("b"))
        assert list(pool.loaded_adapters) == [tiny_manifest("a").id]

    asyncio.run(scene())


def test_a_name_first_loaded_on_demand_keeps_its_version_until_the_next_is_loaded(tmp_path):
    """Its next version cannot be served here (rank 128): the one that works goes on."""

    async def scene() -> str:
        pool, _ = pool_of(1, tmp_path)
        for name in ("a", "b"):
            shelve(tmp_path, tiny_manifest(name))
        await pool.start()
        for name in ("a", "b"):
            pool.release(await pool.acquire(await pool.resolve(name)))
        for name in ("a", "b"):
            shelve(tmp_path, tiny_manifest(name, "1" * 12, rank=128))
        await pool.refresh()
        return [(await pool.resolve(name)).version for name in ("a", "b")]

    assert asyncio.run(scene()) == ["0" * 12, "0" * 12]


def test_a_version_rolled_back_to_while_it_drains_stays(tmp_path):
    """A name that returns to a version still answering keeps it in the engine."""

    async def scene() -> list[str]:
        pool, notes = pool_of(4, tmp_path)
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        shelve(tmp_path, old)
        await pool.start()
        held = await pool.acquire(old)
        shelve(tmp_path, new)
        await pool.refresh()
        await until(lambda: pool.state(old) == "draining")
        shelve(tmp_path, old)
        await pool.refresh()
        await until(lambda: pool.current_version("a") == old)
        pool.release(held)
        await until(lambda: pool.state(old) == "loaded" and pool.state(new) == "published")
        return notes.told

    assert asyncio.run(scene()) == ["+a", "+a", "-a"]


def test_one_broken_version_leaves_the_others_served_and_is_told_once(tmp_path, caplog):
    """A adapter that cannot be read is left as it was; the watch goes on, and the log does not fill."""

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("good"))
        shelve(tmp_path, tiny_manifest("broken"))
        (tmp_path / "broken" / ("0" * 12) / "manifest.json").write_text("{")
        shelve(tmp_path, dataclasses.replace(tiny_manifest("odd"), base={}))
        await pool.start()
        for _ in range(3):
            await pool.refresh()
        assert await pool.resolve("good") == tiny_manifest("good")

    asyncio.run(scene())
    assert len([record for record in caplog.records if "left broken" in record.getMessage()]) == 1


@pytest.mark.parametrize("read", [False, True], ids=["before it is read", "while the engine reads it"])
def test_a_version_removed_while_it_loads_is_no_fault_of_the_server(tmp_path, read):
    """Whoever asked for it is told that it is gone (404), not that something broke; a damaged one stays a 500."""
    manifest = tiny_manifest("a")
    folder = tmp_path / "a" / manifest.version
    folder.mkdir(parents=True)
    digest = hashlib.sha256(b"weights").hexdigest()
    manifest = dataclasses.replace(manifest, files={"adapter_model.safetensors": {"sha256": digest, "bytes": 7}})

    class Reader:
        async def add_lora(self, _request: object) -> None:
            (folder / "adapter_model.safetensors").unlink()
            if gone:
                folder.rmdir()
            raise RuntimeError("no such file")

        async def remove_lora(self, _number: int) -> None:
            pass

    async def refusal() -> ApiError:
        with pytest.raises(ApiError) as refused:
            await VllmEngine(Reader(), Serving()).load(manifest, folder)
        return refused.value

    for gone, expected in ((False, 500), (True, 404)):
        if read:
            (folder / "adapter_model.safetensors").write_bytes(b"weights")
        elif gone:
            folder.rmdir()
        assert asyncio.run(refusal()).status == expected


class Untrying:
    """vLLM's client for 32 tokens of context: takes adapters, and refuses to read a text, or a prompt too long."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    async def add_lora(self, request: Any) -> None:
        self.held.add(request.lora_int_id)

    async def remove_lora(self, number: int) -> None:
        self.held.discard(number)

    async def generate(self, *_: object, **__: object) -> AsyncIterator[object]:
        raise ValueError("refused")
        yield


@pytest.mark.parametrize(("n_tokens", "served"), [(31, False), (32, True), (48, True)])
def test_an_adapter_whose_trial_fails_does_not_stay_in_the_engine(tmp_path, n_tokens, served):
    """However it fails. A trial text that leaves no room in the context is not tried: the adapter is served."""
    trial = {"tokens": [5.0] * n_tokens, "base": [-1.0] * (n_tokens - 1), "adapter": [-2.0] * (n_tokens - 1)}
    manifest = dataclasses.replace(tiny_manifest("a"), trial=trial)
    client, serving = Untrying(), Serving()
    engine = VllmEngine(client, serving)
    if served:
        asyncio.run(engine.load(manifest, tmp_path))
    else:
        with pytest.raises(ApiError, match="the engine refused a@000000000000: refused"):
            asyncio.run(engine.load(manifest, tmp_path))
    assert (len(client.held), list(serving.lora_requests)) == ((1, [manifest.id]) if served else (0, []))


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"nonsense", b""], ids=["bytes", "unknown", "empty"])
def test_a_broken_current_is_one_complaint_and_the_others_go_on(tmp_path, caplog, damage):
    """The watch survives it, the name stays what it was, new names are still found, and a start does not fail."""

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("a"))
        await pool.start()
        (tmp_path / "a" / "new").write_bytes(damage)
        (tmp_path / "a" / "new").replace(tmp_path / "a" / "current")
        watching = asyncio.create_task(pool.watch())
        shelve(tmp_path, tiny_manifest("b"))
        await until(lambda: pool.state(tiny_manifest("b")) == "loaded" if "b" in pool.published else False)
        assert await pool.resolve("a") == tiny_manifest("a")
        assert not watching.done()
        watching.cancel()
        again, _ = pool_of(4, tmp_path)
        await again.start()
        assert await again.resolve("b") == tiny_manifest("b")

    asyncio.run(scene())


@pytest.mark.parametrize("spoiled", [{"sha256": None}, {"sha256": "0" * 64, "bytes": "many"}, 3])
def test_a_manifest_that_lacks_what_loading_needs_keeps_nobody_from_starting(tmp_path, spoiled):
    """It is told as broken when it is read, not when it is loaded."""

    async def scene() -> None:
        shelve(tmp_path, tiny_manifest("good"))
        shelve(tmp_path, tiny_manifest("odd"))
        path = tmp_path / "odd" / ("0" * 12) / "manifest.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "files": {"adapter_model.safetensors": spoiled}}))
        pool, _ = pool_of(4, tmp_path)
        await pool.start()
        assert await pool.resolve("good") == tiny_manifest("good")
        with pytest.raises(ApiError, match="does not exist"):
            await pool.resolve("odd")

    asyncio.run(scene())


def test_a_load_that_ends_in_a_fault_blocks_no_name(tmp_path, caplog):
    """Not a refusal but an exception: it is told in the log, and the name moves on with its next version."""

    async def scene() -> None:
        pool, notes = pool_of(4, tmp_path)
        one, two, three = (tiny_manifest("a", digit * 12) for digit in "123")
        shelve(tmp_path, one)
        await pool.start()
        notes.breaks.add(two.id)
        shelve(tmp_path, two)
        watching = asyncio.create_task(pool.watch())
        await until(lambda: pool.unservable_reason(two) is not None)
        assert await pool.resolve("a") == one
        shelve(tmp_path, three)
        await until(lambda: pool.current_version("a") == three)
        assert not watching.done()
        watching.cancel()

    asyncio.run(scene())
    assert any(record.exc_info and "could not load" in record.getMessage() for record in caplog.records)
    assert any("cannot be served" in r.getMessage() and "goes on" in r.getMessage() for r in caplog.records)


def test_after_a_restart_a_name_means_its_last_version_that_can_be_served(tmp_path, caplog):
    """Rank 8, then rank 128 on a server for 16: said in the log, and rank 8 answers, before and after a restart."""

    async def scene() -> list[Manifest]:
        good, large = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12, rank=128)
        shelve(tmp_path, good)
        pool, _ = pool_of(4, tmp_path)
        await pool.start()
        shelve(tmp_path, large)
        await pool.refresh()
        again, _ = pool_of(4, tmp_path)
        await again.start()
        assert again.published["a"].current == large.version
        return [await pool.resolve("a"), await again.resolve("a")]

    assert {found.version for found in asyncio.run(scene())} == {"1" * 12}
    said = [record.getMessage() for record in caplog.records]
    assert (
        len(
            [
                line
                for line in said
                if "rank 128 is above this server's --max-lora-rank 16; a@111111111111 goes on" in line
            ]
        )
        == 2
    )


def test_an_unloaded_version_is_not_stood_in_for_by_an_older_one(tmp_path):
    """Who unloads a name wants it gone, not answered by what it meant last month."""

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        for digit in "12":
            shelve(tmp_path, tiny_manifest("a", digit * 12))
        await pool.start()
        await _unload(pool, "a")
        with pytest.raises(ApiError, match="unloaded by an admin"):
            await pool.resolve("a")

    asyncio.run(scene())


def test_many_names_published_at_once_turn_nobody_out(tmp_path):
    """60 new names, room for 8, 4 taken: four are loaded, none is unloaded, and a request's load is not the 60th."""

    async def scene() -> tuple[list[str], int]:
        pool, notes = pool_of(8, tmp_path)
        for n in range(4):
            shelve(tmp_path, tiny_manifest(f"old{n}"))
        await pool.start()
        for n in range(60):
            shelve(tmp_path, tiny_manifest(f"new{n}"))
        await pool.refresh()
        asked = await pool.resolve("new59")
        pool.release(await pool.acquire(asked))
        place = notes.told.index("+new59") - 4
        await until(lambda: pool._catching_up.done())
        return notes.told, place

    told, place = asyncio.run(scene())
    assert len(told) == 8
    assert not any(word.startswith("-") for word in told)
    assert place <= 1


def test_a_name_in_the_engine_gets_its_new_version_also_where_there_is_no_room(tmp_path):
    """It takes the place of an idle one; names that nobody asked for wait until somebody does."""

    async def scene() -> None:
        pool, _ = pool_of(2, tmp_path)
        for name in ("a", "b"):
            shelve(tmp_path, tiny_manifest(name))
        await pool.start()
        new = tiny_manifest("a", "1" * 12)
        shelve(tmp_path, new)
        shelve(tmp_path, tiny_manifest("c"))
        watching = asyncio.create_task(pool.watch())
        await until(lambda: pool.current_version("a") == new and pool.state(new) == "loaded")
        assert pool.state(tiny_manifest("c")) == "published"
        watching.cancel()

    asyncio.run(scene())


def test_a_version_published_again_is_the_same_version(tmp_path):
    """Removed and published anew with another time: its pin holds, it stays in the engine, and it is not gone."""

    async def scene() -> list[str]:
        events: list[str] = []
        pool, notes = pool_of(1, tmp_path, lambda event, manifest, _s: events.append(event))
        first = tiny_manifest("a")
        again = dataclasses.replace(first, created_utc="2026-06-01T00:00:00.000000+00:00")
        shelve(tmp_path, first, pinned=True)
        await pool.start()
        for seen_between in (False, True):
            shutil.rmtree(tmp_path / "a")
            if seen_between:
                await pool.refresh()
            shelve(tmp_path, again, pinned=True)
            await pool.refresh()
            await until(lambda: not pool._tasks and pool._pending_swaps == {})
            assert pool.means(again)
            assert pool._pinned(pool.loaded_adapters[again.id].manifest)
        return [*notes.told, *events]

    assert asyncio.run(scene()) == ["+a", "load"]


def test_a_store_that_is_away_for_a_moment_unloads_nothing(tmp_path):
    """Renamed, or unmounted to leave an empty folder: what was read goes on, and what changed meanwhile is seen."""

    async def scene() -> list[str]:
        store = tmp_path / "store"
        pool, notes = pool_of(4, store)
        shelve(store, tiny_manifest("a"))
        await pool.start()
        store.rename(tmp_path / "away")
        await pool.refresh()
        store.mkdir()
        await pool.refresh()
        assert await pool.resolve("a") == tiny_manifest("a")
        store.rmdir()
        (tmp_path / "away").rename(store)
        shelve(store, tiny_manifest("b"))
        await pool.refresh()
        await until(lambda: pool.state(tiny_manifest("b")) == "loaded")
        return notes.told

    assert asyncio.run(scene()) == ["+a", "+b"]


def test_a_second_unload_ends_when_the_first_does(tmp_path):
    """It says that the adapter is gone only when it is."""

    async def scene() -> None:
        pool, notes = pool_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("a"))
        await pool.start()
        held = await pool.acquire(tiny_manifest("a"))
        unloads = [asyncio.create_task(pool.retire(held.manifest.id)) for _ in range(2)]
        pool.unloaded_by_admin.add(held.manifest.id)
        await until(lambda: pool.state(held.manifest) == "draining")
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(unload.done() for unload in unloads)
        pool.release(held)
        await unloads[1]
        assert notes.told == ["+a", "-a"]
        await unloads[0]

    asyncio.run(scene())


def test_an_unknown_name_is_answered_without_reading_the_store(tmp_path, monkeypatch):
    """Also one of 1 MB: the store is not read for it, and it is not told back in full."""

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("gentle"))
        await pool.start()
        monkeypatch.setattr(pool._reader, "changes", lambda known: pytest.fail("the store was read"))
        for name in ("gentel", "gentle@"):
            with pytest.raises(ApiError, match="does not exist; did you mean 'gentle"):
                await pool.resolve(name)
        for name in ("x" * 1_000_000, "gentle@" + "0" * 1_000_000, "../etc", "\ud800"):
            with pytest.raises(ApiError, match="does not exist") as refused:
                await pool.resolve(name)
            assert len(refused.value.message) < 1000

    asyncio.run(scene())


def test_stamps_ahead_of_the_clock_are_read_once(tmp_path, monkeypatch):
    """A file server's clock may be ahead of ours: what did not change is not read at every look."""
    reads: list[str] = []
    whole = adapter_store.read_versions

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("a"))
        ahead_ns = time.time_ns() + 3600 * 10**9
        os.utime(tmp_path / "a", ns=(ahead_ns, ahead_ns))
        reads.clear()
        await pool.start()
        for _ in range(5):
            await pool.refresh()

    monkeypatch.setattr(adapter_store, "read_versions", lambda store, name: reads.append(name) or whole(store, name))
    asyncio.run(scene())
    assert reads == ["a", "a"]


def test_a_version_that_could_not_be_read_is_served_once_it_can_be(tmp_path):
    """Its manifest is mended in its place, which the time of the name's folder does not show."""

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("a"))
        path = tmp_path / "a" / ("0" * 12) / "manifest.json"
        whole = path.read_text()
        path.write_text("{")
        await pool.start()
        for _ in range(3):
            await pool.refresh()
        path.write_text(whole)
        await pool.refresh()
        assert await pool.resolve("a") == tiny_manifest("a")

    asyncio.run(scene())


def test_a_store_that_could_not_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch):
    """No file could be opened for three looks (EMFILE): what was published then is served after."""

    async def scene() -> None:
        pool, _ = pool_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("a"))
        with monkeypatch.context() as patch:
            patch.setattr(adapter_store, "read_versions", no_file)
            await pool.start()
            for _ in range(3):
                await pool.refresh()
        await pool.refresh()
        assert await pool.resolve("a") == tiny_manifest("a")

    def no_file(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    asyncio.run(scene())


def test_loading_a_name_makes_it_mean_what_was_loaded_or_is_refused(tmp_path):
    """vLLM's load route: an older version is not what the name means, and is not said to be."""

    async def scene() -> None:
        pool, notes = pool_of(4, tmp_path)
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        shelve(tmp_path, old)
        await pool.start()
        notes.refuses.add(new.id)
        shelve(tmp_path, new)
        await pool.refresh()
        await until(lambda: pool.unservable_reason(new) is not None)
        assert pool.means(old)
        with pytest.raises(ApiError, match="roll back to a@111111111111"):
            await _load(pool, "a", old.id, load_inplace=False)
        notes.refuses.clear()
        await _load(pool, "a", new.id, load_inplace=False)
        assert pool.means(new)

    asyncio.run(scene())


def test_no_series_of_a_removed_version_comes_back():
    """A request that ends after it, and a load that fails after it, are counted no more."""
    metrics = ServerMetrics()
    manifest = tiny_manifest("removed-in-a-test")

    def series() -> list[str]:
        return [line for line in generate_latest().decode().splitlines() if manifest.id in line]

    metrics.adapter_event("load", manifest, 0.1)
    assert series()
    metrics.adapter_event("gone", manifest, 0.0)
    metrics.adapter_event("unload", manifest, 0.0)
    metrics.adapter_event("fail", manifest, 0.0)
    metrics.answered(manifest.id, 200, Tally(answers={("r", 0): Answer(2, 0.1, 0.2)}), 0.1, streamed=True)
    assert series() == []
