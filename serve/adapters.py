"""vLLM endpoint plugin: gives the plane an engine, and answers the routes about models and adapters.

vLLM's runtime LoRA updating stays off, and with it `/adapters`, the resolvers and any path a caller might name. Its
`/v1/load_lora_adapter` and `/v1/unload_lora_adapter` are answered here in its own request and response shapes, but
reach only what the store holds. The gateway lets admins alone through to them.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from serve import config as configs
from serve import grammars, tally, turns, validation
from serve.gateway import TARGET, Service
from serve.journal import Journal
from serve.keys import KeyRing
from serve.limits import Limits
from serve.meters import Meters
from serve.openai_errors import Refusal
from serve.plane import Plane
from serve.presence import Presence, announce
from train import store as shelves
from train.fingerprint import fingerprint
from train.store import Manifest
from train.trial import Trial

log = logging.getLogger("vllm.counsel")

# Half precision differs by a hundredth of it; a base that is computed otherwise by more.
APART_NATS = 0.5


class AdaptersPlugin:
    """What `vllm.endpoint_plugins` names as `counsel_adapters`."""

    name = "counsel_adapters"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Put our routes over vLLM's of the same path."""
        from fastapi import Request
        from fastapi.responses import JSONResponse, PlainTextResponse
        from vllm.entrypoints.serve.exception_handling import register

        # vLLM gives its handlers to the app after this, and it has no setting for them.
        register.validation_exception_handler = validation.refuse

        @app.get("/v1/models")
        async def list_models(request: Request) -> JSONResponse:
            return JSONResponse({"object": "list", "data": _cards(request.app.state)})

        @app.get("/v1/models/{model:path}")
        async def show_model(model: str, request: Request) -> JSONResponse:
            service: Service = request.app.state.counsel
            wanted = model if model == service.plane.base_name else (await service.plane.resolve(model)).id
            cards = {card["id"]: card for card in _cards(request.app.state)}
            return JSONResponse(cards.get(model) or cards[wanted])

        @app.get("/v1/adapters")
        async def list_adapters(request: Request) -> JSONResponse:
            return JSONResponse({"object": "list", "data": _states(request.app.state.counsel.plane)})

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> PlainTextResponse:
            body = await _object(request)
            name, path = _text(body, "lora_name"), _text(body, "lora_path")
            request.scope[TARGET] = f"{name} from {path}"
            plane: Plane = request.app.state.counsel.plane
            await _load(plane, name, path, bool(body.get("load_inplace")))
            return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request) -> PlainTextResponse:
            name = request.scope[TARGET] = _text(await _object(request), "lora_name")
            plane: Plane = request.app.state.counsel.plane
            await _unload(plane, name)
            return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Load the store's adapters, then follow the store; the server opens its port only after this."""
        config = configs.from_environment()
        grammars.guard(engine_client, grammars.for_model(engine_client))
        tally.watch(engine_client)
        _drop_lora_series(engine_client)
        meters = Meters()
        # The model's weight files do not change while it is served: one reading, off the event loop.
        base_fingerprint = await asyncio.to_thread(fingerprint, Path(args.model))
        plane = Plane(
            engine=VllmEngine(engine_client, state.openai_serving_models),
            store=Path(config.store),
            base_name=state.openai_serving_models.base_model_paths[0].name,
            presence=Presence(f"http://{config.host}:{config.port}", base_fingerprint, config.max_rank),
            capacity=config.host_adapters,
            on_event=meters.adapter_event,
        )
        keys = KeyRing(Path(config.keys) if config.keys else None)
        state.counsel = Service(
            config=config,
            plane=plane,
            keys=keys,
            limits=Limits(config.key_running, config.key_queued, config.queued),
            meters=meters,
            journal=Journal(config.log_dir),
            template=await asyncio.to_thread(turns.template_in, Path(args.model), args.chat_template),
            context_tokens=state.openai_serving_models.model_config.max_model_len,
        )
        # Kept on the state: who looks finds it until this process ends.
        state.counsel_presence = announce(plane.store, plane.presence)
        await plane.start()
        # Kept on the state: the event loop itself holds tasks only weakly.
        state.counsel_watch = asyncio.create_task(plane.watch())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, _start_stopping, state, config.leave_s)
        loop.add_signal_handler(signal.SIGUSR2, _start_stopping, state, 0.0)
        log.info("serving %s and %d adapters", plane.base_name, len(plane.residents))


