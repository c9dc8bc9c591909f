"""The HTTP/1.1 connections of the server: uvicorn's on h11, with bounds on what a stranger may hold before any key.

How large a request's head may be is h11's own setting (vLLM's `--h11-max-incomplete-event-size`). What it has no
setting for is here: how long a head may take, and how many connections one address may have. h11, and not httptools,
which keeps a header line without end, and loses the body of a request that offers `Upgrade: h2c`, as Java's does.
"""

import asyncio
from collections import Counter
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0
PER_ADDRESS = 1024
_NOTHING = (b"", False)


class BoundedConnection(H11Protocol):
    """One connection; uvicorn's `http` setting names this class."""

    open_by_address: ClassVar[Counter[str]] = Counter()
    _address = ""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.open_by_address[self._address] += 1
        if self.open_by_address[self._address] > PER_ADDRESS:
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self.open_by_address[self._address] -= 1
        if not self.open_by_address[self._address]:
            del self.open_by_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.MIGHT_SWITCH_PROTOCOL and self.conn.trailing_data == _NOTHING:
            # We never switch. Reading goes on, or nobody would notice that the caller hung up.
            self.flow.resume_reading()
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._expect_head()

    def _should_upgrade(self) -> bool:
        """No other protocol is spoken here, and HTTP/1.1 lets a server pass over the offer."""
        return False

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
