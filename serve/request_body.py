"""Reading a request's body, parsing it, and handing another body on in its place."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.api_errors import ApiError
from serve.reply import Message
from serve.request_rewrite import Body

# What the gateway writes itself, and what vLLM would schedule by.
_NOT_PASSED_ON = (b"content-length", b"transfer-encoding", b"x-request-id", b"x-vllm-priority",
                  b"x-data-parallel-rank", b"x-session-id")  # fmt: skip

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError 413 when it is larger than `max_bytes`."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the request ended before its body did")
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise ApiError(413, f"the body is larger than {max_bytes >> 10} KiB")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def parse_body(raw: bytes) -> Body:
    """The JSON object in a body. Raises ApiError 400 for anything else."""
    try:
        body = json.loads(raw, parse_constant=_reject_constant, parse_int=_int64)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; it must be an object")
    return body


def encode_body(body: Body) -> bytes:
    """The JSON of a body. Raises ApiError 400 for what UTF-8 cannot hold."""
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body contains an unpaired surrogate; send valid Unicode") from error


def replace_body(scope: Scope, receive: Receive, body: bytes, request_id: str) -> tuple[Scope, Receive]:
    """The same request with another body; after it, `receive` passes on what the client does next (disconnect)."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED_ON]
    headers += [(b"content-length", str(len(body)).encode()), (b"x-request-id", request_id.encode())]
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return {**scope, "headers": headers}, replay


def _reject_constant(word: str) -> None:
    # Python reads NaN and Infinity as numbers; JSON has neither.
    raise ValueError(f"{word} is not a JSON number")


def _int64(digits: str) -> int:
    # vLLM registers a request with a larger number, fails to hand it to its engine, and never forgets it.
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits[:30]} does not fit in 64 bits")
    return value
