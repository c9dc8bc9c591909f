"""The last step before bytes leave: every message of vLLM's reply passes the output check, or does not pass.

It fails closed. Where a message is not understood, a rule takes too long or anything raises, the person gets the
reviewed text in the reply's own form, an alarm is counted, and nothing more of the model's answer leaves.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

from serve.reply import Message, Send
from serve.request_rewrite import RESPONSES, Body
from serve.safety.responses import ResponsesCheck
from serve.safety.shapes import FIELD, FILTERED, message_item, whole_body, words_in, words_replaced
from serve.safety.stream import StreamCheck, Verdict

log = logging.getLogger("vllm.counsel")

HEADER = b"x-counsel-safety"
Headers = list[tuple[bytes, bytes]]


class CheckedReply:
    """Wraps the `send` of one reply; `send` takes vLLM's messages."""

    def __init__(
        self,
        send: Send,
        *,
        path: str,
        head: Body,
        n: int,
        prefix: str,
        fallback: str,
        headers: Headers,
        verdict: Verdict,
        on_fault: Callable[[str], None],
    ) -> None:
        """`prefix`: the text before each of `n` answers. `fallback`: the text after a fault; `on_fault` is told."""
        self._send, self._headers, self._on_fault = send, headers, on_fault
        self.path, self.head, self.n, self.prefix, self.fallback, self.verdict = (
            path,
            head,
            n,
            prefix,
            fallback,
            verdict,
        )
        self._stream: StreamCheck | ResponsesCheck | None = None
        self._start: Message | None = None
        self._buffer = b""
        self._passes = self._closed = False

    async def send(self, message: Message) -> None:
        """Pass on what may leave of a message."""
        if self._closed:
            return
        try:
            out = self._checked(message)
        except Exception as error:  # whatever it is, no word of this message has left
            self._closed = True
            # Not the message of the error: it may quote the answer.
            log.error("the output check failed: %s", type(error).__name__)
            self._on_fault("timeout" if isinstance(error, TimeoutError) else "error")
            out = self._closing()
        for part in out:
            await self._send(part)

    def _checked(self, message: Message) -> list[Message]:
        if message["type"] == "http.response.start":
            return self._begin(message)
        if message["type"] != "http.response.body":
            raise ValueError(f"a message {message['type']}")
        if self._passes:
            return [message]
        self._buffer += message.get("body", b"")
        more = bool(message.get("more_body"))
        if self._stream is None:
            return [] if more else self._whole()
        *events, self._buffer = self._buffer.split(b"\n\n")
        out = [_body(part) for raw in events for part in self._stream.feed(raw + b"\n\n")]
        if not more:
            if self._buffer.strip():
                raise ValueError("a stream that ends within an event")
            self._closed = True
            out += [*(_body(part) for part in self._stream.end()), _body(b"", more=False)]
        return out

    def _begin(self, message: Message) -> list[Message]:
        message = {**message, "headers": [*message["headers"], *self._headers]}
        if message["status"] >= 400:
            self._passes = True
            return [message]
        kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
        self._start = message
        if kind.startswith(b"text/event-stream"):
            self._stream = self._new_stream()
            return [message]
        if not kind.startswith(b"application/json"):
            raise ValueError("a reply that is neither JSON nor a stream of events")
        return []

    def _new_stream(self) -> StreamCheck | ResponsesCheck:
        if self.path == RESPONSES:
            return ResponsesCheck(self.head, self.prefix, self.verdict)
        return StreamCheck(self.path, self.head, self.n, self.prefix, self.verdict)

    def _whole(self) -> list[Message]:
        assert self._start is not None
        self._closed = True
        given = json.loads(self._buffer)
        checked = check_body(self.path, given, self.head, self.prefix, self.verdict)
        return _messages(self._start, self._buffer if checked is given else json.dumps(checked).encode())

    def _closing(self) -> list[Message]:
        """The rest of the reply after a fault."""
        if self._stream is not None:
            return [*map(_body, self._stream.failed(self.fallback)), _body(b"", more=False)]
        start = self._start or {"type": "http.response.start", "status": 200, "headers": self._headers}
        body = whole_body(self.path, self.head, self.n, self.fallback, self.verdict.field())
        return _messages(start, json.dumps(body).encode())


async def send_alone(send: Send, checked: CheckedReply, *, stream: bool) -> None:
    """Send `checked.fallback` as the whole reply, without asking the model."""
    if not stream:
        for message in checked._closing():
            await send(message)
        return
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *checked._headers]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in checked._new_stream().failed(checked.fallback):
        await send(_body(part))
    await send(_body(b"", more=False))


def check_body(path: str, body: Body, head: Body, prefix: str, verdict: Verdict) -> Body:
    """A reply that is not a stream, as it may leave; the same object if nothing is different."""
    parts = body["output"] if path == RESPONSES else body["choices"]
    checked = [_checked_part(part, verdict, path) for part in parts]
    if not prefix and all(new is old for new, old in zip(checked, parts, strict=True)):
        return body
    if path == RESPONSES:
        own = [message_item(head, prefix)] if prefix else []
        return {**body, "output": [*own, *checked], FIELD: verdict.field()}
    return {**body, "choices": [_prefixed(choice, prefix) for choice in checked], FIELD: verdict.field()}


def _checked_part(part: Any, verdict: Verdict, path: str) -> Any:
    by, ended = {}, False
    for place, words in words_in(part):
        check = verdict.new_check(place)
        check.feed(words, last=True)
        verdict.add(check.fired)
        ended = ended or check.ended
        if check.left != words:
            by[place] = check.left
    if not by:
        return part
    replaced = words_replaced(part, by)
    if ended and path != RESPONSES:
        replaced["finish_reason"] = FILTERED
    return replaced


def _prefixed(choice: Body, prefix: str) -> Body:
    if "message" in choice:
        message = choice["message"]
        return {**choice, "message": {**message, "content": prefix + (message.get("content") or "")}}
    return {**choice, "text": prefix + choice["text"]}


def _messages(start: Message, body: bytes) -> list[Message]:
    kept = [
        (name, value) for name, value in start["headers"] if name.lower() not in (b"content-length", b"content-type")
    ]
    kept += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return [{**start, "headers": kept}, _body(body, more=False)]


def _body(part: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": part, "more_body": more}
