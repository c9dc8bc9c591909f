"""A base's size as its config.json tells it: bytes of weights, of an adapter's slot, of one token's keys and values.

Estimates for a launch plan, before anything is downloaded or loaded. Each is for one of the GPUs that share a copy of
the model (`tensor_parallel`). Counted for decoders with gated feed-forward layers, as Llama, Gemma, Qwen and Mistral
have them; others come out too large rather than too small.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.catalog import weight_files
from counsel.files import read_json

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Of layers that keep a state instead of keys and values per token.
_RECURRENT_KEYS = ("linear_num_key_heads", "mamba_d_state", "mamba_n_heads", "ssm_state_size", "conv_L_cache")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what fits on a GPU.

    weight_bits: bits per number of the linear layers, scales included; the vocabulary has 16. file_bytes: size of the
    weight files; None while they are not here. latent: numbers per token and layer of latent attention; 0 without.
    """

    model_type: str
    stored_dtype: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    max_position: int | None
    tied: bool
    experts: int
    latent: int
    recurrent: bool
    weight_bits: float
    file_bytes: int | None

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return self._linear + self._vocabulary

    def weight_bytes(self, tensor_parallel: int = 1) -> int:
        """Bytes of the weights on one GPU."""
        counted = self._linear * self.weight_bits / 8 + self._vocabulary * 2
        return int((self.file_bytes or counted) / tensor_parallel)

    def kv_bytes(self, itemsize: int = 2, tensor_parallel: int = 1) -> int:
        """Bytes of one token's keys and values on one GPU; at most, where some layers see only a window."""
        if self.latent:
            return itemsize * self.layers * self.latent
        # With more GPUs than heads of keys, several hold the same head.
        return 2 * itemsize * self.layers * max(1, self.kv_heads // tensor_parallel) * self.head_size

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of one adapter of `rank` on every linear layer, in a 16-bit format, as host memory keeps it."""
        return 2 * rank * self.layers * sum(n * (inner + outer) for n, inner, outer in self._adapted)

    def slot_bytes(self, rank: int, tensor_parallel: int = 1) -> int:
        """Bytes of one adapter slot on one GPU: vLLM splits one of an adapter's two matrices, and copies the other."""
        split, copied = 0, 0
        for n, inner, outer in self._adapted:
            by_columns = outer != self.hidden
            split += n * (outer if by_columns else inner)
            copied += n * (inner if by_columns else outer)
        return 2 * rank * self.layers * (split // tensor_parallel + copied)

    def refusal(self, tensor_parallel: int) -> str:
        """Why this model cannot be split over so many GPUs; empty if it can."""
        if self.heads % tensor_parallel:
            return f"its {self.heads} attention heads do not divide by {tensor_parallel}"
        if self.kv_heads % tensor_parallel and tensor_parallel % self.kv_heads:
            return f"its {self.kv_heads} key-value heads and {tensor_parallel} GPUs do not divide"
        if self.intermediate % tensor_parallel:
            return f"its feed-forward size {self.intermediate} does not divide by {tensor_parallel}"
        return ""

    @property
    def linear(self) -> int:
        """The number of weights in the linear layers."""
        return self.layers * sum(n * inner * outer for n, inner, outer in self.matrices)

    @property
    def multiplied(self) -> int:
        """The number of weights that a decode step reads and multiplies: with the vocabulary's projection."""
        return self.linear + self.vocabulary * self.hidden

    @property
    def matrices(self) -> list[tuple[int, int, int]]:
        """Each linear matrix of one layer: how many, numbers in, numbers out."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return [
            (1, self.hidden, queries),
            (2, self.hidden, keys),
            (1, queries, self.hidden),
            (2 * max(1, self.experts), self.hidden, self.intermediate),
            (max(1, self.experts), self.intermediate, self.hidden),
        ]

    @property
    def _adapted(self) -> list[tuple[int, int, int]]:
        """The matrices that adapters may change: not those of experts (counsel.lora_layers)."""
        return self.matrices[: 3 if self.experts else None]

    @property
    def _linear(self) -> int:
        return self.linear + self.layers * 2 * self.hidden

    @property
    def _vocabulary(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def read_shape(folder: Path, weight_bits: float = 16) -> ModelShape | None:
    """The shape of the base in `folder`; None if its config.json has not the usual names for its sizes."""
    config = read_json(folder / "config.json")
    text: Mapping[str, Any] = config.get("text_config", config)
    if any(not isinstance(text.get(key), int) for key in _NEEDED):
        return None
    heads = text["num_attention_heads"]
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0
    intermediate = text.get("moe_intermediate_size") if experts else None
    stored = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return ModelShape(
        model_type=config.get("model_type", ""),
        stored_dtype=str(stored or "float32"),
        hidden=text["hidden_size"],
        intermediate=intermediate or text.get("intermediate_size") or 4 * text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=text["vocab_size"],
        max_position=text.get("max_position_embeddings"),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", _ties_by_default(config)))),
        experts=experts,
        latent=(text.get("kv_lora_rank") or 0) + (text.get("qk_rope_head_dim") or 0 if text.get("kv_lora_rank") else 0),
        recurrent=any(text.get(key) for key in _RECURRENT_KEYS),
        weight_bits=weight_bits,
        file_bytes=_file_bytes(folder, str(stored), weight_bits),
    )


def _ties_by_default(config: Mapping[str, Any]) -> bool:
    """config.json leaves out what is transformers' default for its kind of model."""
    return str(config.get("model_type", "")).startswith("gemma")


def _file_bytes(folder: Path, stored: str, weight_bits: float) -> int | None:
    """What the weight files take once loaded; None if they are not here, or are quantized while they are loaded."""
    if (total := sum(file.stat().st_size for file in weight_files(folder))) == 0:
        index = folder / "model.safetensors.index.json"
        total = read_json(index).get("metadata", {}).get("total_size", 0) if index.is_file() else 0
    quantized_on_load = weight_bits < 16 and "quantization_config" not in read_json(folder / "config.json")
    if not total or quantized_on_load:
        return None
    return int(total) // 2 if stored == "float32" else int(total)
