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
