"""A base's copy in 8-bit integers for a CPU: made once, kept in the cache, in files that vLLM reads by itself.

The linear layers' weights get one scale per output (symmetric, rounded to the nearest); vLLM scales each token's
activations while it computes, so no text is needed to calibrate. Embeddings, the vocabulary's projection, norms and
biases stay as they are, and adapters are computed in 16 bits on the unquantized activations. The files follow
compressed-tensors' `int-quantized` format.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from counsel.cache import cache_dir
from counsel.catalog import Base, weight_files
from counsel.errors import UserError
from counsel.files import locked, new_directory, read_json, write_json
from counsel.fingerprint import fingerprint

INT8 = "int8"
# Kinds of model whose answers on int8 were compared with a reference, with adapters.
CHECKED = ("gemma2", "gemma3_text", "llama")
# A change of the arithmetic below gets a new number, so that old copies are not used.
_VERSION = 1
_SOURCE = "quantized.json"
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LARGEST = 127


def int8_folder(base: Base) -> Path:
    """Where the copy of `base` is, or will be. Raises UserError for a base that is not served in int8."""
    config = read_json(base.path / "config.json")
    if "quantization_config" in config:
        raise UserError("quantization is int8, but the base's own files are quantized; leave it out")
    if config.get("model_type") not in CHECKED:
        raise UserError(
            f"quantization is int8, which was not checked on {config.get('model_type')!r} models; "
            f"checked: {', '.join(CHECKED)}; leave it out"
        )
    return cache_dir() / "models" / f"{base.name}-int8-v{_VERSION}-{fingerprint(base.path)[:12]}"


def make_int8(base: Base) -> None:
    """Make the copy of `base` if it is not there. Raises UserError when it cannot be made or written."""
    target = int8_folder(base)
    # As with other bases: one that is there must not wait for the lock.
    if target.is_dir():
        return
    with locked(target.parent):
        if target.is_dir():
            return
        print(f"quantizing {base.name} to int8, once", file=sys.stderr, flush=True)
        try:
            with new_directory(target) as folder:
                _write(base, folder)
        except SafetensorError as error:
            raise UserError(
                f"cannot quantize {str(base.path)!r}: {error}; free some space, or download the base again"
            ) from error


def source_fingerprint(folder: Path) -> str:
    """The fingerprint of the base that `folder` was quantized from, which its adapters name; else its own."""
    source = folder / _SOURCE
    return str(read_json(source)["fingerprint"]) if source.is_file() else fingerprint(folder)


def _write(base: Base, folder: Path) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    layers = total = 0
    for file in weight_files(base.path):
        tensors = dict(_quantized(file))
        layers += sum(name.endswith(".weight_scale") for name in tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file.name)
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    if not layers:
        raise UserError(f"{str(base.path)!r} has none of the layers {', '.join(_LAYERS)}; serve it unquantized")
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    config = read_json(base.path / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": _scheme()})
    for file in base.path.iterdir():
        # Copies, because a hub's snapshot holds links to files that may go. The old index has no scales.
        small = file.suffix in (".json", ".jinja", ".model") and not file.name.endswith(".index.json")
        if small and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    write_json(folder / _SOURCE, {"base": base.name, "fingerprint": fingerprint(base.path), "version": _VERSION})


def _quantized(file: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a weight file, with int8 weights and their scales (outputs, 1) in place of linear layers'."""
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            layer, _, kind = name.rpartition(".")
            if kind != "weight" or tensor.dim() != 2 or layer.rpartition(".")[2] not in _LAYERS:
                yield name, tensor
                continue
            wide = tensor.float()
            if not torch.isfinite(wide).all():
                raise UserError(f"{str(file)!r}: {name} holds numbers that are not finite; download the base again")
            scale = wide.abs().amax(dim=1, keepdim=True) / _LARGEST
            # A row of zeros stays zeros at any scale.
            scale[scale == 0] = 1.0
            yield name, torch.round(wide / scale).clamp(-_LARGEST, _LARGEST).to(torch.int8)
            yield f"{layer}.weight_scale", scale


def _scheme() -> dict[str, Any]:
    """config.json's `quantization_config`: int8 weights per output, int8 activations per token."""
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
