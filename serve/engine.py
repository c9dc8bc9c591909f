"""Loads adapters into vLLM's engine and unloads them, and proves that a loaded one changes the base's output."""

import asyncio
import contextlib
import errno
import logging
import math
import uuid
from pathlib import Path
from typing import Any, Protocol

from counsel.files import sha256_of
from counsel.store import Manifest
from counsel.trial import Trial
from serve.api_errors import ApiError

log = logging.getLogger("vllm.counsel")

# Half precision causes a hundredth of this; a base that is computed differently causes more.
MAX_DISTANCE_NATS = 0.5


class Engine(Protocol):
    """What the pool needs of vLLM. Both return when the engine is done; `load` raises ApiError when it fails."""

    async def load(self, manifest: Manifest, path: Path) -> None: ...

    async def unload(self, manifest: Manifest) -> None: ...


class VllmEngine:
    """The pool's engine, on vLLM's engine client and its table of served adapters.

    With `copies` of the model (data parallelism), vLLM's client adds and removes an adapter in every copy and fails if
    one of them does; a request then goes to any copy. So each copy has to prove the adapter.
    """

    def __init__(self, client: Any, serving_models: Any, copies: int = 1) -> None:
        self.client = client
        self.copies = copies
        self.requests = serving_models.lora_requests
        self.base_name = serving_models.base_model_paths[0].name
        self.max_model_len = serving_models.model_config.max_model_len
        self._last_number = 0
        self._proven: set[str] = set()
        self._base_logprobs: dict[tuple[float, ...], list[float]] = {}

    async def load(self, manifest: Manifest, path: Path) -> None:
        """Load a version, and serve it only once it is proven to change the base's output.

        When that fails, nothing of it stays in the engine. A trial text that exceeds the context is skipped.
        """
        from vllm.lora.request import LoRARequest

        await asyncio.to_thread(_verify, manifest, path)
        self._last_number += 1
        request = LoRARequest(manifest.id, self._last_number, str(path.resolve()), base_model_name=self.base_name)
        try:
            async with contextlib.AsyncExitStack() as undo:
                # However it fails: what stayed in the engine would not be counted, and never removed.
                undo.push_async_callback(self.client.remove_lora, request.lora_int_id)
                await self.client.add_lora(request)
                if manifest.trial and manifest.id not in self._proven:
                    await self._prove(manifest, Trial.kept(manifest.trial), request)
                undo.pop_all()
        except ApiError:
            raise
        except Exception as error:  # vLLM reports every failure in the engine as a bare Exception
            _refuse_if_gone(manifest, path)
            raise ApiError(500, f"the engine refused {manifest.id}: {error}") from error
        self.requests[manifest.id] = request

    async def unload(self, manifest: Manifest) -> None:
        request = self.requests.pop(manifest.id)
        await self.client.remove_lora(request.lora_int_id)

    async def _prove(self, manifest: Manifest, trial: Trial, request: Any) -> None:
        tokens = tuple(trial.tokens)
        # The engine needs room for one token after them.
        if len(tokens) >= self.max_model_len:
            log.warning("%s is served without a trial: its trial text has %d tokens, which leave no room for an "
                        "answer in --max-model-len %d", manifest.id, len(tokens), self.max_model_len)  # fmt: skip
            return
        if tokens not in self._base_logprobs:
            self._base_logprobs[tokens] = await self._log_probabilities(trial.tokens, None, 0)
            distance = math.dist(self._base_logprobs[tokens], trial.base) / math.sqrt(len(trial.base))
            if distance > MAX_DISTANCE_NATS:
                log.warning("this server's base differs from transformers' by %.2f nats per token of the trial text: "
                            "the trial proves nothing about adapters on it", distance)  # fmt: skip
        for copy in range(self.copies):
            adapted = await self._log_probabilities(trial.tokens, request, copy)
            if not trial.applied(self._base_logprobs[tokens], adapted):
                raise ApiError(
                    500, f"{manifest.id} does not answer as it was trained to: this server does not apply its layers"
                )
        self._proven.add(manifest.id)

    async def _log_probabilities(self, tokens: list[int], request: Any, copy: int) -> list[float]:
        """The log-probability of each token but the first, from one copy of the model, with an adapter or without."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = TokensPrompt(prompt_token_ids=tokens)
        request_id = f"trial-{uuid.uuid4().hex}"
        named = {"lora_request": request, "data_parallel_rank": copy}
        async for output in self.client.generate(prompt, params, request_id, **named):
            logprobs = output.prompt_logprobs
        return [entry[token].logprob for entry, token in zip(logprobs[1:], tokens[1:], strict=True)]


def _verify(manifest: Manifest, path: Path) -> None:
    """Refuse files that differ from those that were checked when the version was published."""
    for name, file in manifest.files.items():
        try:
            digest = sha256_of(path / name)
        except OSError as error:
            _refuse_if_gone(manifest, path)
            if error.errno == errno.ESTALE:
                # A network file system lost track of the open file; the next attempt opens it anew.
                raise ApiError(503, f"{manifest.id}: {name}: {error.strerror}; try again", retry_after_s=1) from error
            raise ApiError(500, f"{manifest.id} is incomplete: {name}: {error.strerror}; publish it again") from error
        if digest != file["sha256"]:
            raise ApiError(500, f"{manifest.id}: {name} changed after it was published; publish it again")


def _refuse_if_gone(manifest: Manifest, path: Path) -> None:
    if not path.is_dir():
        message = f"the model {manifest.id!r} no longer exists: it was removed a moment ago"
        raise ApiError(404, message, param="model", code="model_not_found")
