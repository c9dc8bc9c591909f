"""The gateway in front of vLLM: pure ASGI middleware, outside every route.

Only the routes of serve/routes.py exist, and each has a role. A request that passes is bounded (body, tokens, requests
in flight), rewritten to name one exact version (serve/request_rewrite.py), given an adapter that stays in the engine
while it runs (serve/adapter_pool.py), judged by the crisis gate (serve/safety/gate.py), counted (serve/metrics.py) and
logged without its text (serve/access_log.py).
Bodies are parsed on the generating routes alone; while the gate is off, streams pass through byte for byte.
"""

import asyncio
import functools
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from counsel.store import Manifest
from serve.access_log import AccessLog
from serve.adapter_pool import AdapterPool
from serve.api_errors import ApiError
from serve.canary.choice import opening_of
from serve.chat_turns import Template
from serve.config import INSTANCE, INSTANCE_HEADER, ServeConfig
from serve.keys import ADMIN, Key, KeyRing
from serve.limits import Limits
from serve.metrics import ServerMetrics
from serve.name_table import NameTable
from serve.reply import Reply, Send
from serve.request_body import Receive, Scope, encode_body, parse_body, read_body, replace_body
from serve.request_rewrite import RESPONSES, Body, rewrite, weight
from serve.routes import (
    ANONYMOUS,
    GENERATING,
    ROUTES,
    Headers,
    authenticate,
    is_preflight,
    refuse_foreign_host,
    required_role,
)
from serve.safety.gate import Decision, SafetyGate, country_in
from serve.safety.held import HeldReply
from serve.safety.reply import CheckedReply, send_alone
from serve.store_watcher import StoreWatcher
from serve.token_counts import CURRENT, Tally

log = logging.getLogger("vllm.counsel")

# The scope's key under which an admin route names what it acted on, for the audit log.
TARGET = "counsel_target"
# The scope's key with the name of the caller's API key.
CALLER = "counsel_caller"
MAX_PATH = 256

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Service:
    """What the gateway and the routes share; on vLLM's app as `state.counsel`."""

    config: ServeConfig
    pool: AdapterPool
    watcher: StoreWatcher
    keys: KeyRing
    limits: Limits
    metrics: ServerMetrics
    access_log: AccessLog
    template: Template
    max_model_len: int
    # None: the gate is off.
    safety: SafetyGate | None = None
    # Two steps of a stop: first `/ready` fails, so that load balancers turn away; then new requests are refused.
    leaving: bool = False
    draining: bool = False


