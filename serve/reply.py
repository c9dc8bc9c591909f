"""How a reply is sent to one client: errors with their status, and streams with keep-alive comments.

A stream's status is sent with its first event and not before, so that a failure until then is an HTTP error, as it is
without a stream. While no event comes, comment lines are sent, which clients skip and which keep load balancers from
closing the connection. After a comment the status is sent, and an error can only be an event of the stream.
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
_MAX_MESSAGE_CHARS = 600
_EVENT_STREAM: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
# The events that /v1/responses sends before anything has happened.
_PREAMBLE = (b"event: response.created\n", b"event: response.in_progress\n")
_ERROR = b'data: {"error"'


class Reply:
    """One reply. `send` takes vLLM's messages, `send_error` our errors; `status` is the outcome."""

    def __init__(self, send: Send, extra: Headers, is_responses: bool) -> None:
        """`extra`: headers of every reply. `is_responses`: an error event has the form of /v1/responses."""
        self._send, self._extra, self._is_responses = send, extra, is_responses
        self._lock = asyncio.Lock()
        self._held: list[Message] = []
        self._failure: Message | None = None
        self._started = self._has_events = self._ended = False
        self.status = 0
        self.code = ""

    async def send(self, message: Message) -> None:
        """Pass on one of the application's messages."""
        async with self._lock:
            if message["type"] == "http.response.start":
                await self._start(message)
            elif not self._ended:
                await self._body(message)

    async def send_error(self, error: ApiError, headers: Headers) -> None:
        """Send an error of ours, with `headers`: as the whole reply, or as the last event of a started stream."""
        async with self._lock:
            self.status, self.code = error.status, error.code
            if not self._ended:
                headers = [(name.encode(), value.encode()) for name, value in error.headers().items()] + headers
                await self._error(error.status, json.loads(error.body()), headers)

    async def comment(self) -> bool:
        """Send a comment, unless events or an error have come: then return False."""
        async with self._lock:
            if self._has_events or self._ended or self._failure is not None:
                return False
            await self._begin()
            await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
            return True

    async def _start(self, message: Message) -> None:
        self.status = message["status"]
        if self.status >= 400:
            self._failure = {**message, "body": b""}
        elif _is_stream(message):
            self._held.append(message)
        else:
            self._started = self._has_events = True
            await self._send(self._with_extra(message))

    async def _body(self, message: Message) -> None:
        body = message.get("body", b"")
        if self._failure is not None:
            self._failure["body"] += body
            if not message.get("more_body"):
                await self._error(self.status, _parse_error(self._failure["body"]), self._failure["headers"])
            return
        if not self._has_events and body.startswith(_PREAMBLE):
            self._held.append(message)
            return
        if body.startswith(_ERROR):
            # vLLM sends [DONE] next; it is dropped, because the reply has ended.
            error = _parse_error(body.partition(b"\n")[0].removeprefix(b"data: "))
            code = error["error"].get("code")
            self.status = code if isinstance(code, int) and code >= 400 else 500
            self.code = "error_in_stream" if self._started else ""
            await self._error(self.status, error, [])
            return
        if not self._has_events:
            await self._begin()
            self._has_events = True
        self._ended = not message.get("more_body")
        await self._send(message)

    async def _begin(self) -> None:
        """Send what was held back, or begin a stream before the application does."""
        held, self._held = self._held, []
        if not self._started:
            self._started = True
            start = held.pop(0) if held else {"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM}
            await self._send(self._with_extra(start))
        for message in held:
            if message["type"] == "http.response.body":
                await self._send(message)

    async def _error(self, status: int, error: dict[str, Any], headers: Headers) -> None:
        self._ended = True
        error["error"]["message"] = _shorten(str(error["error"].get("message", "")))
        if self._started:
            body = self._event(error["error"]) + (b"" if self._is_responses else b"data: [DONE]\n\n")
        else:
            body = json.dumps(error).encode()
            kept = [
                (name, value) for name, value in headers if name.lower() not in (b"content-length", b"content-type")
            ]
            kept += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self._send(self._with_extra({"type": "http.response.start", "status": status, "headers": kept}))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _event(self, error: dict[str, Any]) -> bytes:
        if self._is_responses:
            event = {"type": "error", "sequence_number": 0, **{name: error.get(name) for name in ("code", "param")}}
            return b"event: error\ndata: " + json.dumps({**event, "message": error["message"]}).encode() + b"\n\n"
        return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"

    def _with_extra(self, message: Message) -> Message:
        return {**message, "headers": [*message.get("headers", []), *self._extra]}


def _is_stream(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", [])
    )


def _parse_error(body: bytes) -> dict[str, Any]:
    """vLLM's error object; a body of another form becomes its message."""
    try:
        error = json.loads(body)
    except ValueError:
        error = None
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        return error
    return {"error": {"message": body.decode(errors="replace"), "type": "server_error", "param": None, "code": None}}


def _shorten(text: str) -> str:
    """As much as a person reads; some of vLLM's errors quote whole requests."""
    if len(text) <= _MAX_MESSAGE_CHARS:
        return text
    return f"{text[:_MAX_MESSAGE_CHARS]} ... ({len(text)} characters)"
