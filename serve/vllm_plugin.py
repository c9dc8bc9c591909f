"""vLLM endpoint plugin: connects the adapter pool to the engine, and answers the routes about models and adapters.

vLLM's runtime LoRA updating stays off, and with it `/adapters`, the resolvers and any path that a caller might name.
Its `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` are answered here in vLLM's own request and response shapes,
but they reach only what the store holds. The gateway lets only admins use them.
"""

import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from counsel import store as adapter_store
from counsel.files import write_json
from counsel.safety.policy import OFF, read_policy
from counsel.store import Manifest
from serve import chat_turns, grammars, token_counts, validation
from serve import config as configs
from serve.access_log import AccessLog
from serve.adapter_pool import AdapterPool
from serve.api_errors import ApiError
from serve.config import ServeConfig
from serve.engine import VllmEngine
from serve.gateway import TARGET, Service
from serve.int8_base import source_fingerprint
from serve.keys import KeyRing
from serve.limits import Limits
from serve.metrics import ServerMetrics
from serve.name_table import NameTable
from serve.private_port import PrivatePort
from serve.safety.commands import SHOWN
from serve.safety.counts import SafetyCounts
from serve.safety.gate import SafetyGate, figures, load_detector
from serve.server_registry import ServerRecord, register
from serve.store_watcher import StoreWatcher
from serve.ui import page, vote_routes

log = logging.getLogger("vllm.counsel")


class AdaptersPlugin:
    """The entry `counsel_adapters` of `vllm.endpoint_plugins`."""

    name = "counsel_adapters"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add our routes; they replace vLLM's routes of the same path."""
        from fastapi import Request
        from fastapi.responses import JSONResponse, PlainTextResponse
        from vllm.entrypoints.serve.exception_handling import register as handlers
        from vllm.version import __version__ as vllm_version

        # vLLM gives its handlers to the app after this, and has no setting for them.
        handlers.validation_exception_handler = validation.refuse

        # The gateway answers 404 for them on a server without --ui.
        page.attach_page(app)
        vote_routes.attach_votes(app)

        @app.get("/version")
        async def show_version(request: Request) -> JSONResponse:
            return JSONResponse({"version": vllm_version, "safety": request.app.state.counsel_safety})

        @app.get("/v1/models")
        async def list_models(request: Request) -> JSONResponse:
            return JSONResponse({"object": "list", "data": _cards(request.app.state)})

        @app.get("/v1/models/{model:path}")
        async def show_model(model: str, request: Request) -> JSONResponse:
            service: Service = request.app.state.counsel
            wanted = model if model == service.pool.names.base_name else (await service.watcher.resolve(model)).id
            cards = {card["id"]: card for card in _cards(request.app.state)}
            return JSONResponse(cards.get(model) or cards[wanted])

        @app.get("/v1/adapters")
        async def list_adapters(request: Request) -> JSONResponse:
            return JSONResponse({"object": "list", "data": _states(request.app.state.counsel.pool)})

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> PlainTextResponse:
            body = await _object(request)
            name, path = _string(body, "lora_name"), _string(body, "lora_path")
            request.scope[TARGET] = f"{name} from {path}"
            await _load(request.app.state.counsel.watcher, name, path, bool(body.get("load_inplace")))
            return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request) -> PlainTextResponse:
            name = request.scope[TARGET] = _string(await _object(request), "lora_name")
            await _unload(request.app.state.counsel.watcher, name)
            return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Load the store's adapters and start to follow the store; the server opens its port only after this."""
        config = configs.from_environment()
        grammars.guard(engine_client, grammars.for_model(engine_client))
        token_counts.watch(engine_client)
        _drop_lora_series(engine_client)
        metrics = ServerMetrics()
        # Read once, off the event loop: the model's weight files do not change while it is served.
        base_fingerprint = await asyncio.to_thread(source_fingerprint, Path(args.model))
        server = ServerRecord(f"http://{config.host}:{config.port}", base_fingerprint, args.max_lora_rank)
        pool = AdapterPool(
            engine=VllmEngine(engine_client, state.openai_serving_models, args.data_parallel_size),
            store=Path(config.store),
            names=NameTable(state.openai_serving_models.base_model_paths[0].name, server),
            capacity=args.max_cpu_loras,
            on_event=metrics.adapter_event,
        )
        watcher = StoreWatcher(pool, Path(config.preload) if config.preload else None)
        keys = KeyRing(Path(config.keys) if config.keys else None)
        safety, state.counsel_safety = await _open_gate(config, engine_client)
        state.counsel = Service(
            config=config,
            pool=pool,
            watcher=watcher,
            keys=keys,
            limits=Limits(config.key_running, config.key_queued, config.queued),
            metrics=metrics,
            access_log=AccessLog(config.log_dir),
            template=await asyncio.to_thread(chat_turns.template_in, Path(args.model), args.chat_template),
            max_model_len=state.openai_serving_models.model_config.max_model_len,
            safety=safety,
        )
        # Kept on the state: the server is registered as long as this file is open.
        state.counsel_registration = register(pool.store, server)
        await watcher.start()
        # Kept on the state: the event loop itself holds tasks only weakly.
        state.counsel_watch = asyncio.create_task(watcher.watch())
        if config.metrics_port:
            private = PrivatePort(config.metrics_host, config.metrics_port, lambda: _states(pool))
            state.counsel_private_port = asyncio.create_task(private.answer())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, _start_stopping, state, config.leave_s)
        loop.add_signal_handler(signal.SIGUSR2, _start_stopping, state, 0.0)
        log.info("serving %s and %d adapters", pool.names.base_name, len(pool.loaded_adapters))


