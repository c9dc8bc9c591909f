"""The gate in front of vLLM: pure ASGI middleware, outside every route.

Only the routes below exist; each has a role. What passes is bounded (body, tokens, requests in flight), named exactly
(serve/bodies.py), held in the engine while it runs (serve/plane.py), counted (serve/meters.py) and written down without
its text (serve/journal.py). Bodies are parsed on the generating routes alone; streams pass through byte for byte.
"""

import asyncio
import json
import re
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from serve.bodies import CHAT, COMPLETIONS, RESPONSES, Body, n_sequences, prepare, wants_usage
from serve.config import ServeConfig, is_loopback
from serve.journal import Journal
from serve.keys import ADMIN, USER, Key, KeyRing
from serve.limits import Limits
from serve.meters import Meters
from serve.openai_errors import Refusal
from serve.plane import Plane

ANYONE = "anyone"
ROUTES = {
    ("GET", "/health"): ANYONE,
    ("GET", "/version"): USER,
    ("GET", "/v1/models"): USER,
    ("POST", CHAT): USER,
    ("POST", COMPLETIONS): USER,
    ("POST", RESPONSES): USER,
    ("GET", "/metrics"): ADMIN,
    ("GET", "/v1/adapters"): ADMIN,
    ("POST", "/v1/load_lora_adapter"): ADMIN,
    ("POST", "/v1/unload_lora_adapter"): ADMIN,
}
GENERATING = (CHAT, COMPLETIONS, RESPONSES)
# Where an admin route leaves what it was asked to act on, for the audit.
TARGET = "counsel_target"
ANONYMOUS = Key(USER, "anonymous", "")

