"""Canaries in the store and in the server: who gets which version, and what starts and ends it."""

import asyncio
import contextlib
import json
import threading

import pytest

from counsel import rollout
from counsel import store as adapter_store
from counsel.canary import CANARY, KEY, Canary
from counsel.errors import UserError
from counsel.files import read_json
from counsel.store_garbage import collect_garbage
from serve.canary.choice import opening_of
from tests.fake_engine import new_watcher, put_in_store, until
from tests.tiny import tiny_manifest
from train.preflight import check_run_name
from train.recipe import Recipe

OLD, NEW, THIRD = (tiny_manifest("a", digit * 12) for digit in "123")


def _canary(share: float, sticky: str = "conversation") -> Canary:
    return Canary("2" * 12, share, sticky, "salt", "2026-01-01T00:00:00+00:00")


@pytest.fixture
def store(tmp_path):
    """A store where `a` means OLD, and also has NEW and THIRD."""
    for manifest in (THIRD, NEW, OLD):
        put_in_store(tmp_path, manifest)
    return tmp_path


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_share_of_the_conversations_is_chosen(share):
    """Of 20,000 conversations, within five standard errors."""
    canary = _canary(share)
    n = 20_000
    chosen = sum(canary.chooses(canary.unit("key", f"question {number}")) for number in range(n))
    assert abs(chosen - share * n) < 5 * (n * share * (1 - share)) ** 0.5


def test_a_larger_share_keeps_every_conversation_that_had_the_new_version():
    small, large = _canary(0.1), _canary(0.4)
    units = [small.unit("key", str(number)) for number in range(2000)]
    assert units == [large.unit("key", str(number)) for number in range(2000)]
    assert {unit for unit in units if small.chooses(unit)} < {unit for unit in units if large.chooses(unit)}


def test_what_stays_on_one_side():
    """By conversation, the key and the opening; by key, the key alone; another canary draws anew."""
    by_conversation, by_key = _canary(0.5), _canary(0.5, KEY)
    assert by_conversation.unit("k", "a") != by_conversation.unit("k", "b") != by_conversation.unit("l", "b")
    assert by_key.unit("k", "a") == by_key.unit("k", "b") != by_key.unit("l", "b")
    other = Canary("2" * 12, 0.5, KEY, "pepper", "")
    units = [str(number) for number in range(200)]
    assert [by_key.chooses(by_key.unit(u, "")) for u in units] != [other.chooses(other.unit(u, "")) for u in units]


TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "i feel lonely"},
]


def test_a_conversation_keeps_its_opening_as_it_goes_on():
    """Also when its system turn changes; the forms of the three routes; bodies that will be refused have one too."""
    openings = {opening_of("/v1/chat/completions", {"messages": turns}) for turns in (TURNS, TURNS[:2], TURNS[1:])}
    assert openings == {json.dumps("hello")}
    assert opening_of("/v1/responses", {"input": TURNS}) == json.dumps("hello")
    assert opening_of("/v1/responses", {"input": "hello"}) == json.dumps("hello")
    assert opening_of("/v1/completions", {"prompt": ["a", "b"]}) == json.dumps(["a", "b"])
    lone = {"role": "user", "content": "\ud800"}
    for body in ({}, {"messages": None}, {"messages": [3]}, {"messages": [lone]}, {"messages": [{"role": "user"}]}):
        unit = _canary(0.5).unit("key", opening_of("/v1/chat/completions", body))
        assert len(unit) == 16


def test_start_grow_promote(store):
    started = rollout.start_canary(store, NEW.id, 0.1)
    grown = rollout.start_canary(store, NEW.id, 0.5)
    assert (started.current, started.new) == (OLD, NEW) == (grown.current, grown.new)
    assert grown.canary.id == started.canary.id
    assert grown.canary.share == 0.5
    assert rollout.promote_canary(store, "a") == NEW
    after = adapter_store.read_versions(store, "a")
    assert (after.current, after.canary, after.history[-2:]) == (NEW.version, None, (OLD.version, NEW.version))
    assert adapter_store.rollback(store, "a") == OLD


def test_roll_back_leaves_the_name_as_it_was(store):
    before = adapter_store.read_versions(store, "a")
    rollout.start_canary(store, NEW.id, 0.1)
    assert rollout.end_canary(store, "a") == OLD
    assert adapter_store.read_versions(store, "a") == before
    with pytest.raises(UserError, match="no canary of 'a' runs"):
        rollout.promote_canary(store, "a")


@pytest.mark.parametrize(
    ("served_name", "share", "message"),
    [
        ("a", 0.1, "names no version"),
        (OLD.id, 0.1, "already"),
        ("a@" + "9" * 12, 0.1, "has no version"),
        ("b@" + "9" * 12, 0.1, "no adapter 'b'"),
        (NEW.id, 0.0, "share is 0.0"),
        (NEW.id, 1.0, "share is 1.0"),
        (NEW.id, float("nan"), "share is nan"),
    ],
)
def test_a_canary_that_cannot_be_is_refused(store, served_name, share, message):
    with pytest.raises(UserError, match=message):
        rollout.start_canary(store, served_name, share)
    assert not (store / "a" / CANARY).exists()


