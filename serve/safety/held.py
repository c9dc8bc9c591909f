"""The model's reply to a request that is still being judged: begun at once, kept back until the verdict.

Most messages are harmless, and the verdict takes about as long as the first token. So the model is asked beside the
checkers. Nothing of its reply leaves before `release`. Where the verdict wants another prompt, or no answer of the
model at all, `abandon` ends the request as vLLM ends one whose client has gone.
"""

import asyncio
from collections.abc import Awaitable, Callable

from serve.reply import Message, Send
from serve.request_body import Receive


class HeldReply:
    """`send` takes vLLM's messages; `receive` is what vLLM hears of the client. Lives on one event loop."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._waiting: list[Message] = []
        self._to: Send | None = None
        self._abandoned = asyncio.Event()

    async def begin(self, ask: Callable[[Receive, Send], Awaitable[None]]) -> None:
        """Ask the model, unless the reply was abandoned already."""
        if not self._abandoned.is_set():
            await ask(self.receive, self.send)

    async def send(self, message: Message) -> None:
        """Keep a message back, or pass it on once the reply is released."""
        if self._to is not None:
            await self._to(message)
        elif not self._abandoned.is_set():
            self._waiting.append(message)

    async def receive(self) -> Message:
        """What the client does next; an abandoned request has no client."""
        if self._abandoned.is_set():
            return {"type": "http.disconnect"}
        abandoned = asyncio.ensure_future(self._abandoned.wait())
        received = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait((abandoned, received), return_when=asyncio.FIRST_COMPLETED)
            return received.result() if received.done() else {"type": "http.disconnect"}
        finally:
            abandoned.cancel()
            received.cancel()

    async def release(self, to: Send) -> None:
        """Send what waits to `to`, and what comes from now on."""
        while self._waiting:
            await to(self._waiting.pop(0))
        # No await since the last look: no message can be between the two.
        self._to = to

    def abandon(self) -> None:
        """Drop the reply; the model stops."""
        self._waiting.clear()
        self._abandoned.set()