_USAGE = re.compile(rb'"(?:prompt|input)_tokens":(\d+).*?"(?:completion|output)_tokens":(\d+)', re.DOTALL)
_ONE_MODEL = re.compile(r"/v1/models/[A-Za-z0-9._@/-]{1,200}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# What we write ourselves, and what vLLM would take its scheduling from.
_NOT_PASSED_ON = (b"content-length", b"transfer-encoding", b"x-request-id", b"x-vllm-priority",
                  b"x-data-parallel-rank", b"x-session-id")  # fmt: skip
MAX_PATH = 256

Message = MutableMapping[str, Any]
Headers = dict[bytes, bytes]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Service:
    """What the gate and the routes share; on vLLM's app as `state.counsel`."""

    config: ServeConfig
    plane: Plane
    keys: KeyRing
    limits: Limits
    meters: Meters
    journal: Journal
    fold_system: bool = False
    draining: bool = False


@dataclass
class Visit:
    """One request as it passes the gate."""

    request_id: str
    method: str
    path: str
    key: Key = ANONYMOUS
    adapter: str = ""
    status: int = 0
    code: str = ""
    streamed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    started_s: float = field(default_factory=time.monotonic)


class Gateway:
    """The middleware that vLLM's `--middleware` names."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        service: Service = scope["app"].state.counsel
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = Visit(request_id, scope["method"], scope["path"][:MAX_PATH])
        send = _stamped(send, visit)
        try:
            if service.keys.open:
                _refuse_foreign_name(headers)
            role = _role(service, visit, headers)
            visit.key = _key(service, role, headers)
            if role == ADMIN and visit.key.role != ADMIN:
                raise Refusal(403, "this needs an admin key")
            if service.draining:
                raise Refusal(503, "the server is stopping; ask again in a moment", retry_after_s=5)
            if visit.method == "POST" and visit.path in GENERATING:
                await self._generate(service, visit, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except Refusal as refusal:
            visit.status, visit.code = refusal.status, refusal.code
            service.meters.refusals.labels(str(refusal.status), refusal.code).inc()
            await _refuse(send, refusal, _permission(service, headers))
        finally:
            _write_down(service, visit, scope.get(TARGET, ""))

    async def _generate(self, service: Service, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        limits, caller = service.limits, visit.key.name
        # It counts from its first byte, as one until it is read: bodies take memory.
        arriving = limits.enter(caller, 1)
        try:
            body = _parse(await _read(receive, service.config.max_body_kb << 10))
        finally:
            limits.leave(caller, 1, arriving)
        weight = n_sequences(visit.path, body)
        turn = limits.enter(caller, weight)
        service.meters.in_flight.inc(weight)
        try:
            await _wait(turn, receive)
            await self._answer(service, visit, body, scope, receive, send)
        finally:
            limits.leave(caller, weight, turn)
            service.meters.in_flight.dec(weight)
        service.meters.answered(
            visit.adapter,
            visit.status,
            visit.prompt_tokens,
            visit.completion_tokens,
            visit.ttft_s,
            time.monotonic() - visit.started_s,
            visit.streamed,
        )

    async def _answer(
        self, service: Service, visit: Visit, body: Body, scope: Scope, receive: Receive, send: Send
    ) -> None:
        plane = service.plane
        model = body.get("model")
        manifest = None
        if isinstance(model, str) and model not in ("", plane.base_name):
            manifest = await plane.resolve(model)
        visit.adapter = manifest.id if manifest else plane.base_name
        visit.streamed = bool(body.get("stream"))
        ready = prepare(
            visit.path,
            body,
            manifest,
            salt=visit.key.digest,
            max_completion_tokens=service.config.max_completion_tokens,
            fold_system=service.fold_system,
        )
        try:
            raw = json.dumps(ready, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Refusal(400, "a text holds half a surrogate pair, which is no character") from error
        resident = await plane.acquire(manifest) if manifest else None
        try:
            scope, receive = _with_body(scope, receive, raw, visit.request_id)
            await self.app(scope, receive, _watched(send, visit, visit.streamed and not wants_usage(visit.path, body)))
        finally:
            if resident is not None:
                plane.release(resident)


def _role(service: Service, visit: Visit, headers: Headers) -> str:
    asked = headers.get(b"access-control-request-method", b"").decode("latin-1")
    if visit.method == "OPTIONS" and service.config.cors and asked and b"origin" in headers:
        # A browser asks beforehand, without a key, whether it may; vLLM's CORS middleware answers by itself.
        return ANYONE
    role = ROUTES.get((visit.method, visit.path))
    if role is None and visit.method == "GET" and _ONE_MODEL.fullmatch(visit.path):
        role = USER
    if role is None:
        if any(path == visit.path for _, path in ROUTES):
            raise Refusal(405, f"{visit.path} does not answer {visit.method}")
        raise Refusal(404, f"there is no {visit.method} {visit.path} here", code="unknown_url")
    if role == ADMIN and visit.path == "/metrics" and service.keys.open:
        # On a server without keys, which only this machine can reach, figures are as open as answers.
        return USER
    return role


def _refuse_foreign_name(headers: Headers) -> None:
    """Raise Refusal 403 unless the request names this machine as localhost.

    Without keys, being on this machine is the only pass, and a web page can borrow it: the name of its host may be made
    to mean 127.0.0.1 once the page is loaded (DNS rebinding). The browser still sends that name.
    """
    try:
        name = urllib.parse.urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname
    except ValueError:
        name = None
    if not is_loopback(name or ""):
        raise Refusal(403, f"a server without keys answers to localhost only, not to {name!r}; start it with --keys")


def _key(service: Service, role: str, headers: Headers) -> Key:
    if role == ANYONE:
        return ANONYMOUS
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    key = service.keys.find(token.strip()) if scheme.lower() == "bearer" else None
    if key is None and service.keys.open and role == USER:
        return ANONYMOUS
    if key is None:
        raise Refusal(
            401, "an API key is needed: Authorization: Bearer <key>" if not token else "the API key is unknown"
        )
    return key


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the request ended before its body did")
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise Refusal(413, f"the body is larger than {max_bytes >> 10} KiB")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def _wait(turn: asyncio.Future[None], receive: Receive) -> None:
    """Until it is this request's turn. Raises Refusal when the caller hangs up first."""
    if turn.done():
        return
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait((turn, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if not turn.done():
        raise Refusal(400, "the caller hung up before its turn")


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _parse(raw: bytes) -> Body:
    try:
        body = json.loads(raw, parse_constant=_no_number, parse_int=_int64)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is a JSON {type(body).__name__}; an object is needed")
    return body


def _no_number(word: str) -> None:
    # Python reads NaN and Infinity as numbers; JSON has neither.
    raise ValueError(f"{word} is no number")


def _int64(digits: str) -> int:
    # Beyond this vLLM registers a request that it then cannot hand to its engine, and never forgets it.
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits[:30]} does not fit 64 bits")
    return value


def _with_body(scope: Scope, receive: Receive, body: bytes, request_id: str) -> tuple[Scope, Receive]:
    """The same request with another body; after it, what the caller does next (hang up) comes through."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED_ON]
    headers += [(b"content-length", str(len(body)).encode()), (b"x-request-id", request_id.encode())]
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return {**scope, "headers": headers}, replay


def _stamped(send: Send, visit: Visit) -> Send:
    """Note the status, and add the request id to the response's headers."""

    async def stamped(message: Message) -> None:
        if message["type"] == "http.response.start":
            visit.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", visit.request_id.encode())]
        await send(message)

    return stamped


def _watched(send: Send, visit: Visit, hide_usage: bool) -> Send:
    """Time the first byte and read the usage as the response passes; drop a usage chunk nobody asked for."""

    async def watched(message: Message) -> None:
        body = message.get("body", b"")
        if body:
            if visit.ttft_s is None:
                visit.ttft_s = time.monotonic() - visit.started_s
            # Inside a text the quotes would be escaped: this can only be the field.
            at = body.rfind(b'"usage":{')
            if at >= 0:
                found = _USAGE.search(body, at, at + 600)
                if found:
                    visit.prompt_tokens, visit.completion_tokens = int(found[1]), int(found[2])
                    if hide_usage and b'"choices":[]' in body:
                        return
        await send(message)

    return watched


def _permission(service: Service, headers: Headers) -> list[tuple[bytes, bytes]]:
    """What lets a browser's page read a refusal; vLLM's CORS middleware sees only what passed the gate."""
    origin = headers.get(b"origin", b"")
    if origin and ("*" in service.config.cors or origin.decode("latin-1") in service.config.cors):
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
    return []


async def _refuse(send: Send, refusal: Refusal, permission: list[tuple[bytes, bytes]]) -> None:
    body = refusal.body()
    headers = [(name.encode(), value.encode()) for name, value in refusal.headers().items()] + permission
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _write_down(service: Service, visit: Visit, target: str) -> None:
    if visit.path in ("/health", "/metrics") and visit.status == 200:
        return
    row: dict[str, Any] = {
        "request_id": visit.request_id,
        "key": visit.key.name,
        "method": visit.method,
        "path": visit.path,
        "status": visit.status,
    }
    if ROUTES.get((visit.method, visit.path)) == ADMIN and visit.key is not ANONYMOUS:
        service.journal.audit(**row, target=target)
    duration_s = round(time.monotonic() - visit.started_s, 4)
    if visit.path in GENERATING:
        row |= {
            "adapter": visit.adapter,
            "streamed": visit.streamed,
            "prompt_tokens": visit.prompt_tokens,
            "completion_tokens": visit.completion_tokens,
            "ttft_s": visit.ttft_s and round(visit.ttft_s, 4),
        }
    service.journal.request(**row, code=visit.code, duration_s=duration_s)