@dataclass
class RequestLog:
    """What is logged and counted of one request."""

    request_id: str
    method: str
    path: str
    key: Key = ANONYMOUS
    adapter: str = ""
    # The canary that chose the version, and what it chose it for.
    canary: str = ""
    unit: str = ""
    streamed: bool = False
    tally: Tally = field(default_factory=Tally)
    started_s: float = field(default_factory=time.monotonic)
    # When the crisis gate let the reply leave; 0.0 where it kept none back.
    released_s: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token that could leave; None until there is one."""
        first_s = self.tally.first_s
        return None if first_s is None else max(first_s, self.released_s) - self.started_s


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
        headers: Headers = dict(scope["headers"])
        given_id = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        request_log = RequestLog(request_id, scope["method"], _normalized(scope["path"][:MAX_PATH]))
        method, path = request_log.method, request_log.path
        scope = {**scope, "path": path, "raw_path": path.encode()}
        extra = [(b"x-request-id", request_id.encode())]
        if path == "/health":
            extra.append((INSTANCE_HEADER.encode(), os.environ.get(INSTANCE, "").encode()))
        reply = Reply(send, extra, path == RESPONSES)
        try:
            if service.keys.open:
                refuse_foreign_host(headers)
            preflight = bool(service.config.allowed_origins) and is_preflight(method, headers)
            role = required_role(method, path, preflight=preflight, open_server=service.keys.open, ui=service.config.ui)
            request_log.key = authenticate(service.keys, role, headers)
            scope[CALLER] = request_log.key.name
            if role == ADMIN and request_log.key.role != ADMIN:
                raise ApiError(403, "this needs an admin key")
            if path == "/ready" and service.leaving:
                raise ApiError(503, "the server is about to stop", retry_after_s=5)
            if method == "POST" and path in GENERATING:
                await self._generate(service, request_log, scope, receive, reply)
            else:
                await self.app(_as_health(scope) if path == "/ready" else scope, receive, reply.send)
        except ApiError as error:
            service.metrics.refusals.labels(str(error.status), error.code).inc()
            await reply.send_error(error, _cors_headers(service, headers))
        finally:
            _write_log(service, request_log, reply, scope.get(TARGET, ""))

    async def _generate(
        self, service: Service, request_log: RequestLog, scope: Scope, receive: Receive, reply: Reply
    ) -> None:
        if service.draining:
            raise ApiError(503, "the server is stopping; retry in a moment", retry_after_s=5)
        config, limits, key = service.config, service.limits, request_log.key.name
        # Admitted twice, one after the other: as one sequence while its body is read, because bodies take memory, and
        # then as the sequences that it makes the engine run, which are known only from its body.
        with limits.admit(key, 1):
            body = parse_body(await read_body(receive, config.max_body_kb << 10))
        n = weight(request_log.path, body, config.max_completion_tokens, service.max_model_len)
        with limits.admit(key, n) as turn:
            service.metrics.in_flight.inc(n)
            request_log.streamed = body.get("stream") is True
            comments = asyncio.create_task(_send_comments(reply, config.comment_s if request_log.streamed else 0))
            try:
                await _wait_for_turn(turn, receive)
                await self._answer(service, request_log, body, scope, receive, reply)
            finally:
                comments.cancel()
                service.metrics.in_flight.dec(n)
                if request_log.adapter:
                    service.metrics.answered(
                        request_log.adapter, reply.status, request_log.tally, request_log.ttft_s, request_log.streamed
                    )

    async def _answer(
        self, service: Service, request_log: RequestLog, body: Body, scope: Scope, receive: Receive, reply: Reply
    ) -> None:
        base_name = service.pool.names.base_name
        model = body.get("model")
        manifest = None
        if isinstance(model, str) and model not in ("", base_name):
            manifest = _side(service.pool.names, await service.watcher.resolve(model), request_log, body)
        ask = functools.partial(self._ask, service, request_log, body, manifest, scope)
        gate, model_id = service.safety, manifest.id if manifest else base_name
        if gate is None or not gate.covers(manifest.name if manifest else base_name):
            await ask("", receive, reply.send)
            return
        # The model is asked beside the checkers; nothing of its answer leaves before they have judged.
        held = HeldReply(receive)
        early = asyncio.create_task(held.begin(functools.partial(ask, "")))
        try:
            decision, checked = await _judge(gate, request_log, body, scope, reply, model_id)
            if not decision.alone and not decision.guidance:
                request_log.released_s = time.monotonic()
                await held.release(checked.send)
                await early
                return
            held.abandon()
            if decision.alone:
                await send_alone(reply.send, checked, stream=request_log.streamed)
        finally:
            # Its exception was raised before, or is nobody's.
            held.abandon()
            await asyncio.gather(early, return_exceptions=True)
            if not request_log.released_s:
                # What was generated was for nobody.
                request_log.tally, request_log.adapter = Tally(), ""
        if not decision.alone:
            await ask(decision.guidance, receive, checked.send)

    async def _ask(
        self,
        service: Service,
        request_log: RequestLog,
        body: Body,
        manifest: Manifest | None,
        scope: Scope,
        guidance: str,
        receive: Receive,
        send: Send,
    ) -> None:
        """Have vLLM answer a request, with `guidance` added to its system prompt."""
        pool = service.pool
        rewritten = rewrite(
            request_log.path,
            body,
            manifest,
            salt=request_log.key.digest,
            guidance=guidance,
            max_completion_tokens=service.config.max_completion_tokens,
            template=service.template,
        )
        raw = encode_body(rewritten)
        loaded = await pool.acquire(manifest) if manifest else None
        request_log.adapter = manifest.id if manifest else pool.names.base_name
        CURRENT.set(request_log.tally)
        try:
            scope, receive = replace_body(scope, receive, raw, request_log.request_id)
            await self.app(scope, receive, send)
        except ApiError:
            raise
        except Exception as error:  # vLLM's stream of response events lets any exception through
            raise _as_api_error(error, request_log.request_id) from error
        finally:
            if loaded is not None:
                pool.release(loaded)


def _side(names: NameTable, manifest: Manifest, request_log: RequestLog, body: Body) -> Manifest:
    """The version that answers a request whose model resolved to `manifest`: a canary's, for a share of them."""
    new = names.canary_version(manifest.name)
    canary = names.published[manifest.name].canary
    if new is None or canary is None or body["model"] != manifest.name:
        return manifest
    request_log.canary = canary.id
    request_log.unit = canary.unit(request_log.key.digest, opening_of(request_log.path, body))
    return new if canary.chooses(request_log.unit) else manifest


