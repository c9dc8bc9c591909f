"""The plane on an engine that only takes notes."""

import asyncio
import dataclasses
import hashlib
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.adapters import VllmEngine
from serve.openai_errors import Refusal
from serve.plane import Plane
from tests.tiny import tiny_manifest
from tests.waiting import HANG_S
from train.files import write_json, write_text
from train.store import Manifest


class Serving:
    """What vLLM's API process knows of its models."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, object] = {}
        self.base_model_paths = [types.SimpleNamespace(name="tiny")]


class Notes:
    """An engine that writes down what it is told, takes a moment to load, and can be told to refuse."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses: set[str] = set()
        self.on_unload: Callable[[], object] = lambda: None

    async def load(self, manifest: Manifest, path: Path) -> None:
        await asyncio.sleep(0.01)
        if manifest.id in self.refuses:
            raise Refusal(500, "no")
        self.told.append(f"+{manifest.name}")

    async def unload(self, manifest: Manifest) -> None:
        self.on_unload()
        self.told.append(f"-{manifest.name}")


def plane_of(
    capacity: int, store: Path, on_event: Callable[[str, Manifest, float], None] = lambda *_: None
) -> tuple[Plane, Notes]:
    notes = Notes()
    return Plane(notes, store, "tiny", "f00d", capacity, max_rank=16, on_event=on_event), notes


