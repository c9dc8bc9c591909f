"""The gate's pure parts: bodies, limits, keys, configuration, and the plane on an engine that only takes notes."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import journal
from serve.adapters import drops_system
from serve.bodies import CHAT, COMPLETIONS, RESPONSES, Body, n_sequences, prepare, wants_usage
from serve.config import ServeConfig
from serve.gateway import _refuse_foreign_name
from serve.journal import Journal
from serve.keys import ADMIN, USER, KeyRing, add_key
from serve.launch import gate_flags
from serve.limits import Limits
from serve.openai_errors import Refusal
from serve.plane import Plane
from serve.server import Server, reason_in
from tests.tiny import tiny_tokenizer
from train.errors import UserError
from train.files import write_json, write_text
from train.store import Manifest

USER_TURN = {"role": "user", "content": "hello"}


def manifest(name: str, version: str = "0" * 12, system: str = "", rank: int = 8, base: str = "f00d") -> Manifest:
    return Manifest(
        format=1,
        name=name,
        version=version,
        created_utc=f"2026-01-01T00:00:00.{int(version, 16):06d}+00:00",
        base={"name": "tiny", "hub_id": "tiny", "fingerprint": base},
        rank=rank,
        alpha=16.0,
        target_modules=["q_proj"],
        files={},
        prompt={"system": system},
        run=None,
    )


# Bodies


def ready(path: str, body: Body, manifest: Manifest | None, **conventions: object) -> Body:
    return prepare(path, body, manifest, max_completion_tokens=100, **conventions)  # type: ignore[arg-type]


def test_the_manifests_system_text_is_put_first_only_where_there_is_none():
    """Chat gets a system turn, responses get instructions, completions stay raw; a text of the request's own stays."""
    kind = manifest("kind", system="Be kind.")
    chat = ready(CHAT, {"model": "kind", "messages": [USER_TURN]}, kind)
    assert chat["messages"] == [{"role": "system", "content": "Be kind."}, USER_TURN]
    assert chat["model"] == "kind@000000000000"
    for role in ("system", "developer"):
        own = {"messages": [{"role": role, "content": "Mine."}, USER_TURN]}
        assert ready(CHAT, own, kind)["messages"] == own["messages"]
    assert ready(RESPONSES, {"input": "hello"}, kind)["instructions"] == "Be kind."
    assert ready(RESPONSES, {"input": "hello", "instructions": "Mine."}, kind)["instructions"] == "Mine."
    assert "messages" not in ready(COMPLETIONS, {"prompt": "hello"}, kind)
    assert ready(CHAT, {"messages": [USER_TURN]}, None)["messages"] == [USER_TURN]


def test_a_template_without_a_system_role_gets_it_in_the_first_user_turn():
    """The manifest's text, or the request's own, opens the first user turn; parts become one text."""
    kind = manifest("kind", system="Be kind.")

    def asked(messages: list[dict[str, object]]) -> object:
        body = ready(CHAT, {"messages": messages}, kind, fold_system=True)
        return body["messages"]

    assert asked([USER_TURN]) == [{"role": "user", "content": "Be kind.\n\nhello"}]
    parts = {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    own = {"role": "system", "content": "Mine."}
    assert asked([own, parts, {"role": "assistant", "content": "hi"}]) == [
        {"role": "user", "content": "Mine.\n\nhello"},
        {"role": "assistant", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("template", "drops"),
    [
        ("{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{% endfor %}", False),
        ("{% for turn in messages if turn.role == 'user' %}{{ turn.content }}{% endfor %}", True),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", True),
        (None, False),
    ],
    ids=["keeps", "loses", "refuses", "none"],
)
def test_the_bases_own_template_says_whether_there_is_a_system_role(template, drops, tmp_path):
    """Folding is for templates that lose the system text or refuse it, and for no other."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    assert drops_system(tmp_path) is drops


def test_responses_are_folded_too_where_the_template_has_no_system_role():
    """Instructions, given or from the manifest, open the first user turn."""
    kind = manifest("kind", system="Be kind.")
    for given in ("hello", [USER_TURN], [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]):
        body = ready(RESPONSES, {"input": given}, kind, fold_system=True)
        assert body["input"] == [{"role": "user", "content": "Be kind.\n\nhello"}]
        assert "instructions" not in body
    assert ready(RESPONSES, {"input": "hello"}, None, fold_system=True)["input"] == [USER_TURN]


def test_callers_with_different_keys_never_share_cache_blocks():
    """The salt depends on the key and on the caller's own salt, and is never the caller's to choose."""
    salts = {ready(CHAT, {"cache_salt": own}, None, salt=key)["cache_salt"] for key in "ab" for own in ("", "x")}
    assert len(salts) == 4
    assert "cache_salt" not in ready(CHAT, {}, None)


def test_tokens_are_bounded_under_each_of_their_names():
    """More than the server allows is refused and says which field."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        with pytest.raises(Refusal, match=f"{name} is 101; at most 100") as refusal:
            ready(CHAT, {name: 101}, None)
        assert (refusal.value.status, refusal.value.param) == (400, name)
        assert ready(CHAT, {name: 100}, None)[name] == 100


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        (RESPONSES, {"background": True}, "somebody waits for"),
        # Text that vLLM asks while it is text, and reads as false later.
        (RESPONSES, {"background": True, "store": "false"}, "store is 'false'; it must be true or false"),
        (CHAT, {"stream": "false"}, "stream is 'false'"),
        (COMPLETIONS, {"bad_words": ["a" * 5000]}, "4096 characters"),
        (COMPLETIONS, {"bad_words": ["a"] * 129}, "may be 128"),
        (COMPLETIONS, {"bad_words": "a"}, "a list of texts"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is read"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text is read"),
    ],
)
def test_what_would_outlive_hold_up_or_send_out_the_server_is_refused(path, fields, says):
    """Answers nobody waits for, words that take a minute to tokenize, addresses to fetch: a clear 400."""
    with pytest.raises(Refusal, match=says) as refused:
        ready(path, fields, None)
    assert refused.value.status == 400


