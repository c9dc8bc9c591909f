"""What a client without a key may hold on a connection, over real sockets to a real uvicorn."""

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
    """Answers with the length of the body, once it has all of it."""
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
        # Accepted sockets inherit it: what a client does not read waits in the server and not in the kernel.
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


def received(wire: socket.socket) -> bytes:
    """Everything that arrives until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := wire.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer(wire: socket.socket) -> bytes:
    """One answer on a connection that stays open: head, and a body of five bytes."""
    got = b""
    while len(got.partition(b"\r\n\r\n")[2]) < 5:
        part = wire.recv(65536)
        assert part, got
        got += part
    return got


def test_an_endless_header_is_refused():
    """The server closes after about 64 KiB and never reads 100 MB."""
    with serving() as address, socket.create_connection(address) as wire:
        wire.sendall(HEAD + b"X: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100 << 20:
                wire.sendall(b"a" * 65536)
                sent += 65536
        # More than 64 KiB: the kernel buffers some.
        assert sent < 50 << 20
        assert received(wire)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")


def test_a_head_of_ordinary_size_is_accepted():
    """Cookies and tokens may have about 30 KB."""
    with serving() as address, socket.create_connection(address) as wire:
        wire.sendall(HEAD + b"Cookie: " + b"a" * 30_000 + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        assert received(wire).endswith(b"    2")


@pytest.mark.parametrize(
    "sent",
    [b"", HEAD, HEAD + b"Content-Length: 10\r\n\r\nabc", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["nothing", "half a head", "half a body", "half a chunk"],
)
def test_a_client_that_stops_sending_is_disconnected(sent):
    """The server closes a connection that sends nothing, or stops halfway."""
    with serving(HEAD_S=0.2, BODY_S=0.2) as address, socket.create_connection(address) as wire:
        wire.sendall(sent)
        assert received(wire) == b""


async def echo_then_shorten(scope, receive, send):
    """Answers as `echo`; from then on all time limits are short."""
    connections.HEAD_S = connections.BODY_S = 0.2
    await echo(scope, receive, send)


@contextlib.contextmanager
def shortening() -> Iterator[tuple[socket.socket, tuple[str, int]]]:
    """A connection to a server whose time limits are short after the first request."""
    long_s = 10 * HANG_S
    with (
        serving(echo_then_shorten, HEAD_S=long_s, BODY_S=long_s) as address,
        socket.create_connection(address, timeout=HANG_S) as wire,
    ):
        yield wire, address


@pytest.mark.parametrize("sent", [HEAD, HEAD + b"Content-Length: 10\r\n\r\nabc"], ids=["half a head", "half a body"])
def test_a_client_that_stops_within_its_second_request_is_disconnected(sent):
    """Both requests arrive at once: the first is answered, and the second has its own time from then on."""
    with shortening() as (wire, _):
        wire.sendall(HEAD + b"Content-Length: 2\r\n\r\nhi" + sent)
        assert received(wire).endswith(b"    2")


def test_an_idle_connection_is_kept():
    """Between two requests uvicorn's keep-alive applies, and not the time limit of a head."""
    with shortening() as (wire, address):
        for _ in range(2):
            wire.sendall(HEAD + b"Content-Length: 2\r\n\r\nhi")
            assert answer(wire).endswith(b"    2")
            outlive_a_silent_connection(address)


