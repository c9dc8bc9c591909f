"""How a reply goes out to one caller: errors with their status, and streams with signs of life.

A stream's status is sent with its first event and not before, so that what fails until then is an HTTP error, as it is
without a stream. While nothing comes, a comment line is sent from time to time, which clients skip and which keeps load
balancers from closing the connection; after one, an error can only be an event of the stream.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.api_errors import ApiError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

COMMENT = b": waiting\n\n"
_MOST_CHARS = 600
_EVENTS: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
# What /v1/responses says before anything has happened.
_PREAMBLE = (b"event: response.created\n", b"event: response.in_progress\n")
_ERROR = b'data: {"error"'


class Reply:
    """One reply. `send` is for vLLM's own messages, `refuse` for ours; `status` is what became of it in the end."""

    def __init__(self, send: Send, extra: Headers, is_responses: bool) -> None:
        """`extra`: headers that every reply gets. `is_responses`: an error event has the form of /v1/responses."""
        self._wire, self._extra, self._is_responses = send, extra, is_responses
        self._turn = asyncio.Lock()
        self._held: list[Message] = []
        self._failure: Message | None = None
        self._started = self._flowing = self._ended = False
        self.status = 0
        self.code = ""

    async def send(self, message: Message) -> None:
        """Pass on a message of the application's."""
        async with self._turn:
            if message["type"] == "http.response.start":
                await self._start(message)
            elif not self._ended:
                await self._body(message)

    async def refuse(self, refusal: ApiError, headers: Headers) -> None:
        """Say an error of ours, with `headers`: as the whole reply, or as the last event of a stream that has begun."""
        async with self._turn:
            self.status, self.code = refusal.status, refusal.code
            if not self._ended:
                headers = [(name.encode(), value.encode()) for name, value in refusal.headers().items()] + headers
                await self._error(refusal.status, json.loads(refusal.body()), headers)

    async def comment(self) -> bool:
        """Show a waiting caller that the stream lives; False once the stream itself does."""
        async with self._turn:
            if self._flowing or self._ended or self._failure is not None:
                return False
            await self._begin()
            await self._wire({"type": "http.response.body", "body": COMMENT, "more_body": True})
            return True

    async def _start(self, message: Message) -> None:
        self.status = message["status"]
        if self.status >= 400:
            self._failure = {**message, "body": b""}
        elif _is_stream(message):
            self._held.append(message)
        else:
            self._started = self._flowing = True
            await self._wire(self._with_extra(message))

    async def _body(self, message: Message) -> None:
        body = message.get("body", b"")
        if self._failure is not None:
            self._failure["body"] += body
            if not message.get("more_body"):
                await self._error(self.status, _read(self._failure["body"]), self._failure["headers"])
            return
        if not self._flowing and body.startswith(_PREAMBLE):
            self._held.append(message)
            return
        if body.startswith(_ERROR):
            # vLLM sends [DONE] next.
            error = _read(body.partition(b"\n")[0].removeprefix(b"data: "))
            code = error["error"].get("code")
            self.status = code if isinstance(code, int) and code >= 400 else 500
            self.code = "error_in_stream" if self._started else ""
            await self._error(self.status, error, [])
            return
        if not self._flowing:
            await self._begin()
            self._flowing = True
        self._ended = not message.get("more_body")
        await self._wire(message)

    async def _begin(self) -> None:
        """Let go what was held back, or begin a stream before the application does."""
        held, self._held = self._held, []
        if not self._started:
            self._started = True
            start = held.pop(0) if held else {"type": "http.response.start", "status": 200, "headers": _EVENTS}
            await self._wire(self._with_extra(start))
        for message in held:
            if message["type"] == "http.response.body":
                await self._wire(message)

    async def _error(self, status: int, error: dict[str, Any], headers: Headers) -> None:
        self._ended = True
        error["error"]["message"] = _short(str(error["error"].get("message", "")))
        if self._started:
            body = self._event(error["error"]) + (b"" if self._is_responses else b"data: [DONE]\n\n")
        else:
            body = json.dumps(error).encode()
            kept = [
                (name, value) for name, value in headers if name.lower() not in (b"content-length", b"content-type")
            ]
            kept += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self._wire(self._with_extra({"type": "http.response.start", "status": status, "headers": kept}))
        await self._wire({"type": "http.response.body", "body": body, "more_body": False})

    def _event(self, error: dict[str, Any]) -> bytes:
        if self._is_responses:
            said = {"type": "error", "sequence_number": 0, **{name: error.get(name) for name in ("code", "param")}}
            return b"event: error\ndata: " + json.dumps({**said, "message": error["message"]}).encode() + b"\n\n"
        return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"

    def _with_extra(self, message: Message) -> Message:
        return {**message, "headers": [*message.get("headers", []), *self._extra]}


def _is_stream(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", [])
    )


def _read(body: bytes) -> dict[str, Any]:
    """vLLM's error; its text, where it is none in JSON."""
    try:
        error = json.loads(body)
    except ValueError:
        error = None
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        return error
    return {"error": {"message": body.decode(errors="replace"), "type": "server_error", "param": None, "code": None}}


def _short(text: str) -> str:
    """What a person reads; some of vLLM's errors quote whole requests."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} ... ({len(text)} characters)"