def test_nothing_of_a_response_is_kept_for_later():
    """Whatever a caller says of storing; texts in parts pass."""
    turn = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    assert ready(RESPONSES, {"input": [turn], "store": True}, None) == {"input": [turn], "store": False}


def test_every_stream_reports_usage_to_us_whoever_asked():
    """`include_usage` is always on in what vLLM gets; `wants_usage` remembers what the caller said."""
    quiet = {"stream": True}
    assert ready(CHAT, quiet, None)["stream_options"] == {"include_usage": True}
    assert not wants_usage(CHAT, quiet)
    assert wants_usage(CHAT, {"stream": True, "stream_options": {"include_usage": True}})
    assert "stream_options" not in ready(RESPONSES, quiet, None)


@pytest.mark.parametrize(
    ("body", "n"),
    [({}, 1), ({"n": 3}, 3), ({"prompt": "a"}, 1), ({"prompt": ["a", "b"], "n": 2}, 4), ({"prompt": [1, 2, 3]}, 1),
     ({"prompt": [[1], [2, 3]]}, 2), ({"n": None}, 1)],
)  # fmt: skip
def test_a_request_counts_for_the_sequences_it_makes(body, n):
    """`n` times the number of prompts; a list of token ids is one prompt."""
    assert n_sequences(COMPLETIONS, body) == n


@pytest.mark.parametrize("value", ["64", 64.0, True, [64]])
def test_a_bound_cannot_be_passed_by_spelling_a_number_otherwise(value):
    """vLLM reads "64" and 64.0 as 64: what we would not count is refused."""
    with pytest.raises(Refusal, match=r"n is .* whole number"):
        n_sequences(CHAT, {"n": value})
    with pytest.raises(Refusal, match=r"max_tokens is .* whole number"):
        ready(CHAT, {"max_tokens": value}, None)


# Limits


def test_a_key_waits_its_turn_then_meets_429_and_the_server_503():
    """Two run and one waits per key; what is beyond is told when to come again; who leaves lets the next one in."""

    async def scene() -> None:
        limits = Limits(per_key=2, queued_per_key=1, total=4)
        first = limits.enter("a", 2)
        second = limits.enter("a", 1)
        assert (first.done(), second.done()) == (True, False)
        with pytest.raises(Refusal, match="2 answers running of 2 and 1 waiting of 1") as full:
            limits.enter("a", 1)
        assert (full.value.status, full.value.retry_after_s) == (429, 1)
        third = limits.enter("b", 1)
        assert third.done()
        with pytest.raises(Refusal) as full:
            limits.enter("b", 1)
        assert (full.value.status, full.value.retry_after_s) == (503, 2)
        limits.leave("a", 2, first)
        assert second.done()
        assert limits.in_flight == 2
        limits.leave("a", 1, second)
        limits.leave("b", 1, third)
        assert (limits.in_flight, limits.lines) == (0, {})

    asyncio.run(scene())