async def _open_gate(config: ServeConfig, engine_client: Any) -> tuple[SafetyGate | None, Any]:
    """The crisis gate, and what `/version` says of it."""
    policy = read_policy(config.safety)
    if policy is None:
        log.warning("the crisis gate is off: no message and no answer is checked")
        return None, OFF
    detector = await asyncio.to_thread(load_detector, policy)
    # The first one loads the model.
    await asyncio.to_thread(detector.assess, ["hello"])
    tokenizer = engine_client.renderer.tokenizer
    gate = SafetyGate(policy, detector, SafetyCounts(config.log_dir), tokenizer.decode)
    shown = {"policy": policy.digest, "detector": figures(detector.card)}
    await asyncio.to_thread(write_json, config.log_dir / SHOWN, shown)
    return gate, shown


def _drop_lora_series(engine_client: Any) -> None:
    """Drop `vllm:lora_requests_info`: it grows by one series per set and order of adapters that ran together."""
    manager = engine_client.logger_manager
    for logger in manager.stat_loggers if manager else ():
        if getattr(logger, "gauge_lora_info", None) is not None:
            REGISTRY.unregister(logger.gauge_lora_info)
            logger.gauge_lora_info = None


def _start_stopping(state: Any, leave_s: float) -> None:
    state.counsel_stop = asyncio.create_task(_stop(state.counsel, leave_s))


async def _stop(service: Service, leave_s: float) -> None:
    """Report not ready, so that load balancers turn away; drain for at most `drain_s`; then let vLLM stop."""
    service.leaving = True
    await asyncio.sleep(leave_s)
    service.draining = True
    give_up_s = time.monotonic() + service.config.drain_s
    while service.limits.in_flight and time.monotonic() < give_up_s:
        await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def _cards(state: Any) -> list[dict[str, Any]]:
    """The base, then each servable adapter under its name, then each version under its exact name."""
    pool: AdapterPool = state.counsel.pool
    names = pool.names
    base = {
        "id": names.base_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "counsel-stack",
        "root": names.base_name,
        "parent": None,
        "max_model_len": state.openai_serving_models.model_config.max_model_len,
    }
    versions = names.servable()
    current = [m for m in versions if names.means(m)]
    cards = [_card(base, manifest, manifest.name, pool) for manifest in current]
    return [base, *cards, *(_card(base, manifest, manifest.id, pool) for manifest in versions)]


