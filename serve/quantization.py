"""Which quantized bases vLLM serves with adapters on an NVIDIA GPU, and which it would refuse minutes later.

A base is quantized in its files (`quantization_config` in config.json), or while it is loaded (`--quantization`). vLLM
adds an adapter's product to the output of the quantized layer, so the pairs below need no support of their own; what
decides is whether vLLM reads the format, and whether it has a kernel for the card.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from counsel.errors import UserError

Capability = tuple[int, int]


class Format(NamedTuple):
    """One way in which weights are stored: bits per number with scales, and the cards that vLLM has kernels for.

    full_speed: from this capability on the card multiplies the format itself; below, weights are widened first.
    """

    name: str
    bits: float
    lowest: Capability
    full_speed: Capability


_FP8 = Format("FP8", 8, (7, 5), (8, 9))
_AWQ = Format("AWQ", 4.25, (7, 5), (7, 5))
_GPTQ = Format("GPTQ", 4.25, (7, 5), (7, 5))
_INT8 = Format("INT8", 8.1, (7, 5), (7, 5))
_NVFP4 = Format("NVFP4", 4.5, (7, 5), (10, 0))
_MXFP8 = Format("MXFP8", 8.25, (8, 0), (10, 0))
_INT4 = Format("packed integers", 4.25, (7, 5), (7, 5))

# `--quantization`: quantized while it is loaded.
ON_LOAD: Mapping[str, Format] = {
    "fp8": _FP8,
    "fp8_per_tensor": _FP8,
    "fp8_per_channel": _FP8,
    "fp8_per_block": _FP8,
    "int8_per_channel_weight_only": _INT8,
}
# `quant_method` in config.json.
_METHODS: Mapping[str, Format] = {"fp8": _FP8, "awq": _AWQ, "gptq": _GPTQ}
# `quant_algo` of ModelOpt, `format` of compressed-tensors: methods that hold several formats.
_MODELOPT: Mapping[str, Format] = {"FP8": _FP8._replace(lowest=(8, 0)), "NVFP4": _NVFP4, "MXFP8": _MXFP8}
_COMPRESSED: Mapping[str, Format] = {
    "float-quantized": _FP8,
    "naive-quantized": _FP8,
    "nvfp4-pack-quantized": _NVFP4,
    "int-quantized": _INT8,
    "pack-quantized": _INT4,
}
# Why vLLM serves them not at all, or not with adapters.
_REFUSED = {
    "bitsandbytes": "vLLM dropped bitsandbytes: serve the unquantized base, with --quantization fp8 to halve it",
    "gguf": "vLLM dropped GGUF: serve the safetensors of the base",
    "fbgemm_fp8": "vLLM has deprecated fbgemm_fp8: serve an FP8 base of another kind",
    "fp_quant": "vLLM has deprecated fp_quant: serve an NVFP4 base of another kind",
}


def stored_format(config: Mapping[str, Any]) -> Format | None:
    """The format of a base's files, from its config.json; None if they are not quantized.

    Raises UserError for one that vLLM does not serve with adapters, or that was never looked at.
    """
    quantized = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not quantized:
        return None
    method = str(quantized.get("quant_method", "")).lower()
    if method in _REFUSED:
        raise UserError(f"the base is quantized with {method}; {_REFUSED[method]}")
    if method.startswith("modelopt"):
        kind, table = str(quantized.get("quant_algo", "")).upper(), _MODELOPT
    elif method == "compressed-tensors":
        kind, table = str(quantized.get("format", "")), _COMPRESSED
    else:
        kind, table = method, _METHODS
    if kind not in table:
        known = ", ".join([*_METHODS, *(f"modelopt {name}" for name in _MODELOPT), *_COMPRESSED])
        raise UserError(
            f"the base is quantized as {method} {kind}".rstrip()
            + f", which was not checked with adapters; checked: {known}; "
            "serve the unquantized base"
        )
    found = table[kind]
    bits = quantized.get("bits") or quantized.get("w_bit")
    return found._replace(bits=bits + 0.25) if found.bits < 8 and isinstance(bits, int) else found


def served_format(wanted: str | None, config: Mapping[str, Any], capability: Capability) -> Format | None:
    """The format that a base is served in; None if not quantized. Raises UserError for what this card cannot serve.

    wanted: `--quantization`.
    """
    stored = stored_format(config)
    if wanted is not None and stored is not None:
        raise UserError(f"quantization is {wanted}, but the base's own files are {stored.name}; leave it out")
    served = stored if wanted is None else ON_LOAD[wanted]
    if served is None:
        return None
    experts = config.get("text_config", config)
    if any(experts.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise UserError(
            f"the base is a mixture of experts in {served.name}; with adapters only unquantized ones were checked"
        )
    if capability < served.lowest:
        raise UserError(
            f"{served.name} needs a GPU of compute capability {_dotted(served.lowest)} or higher, "
            f"this one has {_dotted(capability)}; serve the unquantized base"
        )
    return served


def why(served: Format, capability: Capability) -> str:
    """What the format means on this card, as the launch plan says it."""
    if capability >= served.full_speed:
        return f"{served.name}, with vLLM's kernels for it; adapters are added to its output in 16 bits"
    return (
        f"{served.name} saves memory only: compute capability {_dotted(capability)} does not multiply it "
        f"({_dotted(served.full_speed)} does), so weights are widened to 16 bits in the kernel"
    )


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