def _drop_lora_series(engine_client: Any) -> None:
    """Leave out `vllm:lora_requests_info`: it gets a series for each set and order of adapters that ran together."""
    manager = engine_client.logger_manager
    for logger in manager.stat_loggers if manager else ():
        if getattr(logger, "gauge_lora_info", None) is not None:
            REGISTRY.unregister(logger.gauge_lora_info)
            logger.gauge_lora_info = None


def _start_stopping(state: Any, leave_s: float) -> None:
    state.counsel_stop = asyncio.create_task(_stop(state.counsel, leave_s))


async def _stop(service: Service, leave_s: float) -> None:
    """Leave, so that balancers look elsewhere; then wait for what runs, within the bound; then let vLLM stop."""
    service.leaving = True
    await asyncio.sleep(leave_s)
    service.draining = True
    give_up_s = time.monotonic() + service.config.drain_s
    while service.limits.in_flight and time.monotonic() < give_up_s:
        await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


class VllmEngine:
    """The plane's Engine, on vLLM's engine client and its table of served adapters."""

    def __init__(self, client: Any, serving_models: Any) -> None:
        self.client = client
        self.requests = serving_models.lora_requests
        self.base_name = serving_models.base_model_paths[0].name
        self.context_tokens = serving_models.model_config.max_model_len
        self._last_number = 0
        self._proven: set[str] = set()
        self._base_shows: dict[tuple[float, ...], list[float]] = {}

    async def load(self, manifest: Manifest, path: Path) -> None:
        """Load it, and let nobody ask it before it was seen to change what the base says.

        Where it fails, nothing of it stays in the engine. A trial text beyond the context is not tried.
        """
        from vllm.lora.request import LoRARequest

        await asyncio.to_thread(_verify, manifest, path)
        self._last_number += 1
        request = LoRARequest(manifest.id, self._last_number, str(path.resolve()), base_model_name=self.base_name)
        try:
            async with contextlib.AsyncExitStack() as undo:
                # However it fails: what stays in the engine is not counted, and nobody would remove it.
                undo.push_async_callback(self.client.remove_lora, request.lora_int_id)
                await self.client.add_lora(request)
                if manifest.trial and manifest.id not in self._proven:
                    await self._prove(manifest, Trial.kept(manifest.trial), request)
                undo.pop_all()
        except Refusal:
            raise
        except Exception as error:  # vLLM reports whatever went wrong in the engine as a bare Exception
            _refuse_if_gone(manifest, path)
            raise Refusal(500, f"the engine refused {manifest.id}: {error}") from error
        self.requests[manifest.id] = request

    async def unload(self, manifest: Manifest) -> None:
        request = self.requests.pop(manifest.id)
        await self.client.remove_lora(request.lora_int_id)

    async def _prove(self, manifest: Manifest, trial: Trial, request: Any) -> None:
        tokens = tuple(trial.tokens)
        # The engine gives a token after them.
        if len(tokens) >= self.context_tokens:
            log.warning("%s is served untried: its trial text has %d tokens, which leaves no room for an answer "
                        "in --context-tokens %d", manifest.id, len(tokens), self.context_tokens)  # fmt: skip
            return
        if tokens not in self._base_shows:
            self._base_shows[tokens] = await self._log_probabilities(trial.tokens, None)
            apart = math.dist(self._base_shows[tokens], trial.base) / math.sqrt(len(trial.base))
            if apart > APART_NATS:
                log.warning("the base reads the trial text %.2f nats a token apart from transformers' own: "
                            "nothing can be said of adapters on it", apart)  # fmt: skip
        shown = await self._log_probabilities(trial.tokens, request)
        if not trial.applied(self._base_shows[tokens], shown):
            raise Refusal(500, f"{manifest.id} does not answer as it was trained to: this server leaves out its layers")
        self._proven.add(manifest.id)

    async def _log_probabilities(self, tokens: list[int], request: Any) -> list[float]:
        """The log-probability of each token but the first, as the engine gives it with an adapter or without."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = TokensPrompt(prompt_token_ids=tokens)
        number = f"trial-{uuid.uuid4().hex}"
        async for output in self.client.generate(prompt, params, number, lora_request=request):
            found = output.prompt_logprobs
        return [entry[token].logprob for entry, token in zip(found[1:], tokens[1:], strict=True)]


def _verify(manifest: Manifest, path: Path) -> None:
    """Refuse files that are not those that were checked when the version was published."""
    for name, file in manifest.files.items():
        try:
            found = shelves.sha256_of(path / name)
        except OSError as error:
            _refuse_if_gone(manifest, path)
            raise Refusal(500, f"{manifest.id} is not whole: {name}: {error.strerror}; publish it again") from error
        if found != file["sha256"]:
            raise Refusal(500, f"{manifest.id}: {name} changed after it was published; publish it again")


def _refuse_if_gone(manifest: Manifest, path: Path) -> None:
    if not path.is_dir():
        message = f"the model {manifest.id!r} does not exist any more: it was removed a moment ago"
        raise Refusal(404, message, param="model", code="model_not_found")


def _cards(state: Any) -> list[dict[str, Any]]:
    """The base, then each servable adapter under its name, then each version under its exact name."""
    plane: Plane = state.counsel.plane
    base = {
        "id": plane.base_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "counsel-stack",
        "root": plane.base_name,
        "parent": None,
        "max_model_len": state.openai_serving_models.model_config.max_model_len,
    }
    versions = plane.servable()
    current = [m for m in versions if plane.means(m)]
    cards = [_card(base, manifest, manifest.name, plane) for manifest in current]
    return [base, *cards, *(_card(base, manifest, manifest.id, plane) for manifest in versions)]


def _card(base: dict[str, Any], manifest: Manifest, served_name: str, plane: Plane) -> dict[str, Any]:
    return {
        **base,
        "id": served_name,
        "root": manifest.id,
        "parent": base["id"],
        "version": manifest.version,
        # Another than the version where the current one cannot be served here.
        "current": plane.shelves[manifest.name].current,
        "state": plane.state(manifest),
    }


def _states(plane: Plane) -> list[dict[str, Any]]:
    """Every version in the store as an admin sees it, those that cannot be served included, with the reason."""
    return [
        {
            "id": manifest.id,
            "current": shelf.current == manifest.version,
            "meant_by_name": plane.means(manifest),
            "pinned": shelf.pinned,
            "state": plane.state(manifest),
            "in_flight": plane.in_flight(manifest),
            "reason": plane.why_not(manifest),
            "rank": manifest.rank,
            "bytes": manifest.n_bytes,
            "created_utc": manifest.created_utc,
            "run": manifest.run,
        }
        for shelf in plane.shelves.values()
        for manifest in shelf.versions.values()
    ]


async def _load(plane: Plane, name: str, path: str, load_inplace: bool) -> None:
    """vLLM's load, from the store only: `path` is a version's folder there, or its exact name."""
    manifest = await _published(plane, path)
    if name not in (manifest.name, manifest.id):
        raise Refusal(400, f"lora_name is {name!r}, but {path!r} holds {manifest.id}", param="lora_name")
    current = plane.shelves[manifest.name].current
    if name == manifest.name and current != manifest.version:
        message = f"{name!r} means {name}@{current} in the store: roll back to {manifest.id} there, or load it as such"
        raise Refusal(400, message, param="lora_name")
    plane.withdrawn.discard(manifest.id)
    plane.failed.pop(manifest.id, None)
    if manifest.id in plane.residents and not load_inplace:
        raise Refusal(400, f"the lora adapter {name!r} has already been loaded", param="lora_name")
    reason = plane.why_not(manifest)
    if reason is not None:
        raise Refusal(400, f"{manifest.id} cannot be served: {reason}", param="lora_path")
    plane.release(await plane.acquire(manifest))
    if name == manifest.name:
        plane.turn(manifest)


async def _published(plane: Plane, path: str) -> Manifest:
    await plane.refresh()
    for shelf in plane.shelves.values():
        for manifest in shelf.versions.values():
            if path == manifest.id or Path(path).resolve() == shelves.version_dir(plane.store, manifest).resolve():
                return manifest
    raise Refusal(404, f"{path!r} is not in the store; publish the adapter first", param="lora_path")


async def _unload(plane: Plane, name: str) -> None:
    """vLLM's unload, and truly: running requests end, then the engine frees it. It stays published."""
    manifest = await plane.resolve(name)
    plane.withdrawn.add(manifest.id)
    await plane.retire(manifest.id)


async def _object(request: Any) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    return body


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise Refusal(400, f"{name} is {value!r}; it must be a text that is not empty", param=name)
    return value