def test_turns_come_in_order_and_one_who_gives_up_holds_nobody_up():
    """A small request does not overtake a large one; a waiting one that leaves, or is cancelled, gives its place up."""

    async def scene() -> None:
        limits = Limits(per_key=2, queued_per_key=9, total=99)
        running = limits.enter("a", 1)
        large, small, last = (limits.enter("a", n) for n in (2, 1, 1))
        assert not small.done()
        limits.leave("a", 2, large)
        limits.leave("a", 1, running)
        assert small.done()
        assert last.done()
        gone = limits.enter("a", 2)
        gone.cancel()
        limits.leave("a", 1, small)
        limits.leave("a", 1, last)
        limits.leave("a", 2, gone)
        assert (limits.in_flight, limits.lines) == (0, {})

    asyncio.run(scene())


# Keys


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path):
    """The file holds no key, only its owner can read it, and the ring finds each caller by the key itself."""
    path = tmp_path / "keys.txt"
    user, admin = add_key(path, USER, "ann"), add_key(path, ADMIN, "root")
    text = path.read_text()
    assert user not in text
    assert admin not in text
    assert path.stat().st_mode & 0o077 == 0
    ring = KeyRing(path, {"COUNSEL_ADMIN_KEYS": "from-environment"})
    assert (ring.find(user).name, ring.find(admin).role) == ("ann", ADMIN)
    assert ring.find("from-environment").role == ADMIN
    assert ring.find(user + "x") is None
    with pytest.raises(UserError, match="already has a key named 'ann'"):
        add_key(path, USER, "ann")


def test_the_ring_follows_its_file_and_survives_a_broken_one(tmp_path):
    """A new key works without a restart; a broken line changes nothing; removing every key does not open the door."""
    path = tmp_path / "keys.txt"
    first = add_key(path, USER, "ann")
    ring = KeyRing(path, {})

    def later() -> None:
        ring._checked_s -= 10  # the file is looked at once a second; the test does not wait

    second = add_key(path, USER, "bob")
    later()
    assert ring.find(second).name == "bob"
    path.write_text("user without-a-hash\n")
    later()
    assert ring.find(first).name == "ann"
    path.write_text("")
    later()
    assert ring.find(first) is None
    assert not ring.open


def test_a_ring_that_started_open_closes_with_its_first_key(tmp_path):
    """Also for callers who bring no key."""
    path = tmp_path / "keys.txt"
    path.write_text("")
    ring = KeyRing(path, {})
    assert ring.open
    add_key(path, USER, "ann")
    ring._checked_s -= 10
    assert not ring.open


def test_a_key_file_that_is_none_is_told_in_one_line(tmp_path):
    """Bytes, and a hash that is no hash (which could not be compared), are refused when the file is read."""
    path = tmp_path / "keys.txt"
    for raw in (b"\xff\xfe", b"user ann " + b"g" * 64, b"user ann " + "é".encode() * 64):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"no key file|is not `role name sha256`"):
            KeyRing(path, {})


def test_what_an_admin_tried_is_written_down_however_it_is_spelled(tmp_path):
    """Half a surrogate pair in a name must not keep a line out of the audit."""
    Journal(tmp_path).audit(target="\ud800")
    assert json.loads((tmp_path / "audit.jsonl").read_text())["target"] == "\ud800"


def test_strangers_cannot_fill_the_disk(tmp_path, monkeypatch):
    """The log of requests starts anew at its bound and keeps one file before it."""
    monkeypatch.setattr(journal, "MAX_BYTES", 10_000)
    log = Journal(tmp_path)
    for number in range(1000):
        log.request(path="/x", number=number)
    assert sorted(path.name for path in tmp_path.glob("requests*")) == ["requests.jsonl", "requests.jsonl.1"]
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.glob("requests*"))
    assert json.loads((tmp_path / "requests.jsonl").read_text().splitlines()[-1])["number"] == 999


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [(b"127.0.0.1:8000", True), (b"localhost", True), (b"[::1]:8000", True), (b"evil.example:8000", False),
     (b"127.0.0.1.evil.example", False), (b"10.0.0.1", False), (b"[", False), (b"", False)],
)  # fmt: skip
def test_a_server_without_keys_answers_to_loopback_names_only(host, is_ours):
    """A page whose name was made to mean 127.0.0.1 sends that name."""
    with contextlib.nullcontext() if is_ours else pytest.raises(Refusal, match="answers to localhost only"):
        _refuse_foreign_name({b"host": host})