def _card(base: dict[str, Any], manifest: Manifest, served_name: str, pool: AdapterPool) -> dict[str, Any]:
    return {
        **base,
        "id": served_name,
        "root": manifest.id,
        "parent": base["id"],
        "version": manifest.version,
        # Differs from `version` where the store's current version cannot be served here.
        "current": pool.names.published[manifest.name].current,
        "state": pool.state(manifest),
        **({"canary": _canary(pool, manifest)} if served_name == manifest.name else {}),
    }


def _canary(pool: AdapterPool, manifest: Manifest) -> dict[str, Any] | None:
    """The version that a share of the requests for this name get."""
    new, adapter = pool.names.canary_version(manifest.name), pool.names.published[manifest.name]
    return {"version": new.version, "share": adapter.canary.share} if new and adapter.canary else None


def _states(pool: AdapterPool) -> list[dict[str, Any]]:
    """Every version in the store as an admin sees it, including those that cannot be served, with the reason."""
    return [
        {
            "id": manifest.id,
            "current": adapter.current == manifest.version,
            "serves_name": pool.names.means(manifest),
            "canary": adapter.canary is not None and adapter.canary.version == manifest.version,
            "pinned": adapter.pinned,
            "state": pool.state(manifest),
            "in_flight": pool.in_flight(manifest),
            "reason": pool.names.unservable_reason(manifest),
            "rank": manifest.rank,
            "bytes": manifest.n_bytes,
            "created_utc": manifest.created_utc,
            "run": manifest.run,
        }
        for adapter in pool.names.published.values()
        for manifest in adapter.versions.values()
    ]


async def _load(watcher: StoreWatcher, name: str, path: str, load_inplace: bool) -> None:
    """vLLM's load, from the store only: `path` is a version's folder there, or its exact name."""
    pool, names = watcher.pool, watcher.names
    manifest = await _published(watcher, path)
    if name not in (manifest.name, manifest.id):
        raise ApiError(400, f"lora_name is {name!r}, but {path!r} holds {manifest.id}", param="lora_name")
    current = names.published[manifest.name].current
    if name == manifest.name and current != manifest.version:
        message = (
            f"{name!r} means {name}@{current} in the store; to load {manifest.id}, give that as lora_name, or roll "
            "back to it in the store"
        )
        raise ApiError(400, message, param="lora_name")
    names.unloaded_by_admin.discard(manifest.id)
    names.failed.pop(manifest.id, None)
    if manifest.id in pool.loaded_adapters and not load_inplace:
        raise ApiError(400, f"the lora adapter {name!r} has already been loaded", param="lora_name")
    reason = names.unservable_reason(manifest)
    if reason is not None:
        raise ApiError(400, f"{manifest.id} cannot be served: {reason}", param="lora_path")
    pool.release(await pool.acquire(manifest))
    if name == manifest.name:
        watcher.switch_to(manifest)


async def _published(watcher: StoreWatcher, path: str) -> Manifest:
    await watcher.refresh()
    for adapter in watcher.names.published.values():
        for manifest in adapter.versions.values():
            folder = adapter_store.version_dir(watcher.pool.store, manifest)
            if path == manifest.id or Path(path).resolve() == folder.resolve():
                return manifest
    raise ApiError(404, f"{path!r} is not in the store; publish the adapter first", param="lora_path")


async def _unload(watcher: StoreWatcher, name: str) -> None:
    """vLLM's unload, except that the engine really frees it, once its running requests end. It stays published."""
    manifest = await watcher.resolve(name)
    watcher.names.unloaded_by_admin.add(manifest.id)
    await watcher.pool.unload_when_idle(manifest.id)


async def _object(request: Any) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def _string(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name} is {value!r}; it must be a non-empty string", param=name)
    return value