def test_many_who_ask_at_once_share_one_load(tmp_path):
    """Twenty first requests cause one load; one that hangs up meanwhile does not undo it for the others."""

    async def scene() -> list[str]:
        plane, notes = plane_of(4, tmp_path)
        waiting = [asyncio.create_task(plane.acquire(tiny_manifest("a"))) for _ in range(20)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert plane.residents[tiny_manifest("a").id].in_flight == 19
        return notes.told

    assert asyncio.run(scene()) == ["+a"]


def test_the_least_recently_used_idle_adapter_gives_way(tmp_path):
    """With room for two, a third waits until one is idle, and takes the place of the one idle longest."""

    async def scene() -> list[str]:
        plane, notes = plane_of(2, tmp_path)
        a, b = await plane.acquire(tiny_manifest("a")), await plane.acquire(tiny_manifest("b"))
        third = asyncio.create_task(plane.acquire(tiny_manifest("c")))
        await until(lambda: plane.state(tiny_manifest("c")) != "published")
        plane.release(b)
        plane.release(a)
        await third
        return notes.told

    assert asyncio.run(scene()) == ["+a", "+b", "-b", "+c"]


def test_a_replaced_version_is_freed_only_when_its_last_request_ends(tmp_path):
    """Drain, then unload: in that order."""

    async def scene() -> tuple[list[str], list[int]]:
        plane, notes = plane_of(4, tmp_path)
        held, in_flight = await plane.acquire(tiny_manifest("a")), []
        notes.on_unload = lambda: in_flight.append(held.in_flight)
        retiring = asyncio.create_task(plane.retire(tiny_manifest("a").id))
        await until(lambda: plane.state(tiny_manifest("a")) != "loaded")
        plane.release(held)
        await retiring
        return notes.told, in_flight

    assert asyncio.run(scene()) == (["+a", "-a"], [0])


def test_a_load_that_fails_is_told_to_each_and_tried_anew(tmp_path):
    """Waiters get the refusal, nothing stays resident, and the next request loads it when it can be loaded."""

    async def scene() -> list[str]:
        plane, notes = plane_of(4, tmp_path)
        notes.refuses.add(tiny_manifest("a").id)
        outcomes = await asyncio.gather(*(plane.acquire(tiny_manifest("a")) for _ in range(3)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Refusal] * 3
        assert plane.residents == {}
        notes.refuses.clear()
        await plane.acquire(tiny_manifest("a"))
        return notes.told

    assert asyncio.run(scene()) == ["+a"]


def test_what_cannot_be_served_says_why(tmp_path):
    """Another base's adapter and too large a rank are refused with the reason."""

    async def scene() -> None:
        plane, _ = plane_of(4, tmp_path)
        assert plane.why_not(tiny_manifest("a")) is None
        assert "made for base" in (plane.why_not(tiny_manifest("a", base="beef")) or "")
        assert "rank 64 is above" in (plane.why_not(tiny_manifest("a", rank=64)) or "")

    asyncio.run(scene())


def shelve(store: Path, manifest: Manifest, *, pinned: bool = False) -> None:
    """Put a manifest (no weights: the engine only takes notes) where `publish` would, and make it current."""
    write_json(store / manifest.name / manifest.version / "manifest.json", dataclasses.asdict(manifest))
    if pinned:
        (store / manifest.name / "pinned").touch()
    write_text(store / manifest.name / "current", manifest.version)


async def until(promise: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not promise():
            await asyncio.sleep(0.02)


def test_a_new_version_that_found_no_room_is_served_once_there_is(tmp_path, monkeypatch):
    """While every place is busy the name keeps its old version; when one is free it moves on by itself."""

    async def scene() -> None:
        events = []
        plane, _ = plane_of(1, tmp_path, lambda event, manifest, _s: events.append((event, manifest)))
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        shelve(tmp_path, old)
        await plane.start()
        held = await plane.acquire(old)
        shelve(tmp_path, new)
        watching = asyncio.create_task(plane.watch())
        await until(lambda: events.count(("fail", new)) >= 2)
        assert plane.meaning("a") == old
        plane.release(held)
        await until(lambda: plane.meaning("a") == new)
        watching.cancel()

    monkeypatch.setattr("serve.plane.ROOM_WAIT_S", 0.2)
    monkeypatch.setattr("serve.plane.RETRY_S", 0.1)
    asyncio.run(scene())


def test_where_all_are_pinned_the_next_is_refused_at_once(tmp_path):
    """No request waits for room that cannot come: one that waited would be told that all are busy."""

    async def scene() -> None:
        plane, notes = plane_of(1, tmp_path)
        shelve(tmp_path, tiny_manifest("a"), pinned=True)
        shelve(tmp_path, tiny_manifest("b"))
        await plane.start()
        assert notes.told == ["+a"]
        with pytest.raises(Refusal, match="all 1 adapters are pinned"):
            await plane.acquire(await plane.resolve("b"))
        assert list(plane.residents) == [tiny_manifest("a").id]

    asyncio.run(scene())


def test_a_name_first_loaded_on_demand_keeps_its_version_until_the_next_is_loaded(tmp_path):
    """Its next version cannot be served here (rank 128): the one that works goes on."""

    async def scene() -> str:
        plane, _ = plane_of(1, tmp_path)
        for name in ("a", "b"):
            shelve(tmp_path, tiny_manifest(name))
        await plane.start()
        for name in ("a", "b"):
            plane.release(await plane.acquire(await plane.resolve(name)))
        for name in ("a", "b"):
            shelve(tmp_path, tiny_manifest(name, "1" * 12, rank=128))
        await plane.refresh()
        return [(await plane.resolve(name)).version for name in ("a", "b")]

    assert asyncio.run(scene()) == ["0" * 12, "0" * 12]


def test_a_version_rolled_back_to_while_it_drains_stays(tmp_path):
    """A name that returns to a version still answering keeps it in the engine."""

    async def scene() -> list[str]:
        plane, notes = plane_of(4, tmp_path)
        old, new = tiny_manifest("a", "1" * 12), tiny_manifest("a", "2" * 12)
        shelve(tmp_path, old)
        await plane.start()
        held = await plane.acquire(old)
        shelve(tmp_path, new)
        await plane.refresh()
        await until(lambda: plane.state(old) == "draining")
        shelve(tmp_path, old)
        await plane.refresh()
        await until(lambda: plane.meaning("a") == old)
        plane.release(held)
        await until(lambda: plane.state(old) == "loaded" and plane.state(new) == "published")
        return notes.told

    assert asyncio.run(scene()) == ["+a", "+a", "-a"]


def test_one_broken_version_leaves_the_others_served_and_is_told_once(tmp_path, caplog):
    """A shelf that cannot be read is left as it was; the watch goes on, and the log does not fill."""

    async def scene() -> None:
        plane, _ = plane_of(4, tmp_path)
        shelve(tmp_path, tiny_manifest("good"))
        shelve(tmp_path, tiny_manifest("broken"))
        (tmp_path / "broken" / ("0" * 12) / "manifest.json").write_text("{")
        shelve(tmp_path, dataclasses.replace(tiny_manifest("odd"), base={}))
        await plane.start()
        for _ in range(3):
            await plane.refresh()
        assert await plane.resolve("good") == tiny_manifest("good")

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

    async def refusal() -> Refusal:
        with pytest.raises(Refusal) as refused:
            await VllmEngine(Reader(), Serving()).load(manifest, folder)
        return refused.value

    for gone, expected in ((False, 500), (True, 404)):
        if read:
            (folder / "adapter_model.safetensors").write_bytes(b"weights")
        elif gone:
            folder.rmdir()
        assert asyncio.run(refusal()).status == expected