# Configuration and the parent


def test_browsers_are_let_in_from_nowhere_unless_origins_are_named():
    """What vLLM's CORS middleware is told: no origin by default."""
    for config, origins in ((ServeConfig(), []), (ServeConfig(cors=("https://a.example",)), ["https://a.example"])):
        flags = gate_flags(config)
        assert json.loads(flags[flags.index("--allowed-origins") + 1]) == origins


def test_an_open_address_without_keys_is_refused(tmp_path, tiny_model):
    """Listening beyond loopback needs keys, in one line, before anything starts."""
    with pytest.raises(UserError, match="no keys are set"):
        Server(ServeConfig(model=str(tiny_model.path), host="0.0.0.0", port=0, logs=str(tmp_path)))


def test_a_port_in_use_is_told_at_once(tmp_path, tiny_model):
    """The address and the way out are in the one line."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use; .* --port"):
            Server(ServeConfig(model=str(tiny_model.path), port=port, logs=str(tmp_path)))


def test_the_reason_is_the_last_error_that_is_not_an_echo(tmp_path):
    """vLLM ends with 'see root cause above'; the cause is what a user needs."""
    log = tmp_path / "server.log"
    log.write_text(
        "(EngineCore pid=1) ERROR 11-23 [core.py:1] ValueError: 5.0 GB is less than 1.2 GB\n"
        "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert reason_in(log) == "ValueError: 5.0 GB is less than 1.2 GB"
    log.write_text(
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, max_model_len (9) is greater than 8 [type=value_error]\n"
        "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n"
    )
    assert reason_in(log) == "Value error, max_model_len (9) is greater than 8 [type=value_error]"


# The plane


class Notes:
    """An engine that writes down what it is told, takes a moment to load, and can be told to refuse."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses: set[str] = set()

    async def load(self, manifest: Manifest, path: Path) -> None:
        await asyncio.sleep(0.01)
        if manifest.id in self.refuses:
            raise Refusal(500, "no")
        self.told.append(f"+{manifest.name}")

    async def unload(self, manifest: Manifest) -> None:
        self.told.append(f"-{manifest.name}")


def plane_of(capacity: int, store: Path) -> tuple[Plane, Notes]:
    notes = Notes()
    return Plane(notes, store, "tiny", "f00d", capacity, max_rank=16, on_event=lambda *_: None), notes


