"""What a stranger without a key may hold on a connection, over real sockets to a real uvicorn."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from serve import connections
from serve.connections import BoundedConnection, per_address
from serve.gateway import _send_comments
from serve.launch import HEAD_BYTES
from serve.reply import Reply
from tests.waiting import HANG_S, until

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


async def echo(scope, receive, send):
    """Answers with the length of what it was sent, once it has all of it."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"%5d" % size})


@contextlib.contextmanager
def serving(app: Any = echo, **limits: float) -> Iterator[tuple[str, int]]:
    with contextlib.ExitStack() as after:
        for name, value in limits.items():
            after.callback(setattr, connections, name, getattr(connections, name))
            setattr(connections, name, value)
        listener = after.enter_context(socket.create_server(("127.0.0.1", 0)))
        # What is accepted has it too: what a peer does not take waits in the server and not in the kernel.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        config = uvicorn.Config(
            app, http=BoundedConnection, h11_max_incomplete_event_size=HEAD_BYTES, lifespan="off", log_level="error"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        after.callback(thread.join)
        after.callback(setattr, server, "should_exit", True)
        until(lambda: server.started)
        yield listener.getsockname()


def said(wire: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := wire.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer(wire: socket.socket) -> bytes:
    """One answer on a connection that is kept: head, and a body of five bytes."""
    got = b""
    while len(got.partition(b"\r\n\r\n")[2]) < 5:
        part = wire.recv(65536)
        assert part, got
        got += part
    return got


def test_a_header_without_end_is_cut_off():
    """The server closes after some 64 KiB, whatever else comes: 100 MB are never taken."""
    with serving() as address, socket.create_connection(address) as wire:
        wire.sendall(HEAD + b"X: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100 << 20:
                wire.sendall(b"a" * 65536)
                sent += 65536
        # What the kernel's buffers hold has been sent too.
        assert sent < 50 << 20
        assert said(wire)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")


def test_a_head_of_ordinary_size_passes():
    """Long cookies and tokens of some 30 KB are no attack."""
    with serving() as address, socket.create_connection(address) as wire:
        wire.sendall(HEAD + b"Cookie: " + b"a" * 30_000 + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        assert said(wire).endswith(b"    2")


@pytest.mark.parametrize(
    "begun",
    [b"", HEAD, HEAD + b"Content-Length: 10\r\n\r\nabc", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["nothing", "half a head", "half a body", "half a chunk"],
)
def test_who_does_not_go_on_is_hung_up_on(begun):
    """A connection that sends nothing, or stops half way, is closed by the server and not by us."""
    with serving(HEAD_S=0.2, BODY_S=0.2) as address, socket.create_connection(address) as wire:
        wire.sendall(begun)
        assert said(wire) == b""


async def hurry(scope, receive, send):
    """Answers as `echo`; from now on all times are short."""
    connections.HEAD_S = connections.BODY_S = 0.2
    await echo(scope, receive, send)


@contextlib.contextmanager
def hurrying() -> Iterator[tuple[socket.socket, tuple[str, int]]]:
    """A connection to such a server."""
    patience_s = 10 * HANG_S
    with (
        serving(hurry, HEAD_S=patience_s, BODY_S=patience_s) as address,
        socket.create_connection(address, timeout=HANG_S) as wire,
    ):
        yield wire, address


@pytest.mark.parametrize("begun", [HEAD, HEAD + b"Content-Length: 10\r\n\r\nabc"], ids=["half a head", "half a body"])
def test_who_does_not_go_on_after_a_whole_request_is_hung_up_on(begun):
    """Both requests come at once: the first is answered, and the second has its time from then on."""
    with hurrying() as (wire, _):
        wire.sendall(HEAD + b"Content-Length: 2\r\n\r\nhi" + begun)
        assert said(wire).endswith(b"    2")


def test_who_has_nothing_to_ask_is_kept():
    """Between two requests uvicorn's keep-alive counts, and not the time of a head that nobody began."""
    with hurrying() as (wire, address):
        for _ in range(2):
            wire.sendall(HEAD + b"Content-Length: 2\r\n\r\nhi")
            assert answer(wire).endswith(b"    2")
            outlive_a_silent_one(address)


def test_one_address_has_a_bounded_number_of_connections(monkeypatch):
    """The one too many is closed at once; when one ends, another may come."""
    monkeypatch.setattr(BoundedConnection, "max_per_address", 2)
    with serving() as address, contextlib.ExitStack() as after:
        first, second = (after.enter_context(socket.create_connection(address)) for _ in range(2))
        until(lambda: BoundedConnection.open_by_address["127.0.0.1"] == 2)
        with socket.create_connection(address) as third:
            assert said(third) == b""
        first.close()
        until(lambda: BoundedConnection.open_by_address["127.0.0.1"] == 1)
        with socket.create_connection(address) as fourth:
            fourth.sendall(HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi")
            assert said(fourth).endswith(b"    2")
        second.close()
    until(lambda: not BoundedConnection.open_by_address)


def test_a_proxy_may_bring_all_that_the_server_takes():
    """Behind one, all callers have one address; a server that takes more answers takes more connections of it."""
    assert [per_address(queued) for queued in (1, 256, 2000)] == [1024, 1024, 8000]


def outlive_a_silent_one(address: tuple[str, int]) -> None:
    """Return when a connection that sends nothing has lived for HEAD_S and was hung up on."""
    with socket.create_connection(address) as silent:
        assert said(silent) == b""


@contextlib.contextmanager
def half_sent(app: Any) -> Iterator[tuple[socket.socket, tuple[str, int]]]:
    """A request whose body has 1,001 bytes, of which the first came; from now on all times are short."""
    begun = threading.Event()

    async def told(scope, receive, send):
        begun.set()
        await app(scope, receive, send)

    with (
        serving(told, HEAD_S=10 * HANG_S, BODY_S=10 * HANG_S, BODY_BYTES=500) as address,
        socket.create_connection(address, timeout=HANG_S) as wire,
    ):
        wire.sendall(HEAD + b"Content-Length: 1001\r\n\r\na")
        assert begun.wait(HANG_S)
        connections.BODY_S, connections.HEAD_S = 0.1, 0.3
        yield wire, address


def test_a_body_that_keeps_coming_has_its_time_anew():
    """However long all of it takes: seen here by the new time, which is short."""
    with half_sent(echo) as (wire, _):
        wire.sendall(b"a" * 500)
        assert said(wire) == b""


def test_a_trickle_gets_no_more_time():
    """What comes is too little: the time it has is the one it began with, seen here by its being long."""
    with half_sent(echo) as (wire, address):
        wire.sendall(b"a")
        outlive_a_silent_one(address)
        wire.sendall(b"a" * 999)
        assert answer(wire).endswith(b" 1001")


def test_a_body_that_nobody_reads_gets_no_more_time():
    """A stranger's request is refused by its head; however much of its body comes, it has to end in time."""

    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"alien"})

    with half_sent(refuse) as (wire, address):
        assert answer(wire).startswith(b"HTTP/1.1 401")
        wire.sendall(b"a" * 500)
        outlive_a_silent_one(address)
        wire.sendall(b"a" * 500 + HEAD + b"Content-Length: 0\r\n\r\n")
        assert answer(wire).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_an_offer_to_speak_another_protocol_is_passed_over(offer, later):
    """Java's HttpClient offers h2c with every request: its body arrives whole, at once or after the head."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + offer + b"\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    with serving() as address, socket.create_connection(address) as wire:
        for _ in range(2):
            head, body = HEAD + upgrade + b"Content-Length: 20\r\n\r\n", b"x" * 20
            for part in (head, body) if later else (head + body,):
                wire.sendall(part)
            assert answer(wire).endswith(b"   20")


@contextlib.contextmanager
def taking_nothing(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A peer that asks and never reads; its own kernel takes a few KiB for it."""
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        wire.connect(address)
        wire.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
        yield wire


@pytest.mark.parametrize(
    ("size", "whole"),
    [(1 << 20, True), (1 << 20, False), (50_000, True)],
    ids=["large", "a stream", "less than what makes uvicorn wait"],
)
def test_a_peer_that_takes_nothing_is_hung_up_on(size, whole):
    """The connection is let go, place and all; a reply that was not whole hears of it and ends."""
    heard = threading.Event()

    async def send_much(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": not whole})
        while (await receive())["type"] != "http.disconnect":
            pass
        heard.set()

    with serving(send_much, SEND_S=0.1) as address, taking_nothing(address):
        assert heard.wait(HANG_S)
        until(lambda: not BoundedConnection.open_by_address)


def test_a_server_that_stops_waits_for_no_peer_that_takes_nothing():
    """The peer still holds its end when the server has ended."""
    begun = threading.Event()

    async def send_much(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (1 << 20)})
        begun.set()

    with contextlib.ExitStack() as after:
        with serving(send_much, SEND_S=0.1) as address:
            after.enter_context(taking_nothing(address))
            assert begun.wait(HANG_S)
        assert not BoundedConnection.open_by_address


def test_comments_to_a_peer_that_takes_nothing_end_the_request():
    """Whoever works for it hears that it hung up; the comments' own task fails at nothing meanwhile."""
    heard, failures = threading.Event(), []

    async def wait_for_the_engine(scope, receive, send):
        signs = asyncio.create_task(_send_comments(Reply(send, [], False), 1e-6))
        while (await receive())["type"] != "http.disconnect":
            pass
        if signs.done():
            failures.append(signs.exception())
        signs.cancel()
        heard.set()

    with serving(wait_for_the_engine, SEND_S=0.1) as address, taking_nothing(address):
        assert heard.wait(HANG_S)
        until(lambda: not BoundedConnection.open_by_address)
    assert failures == []