async def _judge(
    gate: SafetyGate, request_log: RequestLog, body: Body, scope: Scope, reply: Reply, model: str
) -> tuple[Decision, CheckedReply]:
    """The crisis gate's decision about a request, and the output check of its reply."""
    path = request_log.path
    try:
        country = country_in(dict(scope["headers"]))
        decision = await gate.decide(path, body, key=request_log.key.digest, country=country)
        return decision, gate.reply(reply.send, path, body, decision, request_log.request_id, model)
    except ApiError:
        raise
    except Exception as error:  # not even a text of ours can be made: nothing is answered
        raise _as_api_error(error, request_log.request_id) from error


async def _send_comments(reply: Reply, every_s: float) -> None:
    while every_s:
        await asyncio.sleep(every_s)
        if not await reply.comment():
            return


async def _wait_for_turn(turn: asyncio.Future[None], receive: Receive) -> None:
    """Return when it is this request's turn. Raises ApiError when the client disconnects first."""
    if turn.done():
        return
    disconnected = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((turn, disconnected), return_when=asyncio.FIRST_COMPLETED)
    finally:
        disconnected.cancel()
    if not turn.done():
        raise ApiError(400, "the client disconnected before its turn")


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_api_error(error: Exception, request_id: str) -> ApiError:
    """What vLLM would answer for an exception of its own."""
    from vllm.entrypoints.serve import create_error_response

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # Starlette's wrapper: a handler wanted to answer, but the stream had begun.
        error = error.__cause__
    response = create_error_response(error).error
    if response.code < 500:
        return ApiError(400, response.message, param=response.param)
    # Not the message: it may quote the request, which must not be logged.
    log.error("request %s failed: %s", request_id, type(error).__name__)
    return ApiError(500, f"the server failed to answer: {type(error).__name__}")


def _normalized(path: str) -> str:
    """The path without extra slashes: clients join a base URL that ends in one with a path that starts with one."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


def _as_health(scope: Scope) -> Scope:
    return {**scope, "path": "/health", "raw_path": b"/health"}


def _cors_headers(service: Service, headers: Headers) -> list[tuple[bytes, bytes]]:
    """What lets a browser's page read our errors; vLLM's CORS middleware sees only what passes the gateway."""
    origin = headers.get(b"origin", b"")
    if origin and ("*" in service.config.allowed_origins or origin.decode("latin-1") in service.config.allowed_origins):
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
    return []


def _write_log(service: Service, request_log: RequestLog, reply: Reply, target: str) -> None:
    if request_log.path in ("/health", "/ready", "/metrics") and reply.status == 200:
        return
    row: dict[str, Any] = {
        "request_id": request_log.request_id,
        "key": request_log.key.name,
        "method": request_log.method,
        "path": request_log.path,
        "status": reply.status,
    }
    if ROUTES.get((request_log.method, request_log.path)) == ADMIN and request_log.key is not ANONYMOUS:
        service.access_log.audit(**row, target=target)
    duration_s = round(time.monotonic() - request_log.started_s, 4)
    if request_log.path in GENERATING:
        row |= {
            "adapter": request_log.adapter,
            **({"canary": request_log.canary, "unit": request_log.unit} if request_log.canary else {}),
            "streamed": request_log.streamed,
            "prompt_tokens": request_log.tally.prompt_tokens,
            "completion_tokens": request_log.tally.completion_tokens,
            "ttft_s": request_log.ttft_s and round(request_log.ttft_s, 4),
        }
    service.access_log.request(**row, code=reply.code, duration_s=duration_s)
