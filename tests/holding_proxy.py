"""A proxy on loopback in front of a real server, which stops streams at a known point and answers in its place.

A browser that talks to it talks to the real server, byte for byte, except where a test says otherwise: `hold_after`
stops each chat stream after so many events with text, until `release()`; `answers` are sent instead of the server's
replies, one per chat request.
"""

import contextlib
import http.client
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple


class Canned(NamedTuple):
    """A reply in the server's place. The connection ends with its last byte, whatever the body promised."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class HoldingProxy(http.server.ThreadingHTTPServer):
    """Listens on a free port. `chats`: the bodies of the chat requests. `hung_up`: set when a browser left a stream."""

    daemon_threads = True

    def __init__(self, target: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        address = urllib.parse.urlsplit(target)
        self.target = (address.hostname, address.port)
        self.hold_after: int | None = None
        self.answers: list[Canned] = []
        self.chats: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        self._released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def release(self) -> None:
        self.hold_after = None
        self._released.set()

    def handle_error(self, *_: object) -> None:
        """A browser that hangs up is no error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HoldingProxy
    # Connections are closed after each reply, so a stream needs no length.

    def do_GET(self) -> None:
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_chat = self.path == "/v1/chat/completions"
        if is_chat:
            proxy.chats.append(json.loads(body))
            if proxy.answers:
                return self._send(proxy.answers.pop(0))
        upstream = http.client.HTTPConnection(*proxy.target)
        with contextlib.closing(upstream):
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
            }
            upstream.request(self.command, self.path, body, headers)
            reply = upstream.getresponse()
            self._head(reply.status, [pair for pair in reply.getheaders() if pair[0].lower() not in _HOP_BY_HOP])
            if is_chat and reply.status == 200:
                self._stream(reply)
            else:
                self.wfile.write(reply.read())
        return None

    do_POST = do_DELETE = do_GET

    def _stream(self, reply: http.client.HTTPResponse) -> None:
        shown = 0
        try:
            for line in reply:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    shown += any(choice["delta"].get("content") for choice in chunk["choices"])
                self.wfile.write(line)
                if line == b"\n" and self.server.hold_after is not None and shown >= self.server.hold_after:
                    self._wait()
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def _wait(self) -> None:
        """Until the test releases the stream. A browser that leaves meanwhile is noticed."""
        while not self.server._released.wait(0.05):
            self.connection.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    raise BrokenPipeError
            self.connection.settimeout(None)

    def _send(self, canned: Canned) -> None:
        self._head(canned.status, [*canned.headers])
        self.wfile.write(canned.body)

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


_HOP_BY_HOP = ("transfer-encoding", "connection", "content-length")


@contextlib.contextmanager
def proxied(target: str, port: int = 0) -> Iterator[HoldingProxy]:
    """A proxy that serves until the block ends; no connection to it outlives the block."""
    proxy = HoldingProxy(target, port)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.release()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
