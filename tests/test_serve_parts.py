"""The gate's pure parts: bodies, limits, keys, configuration, and the plane on an engine that only takes notes."""

import asyncio
import time
from pathlib import Path

import pytest

from serve.bodies import CHAT, COMPLETIONS, RESPONSES, Body, n_sequences, prepare, wants_usage
from serve.config import ServeConfig
from serve.keys import ADMIN, USER, KeyRing, add_key
from serve.limits import Limits
from serve.openai_errors import Refusal
from serve.plane import Plane
from serve.server import Server, reason_in
from train.errors import UserError
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
     ({"prompt": [[1], [2, 3]]}, 2), ({"n": "many"}, 1)],
)  # fmt: skip
def test_a_request_counts_for_the_sequences_it_makes(body, n):
    """`n` times the number of prompts; a list of token ids is one prompt."""
    assert n_sequences(COMPLETIONS, body) == n


# Limits


def test_one_key_meets_429_and_the_server_503():
    """A key's own bound comes with Retry-After 1, the server's with 503; leaving makes room again."""
    limits = Limits(per_key=2, total=3)
    limits.enter("a", 2)
    with pytest.raises(Refusal) as full:
        limits.enter("a", 1)
    assert (full.value.status, full.value.retry_after_s) == (429, 1)
    limits.enter("b", 1)
    with pytest.raises(Refusal) as full:
        limits.enter("b", 1)
    assert full.value.status == 503
    limits.leave("a", 2)
    limits.enter("b", 1)
    assert (limits.in_flight, dict(limits.by_key)) == (2, {"b": 2})


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


# Configuration and the parent


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
