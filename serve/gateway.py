"""The gateway in front of vLLM: pure ASGI middleware, outside every route.

Only the routes below exist; each has a role. What passes is bounded (body, tokens, requests in flight), named exactly
(serve/request_rewrite.py), held in the engine while it runs (serve/adapter_pool.py), counted (serve/metrics.py) and
written down without its text (serve/access_log.py). Bodies are parsed on the generating routes alone; streams pass
through byte for byte.
"""

import asyncio
import json
import logging
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from serve.access_log import AccessLog
from serve.adapter_pool import AdapterPool
from serve.api_errors import ApiError
from serve.chat_turns import Template
from serve.config import INSTANCE, INSTANCE_HEADER, ServeConfig, is_loopback
from serve.keys import ADMIN, USER, Key, KeyRing
from serve.limits import Limits
from serve.metrics import ServerMetrics
from serve.reply import Message, Reply, Send
from serve.request_rewrite import CHAT, COMPLETIONS, RESPONSES, Body, prepare, weight
from serve.store_watcher import StoreWatcher
from serve.token_counts import CURRENT, Tally

log = logging.getLogger("vllm.counsel")

ANYONE = "anyone"
ROUTES = {
    ("GET", "/health"): ANYONE,
    ("GET", "/ready"): ANYONE,
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

_ONE_MODEL = re.compile(r"/v1/models/[A-Za-z0-9._@/-]{1,200}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# What we write ourselves, and what vLLM would take its scheduling from.
_NOT_PASSED_ON = (b"content-length", b"transfer-encoding", b"x-request-id", b"x-vllm-priority",
                  b"x-data-parallel-rank", b"x-session-id")  # fmt: skip
MAX_PATH = 256

Headers = dict[bytes, bytes]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Service:
    """What the gate and the routes share; on vLLM's app as `state.counsel`."""

    config: ServeConfig
    pool: AdapterPool
    watcher: StoreWatcher
    keys: KeyRing
    limits: Limits
    metrics: ServerMetrics
    access_log: AccessLog
    template: Template
    max_model_len: int
    # Told to stop: first no balancer should choose it any more, then nothing new is taken.
    leaving: bool = False
    draining: bool = False


@dataclass
class RequestLog:
    """One request as it passes the gate."""

    request_id: str
    method: str
    path: str
    key: Key = ANONYMOUS
    adapter: str = ""
    streamed: bool = False
    tally: Tally = field(default_factory=Tally)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; None as long as there is none."""
        return None if self.tally.first_s is None else self.tally.first_s - self.started_s


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
        visit = RequestLog(request_id, scope["method"], _without_last_slash(scope["path"][:MAX_PATH]))
        scope = {**scope, "path": visit.path, "raw_path": visit.path.encode()}
        extra = [(b"x-request-id", request_id.encode())]
        if visit.path == "/health":
            extra.append((INSTANCE_HEADER.encode(), os.environ.get(INSTANCE, "").encode()))
        reply = Reply(send, extra, visit.path == RESPONSES)
        try:
            if service.keys.open:
                _refuse_foreign_name(headers)
            role = _role(service, visit, headers)
            visit.key = _key(service, role, headers)
            if role == ADMIN and visit.key.role != ADMIN:
                raise ApiError(403, "this needs an admin key")
            if visit.path == "/ready" and service.leaving:
                raise ApiError(503, "the server is about to stop", retry_after_s=5)
            if visit.method == "POST" and visit.path in GENERATING:
                await self._generate(service, visit, scope, receive, reply)
            else:
                await self.app(_as_health(scope) if visit.path == "/ready" else scope, receive, reply.send)
        except ApiError as refusal:
            service.metrics.refusals.labels(str(refusal.status), refusal.code).inc()
            await reply.refuse(refusal, _permission(service, headers))
        finally:
            _write_down(service, visit, reply, scope.get(TARGET, ""))

    async def _generate(
        self, service: Service, visit: RequestLog, scope: Scope, receive: Receive, reply: Reply
    ) -> None:
        if service.draining:
            raise ApiError(503, "the server is stopping; ask again in a moment", retry_after_s=5)
        limits, caller = service.limits, visit.key.name
        # It counts from its first byte, as one until it is read: bodies take memory.
        arriving = limits.enter(caller, 1)
        try:
            body = _parse(await _read(receive, service.config.max_body_kb << 10))
        finally:
            limits.leave(caller, 1, arriving)
        n = weight(visit.path, body, service.config.max_completion_tokens, service.max_model_len)
        turn = limits.enter(caller, n)
        service.metrics.in_flight.inc(n)
        visit.streamed = body.get("stream") is True
        signs = asyncio.create_task(_show_life(reply, service.config.comment_s if visit.streamed else 0))
        try:
            await _wait(turn, receive)
            await self._answer(service, visit, body, scope, receive, reply)
        finally:
            signs.cancel()
            limits.leave(caller, n, turn)
            service.metrics.in_flight.dec(n)
            if visit.adapter:
                service.metrics.answered(visit.adapter, reply.status, visit.tally, visit.ttft_s, visit.streamed)

    async def _answer(
        self, service: Service, visit: RequestLog, body: Body, scope: Scope, receive: Receive, reply: Reply
    ) -> None:
        pool, base_name = service.pool, service.pool.names.base_name
        model = body.get("model")
        manifest = None
        if isinstance(model, str) and model not in ("", base_name):
            manifest = await service.watcher.resolve(model)
        ready = prepare(
            visit.path,
            body,
            manifest,
            salt=visit.key.digest,
            max_completion_tokens=service.config.max_completion_tokens,
            template=service.template,
        )
        try:
            raw = json.dumps(ready, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, "a text holds half a surrogate pair, which is no character") from error
        resident = await pool.acquire(manifest) if manifest else None
        visit.adapter = manifest.id if manifest else base_name
        CURRENT.set(visit.tally)
        try:
            scope, receive = _with_body(scope, receive, raw, visit.request_id)
            await self.app(scope, receive, reply.send)
        except ApiError:
            raise
        except Exception as error:  # vLLM's stream of response events lets through whatever went wrong
            raise _as_refusal(error, visit.request_id) from error
        finally:
            if resident is not None:
                pool.release(resident)


async def _show_life(reply: Reply, every_s: float) -> None:
    while every_s:
        await asyncio.sleep(every_s)
        if not await reply.comment():
            return


def _as_refusal(error: Exception, request_id: str) -> ApiError:
    """What vLLM would answer for an exception of its own."""
    from vllm.entrypoints.serve import create_error_response

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # So Starlette says that a stream had begun when its handler would have answered.
        error = error.__cause__
    said = create_error_response(error).error
    if said.code < 500:
        return ApiError(400, said.message, param=said.param)
    # The message may quote the request: it is for nobody's log.
    log.error("request %s failed: %s", request_id, type(error).__name__)
    return ApiError(500, f"the server failed to answer: {type(error).__name__}")


def _without_last_slash(path: str) -> str:
    """The path as the routes have it: clients join a base URL that ends in a slash with one that starts with it."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


def _as_health(scope: Scope) -> Scope:
    return {**scope, "path": "/health", "raw_path": b"/health"}


def _role(service: Service, visit: RequestLog, headers: Headers) -> str:
    asked = headers.get(b"access-control-request-method", b"").decode("latin-1")
    if visit.method == "OPTIONS" and service.config.allowed_origins and asked and b"origin" in headers:
        # A browser asks beforehand, without a key, whether it may; vLLM's CORS middleware answers by itself.
        return ANYONE
    role = ROUTES.get((visit.method, visit.path))
    if role is None and visit.method == "GET" and _ONE_MODEL.fullmatch(visit.path):
        role = USER
    if role is None:
        if any(path == visit.path for _, path in ROUTES):
            raise ApiError(405, f"{visit.path} does not answer {visit.method}")
        raise ApiError(404, f"there is no {visit.method} {visit.path} here", code="unknown_url")
    if role == ADMIN and visit.path == "/metrics" and service.keys.open:
        # On a server without keys, which only this machine can reach, figures are as open as answers.
        return USER
    return role


def _refuse_foreign_name(headers: Headers) -> None:
    """Raise ApiError 403 unless the request names this machine as localhost.

    Without keys, being on this machine is the only pass, and a web page can borrow it: the name of its host may be made
    to mean 127.0.0.1 once the page is loaded (DNS rebinding). The browser still sends that name.
    """
    try:
        name = urllib.parse.urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname
    except ValueError:
        name = None
    if not is_loopback(name or ""):
        raise ApiError(403, f"a server without keys answers to localhost only, not to {name!r}; start it with --keys")


def _key(service: Service, role: str, headers: Headers) -> Key:
    if role == ANYONE:
        return ANONYMOUS
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    key = service.keys.find(token.strip()) if scheme.lower() == "bearer" else None
    if key is None and service.keys.open and role == USER:
        return ANONYMOUS
    if key is None:
        raise ApiError(
            401, "an API key is needed: Authorization: Bearer <key>" if not token else "the API key is unknown"
        )
    return key


async def _read(receive: Receive, max_bytes: int) -> bytes:
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


async def _wait(turn: asyncio.Future[None], receive: Receive) -> None:
    """Until it is this request's turn. Raises ApiError when the caller hangs up first."""
    if turn.done():
        return
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait((turn, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if not turn.done():
        raise ApiError(400, "the caller hung up before its turn")


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _parse(raw: bytes) -> Body:
    try:
        body = json.loads(raw, parse_constant=_no_number, parse_int=_int64)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; an object is needed")
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


def _permission(service: Service, headers: Headers) -> list[tuple[bytes, bytes]]:
    """What lets a browser's page read a refusal; vLLM's CORS middleware sees only what passed the gate."""
    origin = headers.get(b"origin", b"")
    if origin and ("*" in service.config.allowed_origins or origin.decode("latin-1") in service.config.allowed_origins):
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
    return []


def _write_down(service: Service, visit: RequestLog, reply: Reply, target: str) -> None:
    if visit.path in ("/health", "/ready", "/metrics") and reply.status == 200:
        return
    row: dict[str, Any] = {
        "request_id": visit.request_id,
        "key": visit.key.name,
        "method": visit.method,
        "path": visit.path,
        "status": reply.status,
    }
    if ROUTES.get((visit.method, visit.path)) == ADMIN and visit.key is not ANONYMOUS:
        service.access_log.audit(**row, target=target)
    duration_s = round(time.monotonic() - visit.started_s, 4)
    if visit.path in GENERATING:
        row |= {
            "adapter": visit.adapter,
            "streamed": visit.streamed,
            "prompt_tokens": visit.tally.prompt_tokens,
            "completion_tokens": visit.tally.completion_tokens,
            "ttft_s": visit.ttft_s and round(visit.ttft_s, 4),
        }
    service.access_log.request(**row, code=reply.code, duration_s=duration_s)