def test_one_address_has_a_bounded_number_of_connections(monkeypatch):
    """One more is closed at once; when one ends, another is accepted."""
    monkeypatch.setattr(BoundedConnection, "max_per_address", 2)
    with serving() as address, contextlib.ExitStack() as after:
        first, second = (after.enter_context(socket.create_connection(address)) for _ in range(2))
        until(lambda: BoundedConnection.open_by_address["127.0.0.1"] == 2)
        with socket.create_connection(address) as third:
            assert received(third) == b""
        first.close()
        until(lambda: BoundedConnection.open_by_address["127.0.0.1"] == 1)
        with socket.create_connection(address) as fourth:
            fourth.sendall(HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi")
            assert received(fourth).endswith(b"    2")
        second.close()
    until(lambda: not BoundedConnection.open_by_address)


def test_a_proxy_may_open_as_many_connections_as_the_server_needs():
    """Behind a proxy all callers have one address, so a larger queue allows more connections from it."""
    assert [per_address(queued) for queued in (1, 256, 2000)] == [1024, 1024, 8000]


def outlive_a_silent_connection(address: tuple[str, int]) -> None:
    """Return when a connection that sends nothing was closed after HEAD_S."""
    with socket.create_connection(address) as silent:
        assert received(silent) == b""


@contextlib.contextmanager
def half_sent(app: Any) -> Iterator[tuple[socket.socket, tuple[str, int]]]:
    """A request with the first of 1,001 bytes of its body; from then on all time limits are short."""
    begun = threading.Event()

    async def app_with_event(scope, receive, send):
        begun.set()
        await app(scope, receive, send)

    with (
        serving(app_with_event, HEAD_S=10 * HANG_S, BODY_S=10 * HANG_S, BODY_BYTES=500) as address,
        socket.create_connection(address, timeout=HANG_S) as wire,
    ):
        wire.sendall(HEAD + b"Content-Length: 1001\r\n\r\na")
        assert begun.wait(HANG_S)
        connections.BODY_S, connections.HEAD_S = 0.1, 0.3
        yield wire, address


def test_a_body_that_keeps_arriving_gets_a_new_time_limit():
    """However long the whole body takes. Here the new limit is short, and ends the request."""
    with half_sent(echo) as (wire, _):
        wire.sendall(b"a" * 500)
        assert received(wire) == b""


def test_a_body_that_arrives_too_slowly_gets_no_more_time():
    """Too little arrives, so the first limit still holds. Here it is long, and the request is answered."""
    with half_sent(echo) as (wire, address):
        wire.sendall(b"a")
        outlive_a_silent_connection(address)
        wire.sendall(b"a" * 999)
        assert answer(wire).endswith(b" 1001")


def test_the_body_of_a_refused_request_gets_no_more_time():
    """The request is refused by its head; however much of its body arrives, the first limit holds."""

    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"alien"})

    with half_sent(refuse) as (wire, address):
        assert answer(wire).startswith(b"HTTP/1.1 401")
        wire.sendall(b"a" * 500)
        outlive_a_silent_connection(address)
        wire.sendall(b"a" * 500 + HEAD + b"Content-Length: 0\r\n\r\n")
        assert answer(wire).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_an_upgrade_offer_is_ignored(offer, later):
    """Java's HttpClient offers h2c with every request: its whole body is read, with the head or after it."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + offer + b"\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    with serving() as address, socket.create_connection(address) as wire:
        for _ in range(2):
            head, body = HEAD + upgrade + b"Content-Length: 20\r\n\r\n", b"x" * 20
            for part in (head, body) if later else (head + body,):
                wire.sendall(part)
            assert answer(wire).endswith(b"   20")


@contextlib.contextmanager
def not_reading(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A client that sends a request and reads nothing; its kernel buffers a few KiB."""
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        wire.connect(address)
        wire.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
        yield wire


@pytest.mark.parametrize(
    ("size", "whole"),
    [(1 << 20, True), (1 << 20, False), (50_000, True)],
    ids=["large", "stream", "too small to pause uvicorn"],
)
def test_a_client_that_reads_nothing_is_disconnected(size, whole):
    """Its connection no longer counts, and the application receives `http.disconnect`."""
    disconnected = threading.Event()

    async def send_much(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": not whole})
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected.set()

    with serving(send_much, SEND_S=0.1) as address, not_reading(address):
        assert disconnected.wait(HANG_S)
        until(lambda: not BoundedConnection.open_by_address)


def test_a_stopping_server_does_not_wait_for_a_client_that_reads_nothing():
    """The client's end is still open when the server has ended."""
    begun = threading.Event()

    async def send_much(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (1 << 20)})
        begun.set()

    with contextlib.ExitStack() as after:
        with serving(send_much, SEND_S=0.1) as address:
            after.enter_context(not_reading(address))
            assert begun.wait(HANG_S)
        assert not BoundedConnection.open_by_address


def test_comments_to_a_client_that_reads_nothing_end_the_request():
    """The application receives `http.disconnect`, and the task that sends comments does not fail."""
    disconnected, failures = threading.Event(), []

    async def wait_for_the_engine(scope, receive, send):
        comments = asyncio.create_task(_send_comments(Reply(send, [], False), 1e-6))
        while (await receive())["type"] != "http.disconnect":
            pass
        if comments.done():
            failures.append(comments.exception())
        comments.cancel()
        disconnected.set()

    with serving(wait_for_the_engine, SEND_S=0.1) as address, not_reading(address):
        assert disconnected.wait(HANG_S)
        until(lambda: not BoundedConnection.open_by_address)
    assert failures == []
