"""How adapters get into vLLM's engine client, and what stays there when a load fails."""

import asyncio
import dataclasses
import hashlib
import types
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve.api_errors import ApiError
from serve.engine import VllmEngine
from tests.tiny import tiny_manifest


class ServingModels:
    """What vLLM's API process knows of its models."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, object] = {}
        self.base_model_paths = [types.SimpleNamespace(name="tiny")]
        self.model_config = types.SimpleNamespace(max_model_len=32)


@pytest.mark.parametrize("read", [False, True], ids=["before it is read", "while the engine reads it"])
def test_a_version_removed_while_it_loads_is_a_404_and_a_damaged_one_a_500(tmp_path, read):
    """Removing an adapter is not a fault of the server; a damaged file is."""
    manifest = tiny_manifest("a")
    folder = tmp_path / "a" / manifest.version
    folder.mkdir(parents=True)
    digest = hashlib.sha256(b"weights").hexdigest()
    manifest = dataclasses.replace(manifest, files={"adapter_model.safetensors": {"sha256": digest, "bytes": 7}})

    class RemovingClient:
        async def add_lora(self, _request: object) -> None:
            (folder / "adapter_model.safetensors").unlink()
            if removed:
                folder.rmdir()
            raise RuntimeError("no such file")

        async def remove_lora(self, _number: int) -> None:
            pass

    async def load_error() -> ApiError:
        with pytest.raises(ApiError) as refused:
            await VllmEngine(RemovingClient(), ServingModels()).load(manifest, folder)
        return refused.value

    for removed, expected in ((False, 500), (True, 404)):
        if read:
            (folder / "adapter_model.safetensors").write_bytes(b"weights")
        elif removed:
            folder.rmdir()
        assert asyncio.run(load_error()).status == expected


class RefusingClient:
    """vLLM's client for 32 tokens of context: takes adapters, and refuses to generate."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    async def add_lora(self, request: Any) -> None:
        self.held.add(request.lora_int_id)

    async def remove_lora(self, number: int) -> None:
        self.held.discard(number)

    async def generate(self, *_: object, **__: object) -> AsyncIterator[object]:
        raise ValueError("refused")
        yield


@pytest.mark.parametrize(("n_tokens", "served"), [(31, False), (32, True), (48, True)])
def test_an_adapter_whose_trial_fails_does_not_stay_in_the_engine(tmp_path, n_tokens, served):
    """However it fails. A trial text that leaves no room in the context is skipped, and the adapter is served."""
    trial = {"tokens": [5.0] * n_tokens, "base": [-1.0] * (n_tokens - 1), "adapter": [-2.0] * (n_tokens - 1)}
    manifest = dataclasses.replace(tiny_manifest("a"), trial=trial)
    client, models = RefusingClient(), ServingModels()
    engine = VllmEngine(client, models)
    if served:
        asyncio.run(engine.load(manifest, tmp_path))
    else:
        with pytest.raises(ApiError, match="the engine refused a@000000000000: refused"):
            asyncio.run(engine.load(manifest, tmp_path))
    assert (len(client.held), list(models.lora_requests)) == ((1, [manifest.id]) if served else (0, []))


class Copies:
    """vLLM's client of several copies of a model: adds and removes an adapter in all, asks the copy it is told to.

    `lost`: copies that take an adapter and then answer as the base. `full`: copies that refuse it.
    """

    def __init__(self, n: int, lost: set[int] = frozenset(), full: set[int] = frozenset()) -> None:  # type: ignore
        self.held: list[set[int]] = [set() for _ in range(n)]
        self.asked: list[int] = []
        self.lost, self.full = lost, full

    async def add_lora(self, request: Any) -> None:
        for copy, held in enumerate(self.held):
            if copy in self.full:
                raise RuntimeError("out of memory")
            held.add(request.lora_int_id)

    async def remove_lora(self, number: int) -> None:
        for held in self.held:
            held.discard(number)

    async def generate(
        self, prompt: Any, _params: object, _request_id: str, *, lora_request: Any, data_parallel_rank: int
    ) -> AsyncIterator[object]:
        copy = data_parallel_rank
        adapted = lora_request is not None and lora_request.lora_int_id in self.held[copy] and copy not in self.lost
        if lora_request is not None:
            self.asked.append(copy)
        value = types.SimpleNamespace(logprob=-2.0 if adapted else -1.0)
        scored = [{token: value} for token in prompt["prompt_token_ids"][1:]]
        yield types.SimpleNamespace(prompt_logprobs=[None, *scored])


TRIAL = {"tokens": [5.0] * 9, "base": [-1.0] * 8, "adapter": [-2.0] * 8}


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_each_copy_of_the_model_proves_an_adapter(tmp_path, n):
    """Requests go to any copy: an adapter is served when all have proven it, and unloaded from all."""
    pytest.importorskip("vllm")
    client, models = Copies(n), ServingModels()
    engine = VllmEngine(client, models, copies=n)
    manifest = dataclasses.replace(tiny_manifest("a"), trial=TRIAL)
    asyncio.run(engine.load(manifest, tmp_path))
    assert client.asked == list(range(n))
    assert list(models.lora_requests) == [manifest.id]
    assert client.held == [{1}] * n
    asyncio.run(engine.unload(manifest))
    assert (client.held, models.lora_requests) == ([set()] * n, {})


@pytest.mark.parametrize(("n", "copy"), [(n, copy) for n in (1, 2, 3) for copy in range(n)])
@pytest.mark.parametrize("fault", ["lost", "full"])
def test_an_adapter_that_one_copy_lacks_is_in_none(tmp_path, n, copy, fault):
    """Whether that copy refuses it or answers without it: the name is not served, and no copy keeps the adapter."""
    pytest.importorskip("vllm")
    client, models = Copies(n, **{fault: {copy}}), ServingModels()
    engine = VllmEngine(client, models, copies=n)
    manifest = dataclasses.replace(tiny_manifest("a"), trial=TRIAL)
    with pytest.raises(ApiError, match="does not apply its layers" if fault == "lost" else "out of memory"):
        asyncio.run(engine.load(manifest, tmp_path))
    assert (client.held, models.lora_requests) == ([set()] * n, {})
