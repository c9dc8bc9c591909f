"""The HTTP/1.1 connections of the server: uvicorn's on h11, with bounds on what a stranger may hold before any key.

How large a request's head may be is h11's own setting (vLLM's `--h11-max-incomplete-event-size`). What it has no
setting for is here: how long a head and a body may take, how long a peer may take nothing of what is said to it, and
how many connections one address may have. Not httptools, which keeps a header line without end, and loses the body of a
request that offers `Upgrade: h2c`, as Java's does.
"""

import asyncio
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# What a request's head may take to come, and each further BODY_BYTES of its body. A stranger needs no key to be slow.
HEAD_S, BODY_S = 20.0, 60.0
BODY_BYTES = 64 << 10
# A peer that takes nothing for so long is gone, or may as well be.
SEND_S = 60.0
_PER_ADDRESS = 1024
_NOTHING = (b"", False)
_Part = tuple[Any, RequestResponseCycle | None]


def per_address(queued: int) -> int:
    """Connections one address may have, where the server takes `queued` answers: all may come through one proxy."""
    return max(_PER_ADDRESS, 4 * queued)


class BoundedConnection(H11Protocol):
    """One connection; uvicorn's `http` setting names this class."""

    open_by_address: ClassVar[Counter[str]] = Counter()
    most_of_one_address: ClassVar[int] = per_address(0)
    _address = ""
    _awaited: _Part | None = None
    _came_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.open_by_address[self._address] += 1
        if self.open_by_address[self._address] > self.most_of_one_address:
            transport.abort()
        else:
            self._await(self._part())

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self._stop_watching()
        self.open_by_address[self._address] -= 1
        if not self.open_by_address[self._address]:
            del self.open_by_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.MIGHT_SWITCH_PROTOCOL and self.conn.trailing_data == _NOTHING:
            # We never switch. Reading goes on, or nobody would notice that the caller hung up.
            self.flow.resume_reading()
        part = self._part()
        if part is not None and part == self._awaited and part[0] is h11.SEND_BODY:
            self._came_bytes += len(data)
            # A body that nobody reads, as its request was refused, gets no more time.
            if self._came_bytes >= BODY_BYTES and not self.cycle.response_complete:
                self._await(None)
        self._await(part)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        # Requests may come without waiting for answers. Between them, uvicorn's keep-alive is what counts.
        if self.conn.their_state is not h11.IDLE or self.conn.trailing_data != _NOTHING:
            self._await(self._part())

    def _should_upgrade(self) -> bool:
        """No other protocol is spoken here, and HTTP/1.1 lets a server pass over the offer."""
        return False

    def _part(self) -> _Part | None:
        """What the caller has to send next: a head (IDLE) or more of a body (SEND_BODY), and of which request."""
        state = self.conn.their_state
        return (state, self.cycle) if state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing() else None

    def _await(self, part: _Part | None) -> None:
        """Give the caller time for it, from when it may begin."""
        if part == self._awaited:
            return
        self._awaited, self._came_bytes = part, 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if part is not None:
            self._timer = self.loop.call_later(HEAD_S if part[0] is h11.IDLE else BODY_S, self.transport.abort)

    def _watch(self) -> None:
        """Hang up on a peer that takes nothing of what waits for it. To close is not enough: that waits for the peer.

        Only while no more is written, so that what waits can but shrink: the reply is held back, or whole.
        """
        self._stop_watching()
        if self.flow.write_paused or (self.cycle is not None and self.cycle.response_complete):
            self._look(None)

    def _look(self, before: int | None) -> None:
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        elif left:
            self._sending = self.loop.call_later(SEND_S, self._look, left)

    def _stop_watching(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