def test_many_who_ask_at_once_share_one_load(tmp_path):
    """Twenty first requests cause one load; one that hangs up meanwhile does not undo it for the others."""

    async def scene() -> list[str]:
        plane, notes = plane_of(4, tmp_path)
        waiting = [asyncio.create_task(plane.acquire(manifest("a"))) for _ in range(20)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert plane.residents[manifest("a").id].in_flight == 19
        return notes.told

    assert asyncio.run(scene()) == ["+a"]


def test_the_least_recently_used_idle_adapter_gives_way(tmp_path):
    """With room for two, a third waits until one is idle, and takes the place of the one idle longest."""

    async def scene() -> list[str]:
        plane, notes = plane_of(2, tmp_path)
        a, b = await plane.acquire(manifest("a")), await plane.acquire(manifest("b"))
        third = asyncio.create_task(plane.acquire(manifest("c")))
        await asyncio.sleep(0.1)
        assert notes.told == ["+a", "+b"]
        plane.release(b)
        await asyncio.sleep(0.1)
        plane.release(a)
        await third
        return notes.told

    assert asyncio.run(scene()) == ["+a", "+b", "-b", "+c"]


def test_a_replaced_version_is_freed_only_when_its_last_request_ends(tmp_path):
    """Drain, then unload: in that order."""

    async def scene() -> tuple[list[str], float, float]:
        plane, notes = plane_of(4, tmp_path)
        held = await plane.acquire(manifest("a"))
        retiring = asyncio.create_task(plane.retire(manifest("a").id))
        await asyncio.sleep(0.2)
        assert notes.told == ["+a"]
        assert plane.state(manifest("a")) == "draining"
        plane.release(held)
        released_s = time.monotonic()
        await retiring
        return notes.told, released_s, time.monotonic()

    told, released_s, freed_s = asyncio.run(scene())
    assert told == ["+a", "-a"]
    assert freed_s > released_s


def test_a_load_that_fails_is_told_to_each_and_tried_anew(tmp_path):
    """Waiters get the refusal, nothing stays resident, and the next request loads it when it can be loaded."""

    async def scene() -> list[str]:
        plane, notes = plane_of(4, tmp_path)
        notes.refuses.add(manifest("a").id)
        outcomes = await asyncio.gather(*(plane.acquire(manifest("a")) for _ in range(3)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Refusal] * 3
        assert plane.residents == {}
        notes.refuses.clear()
        await plane.acquire(manifest("a"))
        return notes.told

    assert asyncio.run(scene()) == ["+a"]


def test_what_cannot_be_served_says_why(tmp_path):
    """Another base's adapter and too large a rank are refused with the reason."""

    async def scene() -> None:
        plane, _ = plane_of(4, tmp_path)
        assert plane.why_not(manifest("a")) is None
        assert "made for base" in (plane.why_not(manifest("a", base="beef")) or "")
        assert "rank 64 is above" in (plane.why_not(manifest("a", rank=64)) or "")

    asyncio.run(scene())


# The plane on a store


def shelve(store: Path, manifest: Manifest, *, pinned: bool = False) -> None:
    """Put a manifest (no weights: the engine only takes notes) where `publish` would, and make it current."""
    write_json(store / manifest.name / manifest.version / "manifest.json", dataclasses.asdict(manifest))
    if pinned:
        (store / manifest.name / "pinned").touch()
    write_text(store / manifest.name / "current", manifest.version)


async def until(promise: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not promise():
            await asyncio.sleep(0.02)


def test_a_new_version_that_found_no_room_is_served_once_there_is(tmp_path, monkeypatch):
    """While every place is busy the name keeps its old version; when one is free it moves on by itself."""

    async def scene() -> None:
        plane, _ = plane_of(1, tmp_path)
        old, new = manifest("a", "1" * 12), manifest("a", "2" * 12)
        shelve(tmp_path, old)
        await plane.start()
        held = await plane.acquire(old)
        shelve(tmp_path, new)
        watching = asyncio.create_task(plane.watch())
        await asyncio.sleep(0.8)
        assert plane.meaning("a") == old
        plane.release(held)
        await until(lambda: plane.meaning("a") == new)
        watching.cancel()

    monkeypatch.setattr("serve.plane.ROOM_WAIT_S", 0.2)
    monkeypatch.setattr("serve.plane.RETRY_S", 0.1)
    asyncio.run(scene())


def test_where_all_are_pinned_the_next_is_refused_at_once(tmp_path):
    """No request waits for room that cannot come."""

    async def scene() -> None:
        plane, notes = plane_of(1, tmp_path)
        shelve(tmp_path, manifest("a"), pinned=True)
        shelve(tmp_path, manifest("b"))
        await plane.start()
        assert notes.told == ["+a"]
        with pytest.raises(Refusal, match="all 1 adapters are pinned"):
            await asyncio.wait_for(plane.acquire(await plane.resolve("b")), timeout=5)
        assert list(plane.residents) == [manifest("a").id]

    asyncio.run(scene())


def test_a_name_first_loaded_on_demand_keeps_its_version_until_the_next_is_loaded(tmp_path):
    """Its next version cannot be served here (rank 128): the one that works goes on."""

    async def scene() -> str:
        plane, _ = plane_of(1, tmp_path)
        for name in ("a", "b"):
            shelve(tmp_path, manifest(name))
        await plane.start()
        for name in ("a", "b"):
            plane.release(await plane.acquire(await plane.resolve(name)))
        for name in ("a", "b"):
            shelve(tmp_path, manifest(name, "1" * 12, rank=128))
        await plane.refresh()
        return [(await plane.resolve(name)).version for name in ("a", "b")]

    assert asyncio.run(scene()) == ["0" * 12, "0" * 12]


def test_a_version_rolled_back_to_while_it_drains_stays(tmp_path):
    """A name that returns to a version still answering keeps it in the engine."""

    async def scene() -> list[str]:
        plane, notes = plane_of(4, tmp_path)
        old, new = manifest("a", "1" * 12), manifest("a", "2" * 12)
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
        shelve(tmp_path, manifest("good"))
        shelve(tmp_path, manifest("broken"))
        (tmp_path / "broken" / ("0" * 12) / "manifest.json").write_text("{")
        shelve(tmp_path, dataclasses.replace(manifest("odd"), base={}))
        await plane.start()
        for _ in range(3):
            await plane.refresh()
        assert await plane.resolve("good") == manifest("good")

    asyncio.run(scene())
    assert len([record for record in caplog.records if "left broken" in record.getMessage()]) == 1