def test_what_would_mix_up_a_canary_is_refused_while_it_runs(store):
    """Another canary, a rollback, removing its version; gc keeps both versions; removing the name ends it."""
    rollout.start_canary(store, NEW.id, 0.1)
    running = read_json(store / "a" / CANARY)
    for attempt in (
        lambda: rollout.start_canary(store, THIRD.id, 0.1),
        lambda: rollout.start_canary(store, NEW.id, 0.1, KEY),
        lambda: adapter_store.rollback(store, "a"),
        lambda: adapter_store.remove(store, NEW.id),
    ):
        with pytest.raises(UserError, match=r"canary (rollback|promote) a"):
            attempt()
    assert read_json(store / "a" / CANARY) == running
    assert collect_garbage(store, keep=0) == [THIRD.id]
    assert adapter_store.read_versions(store, "a").canary
    adapter_store.remove(store, "a")
    assert adapter_store.names(store) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", json.dumps({"version": "9" * 12}), "share", "sticky"],
)
def test_a_damaged_canary_is_none_and_can_be_ended(store, text):
    rollout.start_canary(store, NEW.id, 0.1)
    written = read_json(store / "a" / CANARY)
    damage = {"share": {**written, "share": 2}, "sticky": {**written, "sticky": "day"}}.get(text)
    (store / "a" / CANARY).write_text(json.dumps(damage) if damage else text)
    found = adapter_store.read_versions(store, "a")
    assert (found.canary, found.current, set(found.broken)) == (None, OLD.version, {CANARY})
    assert collect_garbage(store, keep=9) == []
    assert rollout.end_canary(store, "a") == OLD
    assert adapter_store.read_versions(store, "a").broken == {}


def test_a_promote_that_was_killed_half_way_has_promoted(store):
    """`current` is written first: a canary of the current version is none."""
    rollout.start_canary(store, NEW.id, 0.1)
    adapter_store.make_current(store, NEW)
    found = adapter_store.read_versions(store, "a")
    assert (found.current, found.canary, found.broken) == (NEW.version, None, {})


def test_of_two_admins_one_ends_the_canary(store):
    """A promote and a rollback at once: one is told that no canary runs, and the other has happened as a whole."""
    for _ in range(10):
        adapter_store.make_current(store, OLD)
        rollout.start_canary(store, NEW.id, 0.1)
        done = []

        def attempt(act, done=done):
            with contextlib.suppress(UserError):
                done.append(act(store, "a"))

        threads = [threading.Thread(target=attempt, args=[act]) for act in (rollout.promote_canary, rollout.end_canary)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = adapter_store.read_versions(store, "a")
        assert [found.versions[found.current]] == done
        assert found.canary is None


def test_a_server_follows_a_canary_from_start_to_promotion(store):
    """Both versions are in the engine while it runs; the one that lost is unloaded after it."""

    async def scene() -> None:
        watcher, _ = new_watcher(4, store)
        names, pool = watcher.names, watcher.pool
        await watcher.start()
        watch = asyncio.create_task(watcher.watch())
        rollout.start_canary(store, NEW.id, 0.1)
        await until(lambda: pool.state(NEW) == "loaded")
        assert names.canary_version("a") == NEW
        assert names.current_version("a") == OLD
        assert pool.state(OLD) == "loaded"
        assert names.find("a") == OLD
        assert names.find(NEW.id) == NEW
        rollout.end_canary(store, "a")
        await until(lambda: pool.state(NEW) == "published")
        assert names.canary_version("a") is None
        assert names.current_version("a") == OLD
        rollout.start_canary(store, NEW.id, 0.1)
        await until(lambda: pool.state(NEW) == "loaded")
        # Ended and begun again while the version that it gives is on its way out.
        held = await pool.acquire(NEW)
        rollout.end_canary(store, "a")
        await until(lambda: pool.state(NEW) == "draining")
        rollout.start_canary(store, NEW.id, 0.1)
        await until(lambda: names.canary_version("a") == NEW)
        pool.release(held)
        await until(lambda: pool.state(NEW) == "loaded")
        rollout.promote_canary(store, "a")
        await until(lambda: names.current_version("a") == NEW and pool.state(OLD) == "published")
        watch.cancel()

    asyncio.run(scene())


def test_a_server_that_starts_during_a_canary_takes_part(store):
    rollout.start_canary(store, NEW.id, 0.1)

    async def scene() -> list[str]:
        watcher, _ = new_watcher(4, store)
        await watcher.start()
        return [watcher.pool.state(manifest) for manifest in (OLD, NEW)]

    assert asyncio.run(scene()) == ["loaded", "loaded"]


@pytest.mark.parametrize("why", ["rank", "refused"])
def test_a_canary_that_a_server_cannot_serve_gets_no_request_there(tmp_path, caplog, why):
    """It is said once, and the current version answers everybody."""
    new = tiny_manifest("a", "2" * 12, rank=128 if why == "rank" else 8)
    put_in_store(tmp_path, new)
    put_in_store(tmp_path, OLD)
    rollout.start_canary(tmp_path, new.id, 0.5)

    async def scene() -> None:
        watcher, engine = new_watcher(4, tmp_path)
        if why == "refused":
            engine.refuses.add(new.id)
        await watcher.start()
        for _ in range(3):
            await watcher.refresh()
        assert watcher.names.canary_version("a") is None
        assert await watcher.resolve("a") == OLD

    asyncio.run(scene())
    said = [record.getMessage() for record in caplog.records if f"{new.id} cannot be served" in record.getMessage()]
    assert len(said) == 1
    assert f"{OLD.id} is still served" in said[0]


def test_a_training_that_could_not_publish_is_refused_before_it_starts(store):
    """Its name has a canary: `train check` says so, and a run that does not publish is fine."""
    rollout.start_canary(store, NEW.id, 0.1)
    with pytest.raises(UserError, match="a canary of 'a' runs"):
        check_run_name(Recipe(name="a", store=str(store)))
    check_run_name(Recipe(name="a", store=""))
    check_run_name(Recipe(name="b", store=str(store)))
