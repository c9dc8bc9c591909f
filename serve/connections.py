"""The server's HTTP/1.1 connections: uvicorn's on h11, with bounds on what a client without a key may hold.

The size of a request's head is bounded by h11's own setting (vLLM's `--h11-max-incomplete-event-size`). The bounds here
have no setting there: how long a head and a body may take, how long a client may read nothing of a reply, and how many
connections one address may have. Not httptools: it buffers an endless header line, and loses the body of a request that
offers `Upgrade: h2c`, as Java's client does.
"""

import asyncio
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# How long a request's head may take, and every BODY_BYTES of its body: slow requests need no key.
HEAD_S, BODY_S = 20.0, 60.0
BODY_BYTES = 64 << 10
# A client that reads nothing for so long is treated as gone.
SEND_S = 60.0
_PER_ADDRESS = 1024
_NOTHING = (b"", False)
_Part = tuple[Any, RequestResponseCycle | None]


def per_address(queued: int) -> int:
    """Connections that one address may have on a server for `queued` answers: all may come through one proxy."""
    return max(_PER_ADDRESS, 4 * queued)


class BoundedConnection(H11Protocol):
    """One connection; the class for uvicorn's `http` setting."""

    open_by_address: ClassVar[Counter[str]] = Counter()
    max_per_address: ClassVar[int] = per_address(0)
    _address = ""
    _awaited: _Part | None = None
    _received_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.open_by_address[self._address] += 1
        if self.open_by_address[self._address] > self.max_per_address:
            transport.abort()
        else:
            self._await(self._part())

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self._stop_send_watch()
        self.open_by_address[self._address] -= 1
        if not self.open_by_address[self._address]:
            del self.open_by_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.MIGHT_SWITCH_PROTOCOL and self.conn.trailing_data == _NOTHING:
            # No protocol is ever switched. Keep reading, so that a disconnect is noticed.
            self.flow.resume_reading()
        part = self._part()
        if part is not None and part == self._awaited and part[0] is h11.SEND_BODY:
            self._received_bytes += len(data)
            # No more time for the body of a request that is already answered, such as a refused one.
            if self._received_bytes >= BODY_BYTES and not self.cycle.response_complete:
                self._await(None)
        self._await(part)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_send()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_send()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_send()
        # A pipelined request may already be arriving. Between requests, uvicorn's keep-alive timeout applies.
        if self.conn.their_state is not h11.IDLE or self.conn.trailing_data != _NOTHING:
            self._await(self._part())

    def _should_upgrade(self) -> bool:
        """Ignore every offer of another protocol, as HTTP/1.1 allows."""
        return False

    def _part(self) -> _Part | None:
        """What the client must send next: a head (IDLE) or more of a body (SEND_BODY), and of which request."""
        state = self.conn.their_state
        return (state, self.cycle) if state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing() else None

    def _await(self, part: _Part | None) -> None:
        """Start the timer for `part`, unless it is running for it already."""
        if part == self._awaited:
            return
        self._awaited, self._received_bytes = part, 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if part is not None:
            self._timer = self.loop.call_later(HEAD_S if part[0] is h11.IDLE else BODY_S, self.transport.abort)

    def _watch_send(self) -> None:
        """Abort if the client reads nothing of what is buffered for it. A close would wait for the client.

        Only while nothing more is written, so that the buffer can only shrink: the reply is paused or complete.
        """
        self._stop_send_watch()
        if self.flow.write_paused or (self.cycle is not None and self.cycle.response_complete):
            self._check_progress(None)

    def _check_progress(self, before: int | None) -> None:
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        elif left:
            self._send_timer = self.loop.call_later(SEND_S, self._check_progress, left)

    def _stop_send_watch(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
