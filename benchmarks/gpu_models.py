"""What the GPU proof serves and trains: random weights of real shapes, made on the spot, so that nothing is carried.

Their answers are noise. They show that two ways to compute agree, and what it costs; never that a model is good.
"""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.serving import random_adapters
from counsel import store as adapter_store
from counsel.catalog import Base, resolve
from tests.tiny import tiny_tokenizer

RANK = 16
# a0 to a7 are in the store from the start; the rest come while the server runs.
SERVED, HOT, LATER = 8, "a8", ("a9", "a10")

# The shapes of Llama 3.2 1B and of Gemma 2 2B, from their config.json.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": False},
    ),
    "gemma2-2b": (
        "gemma2",
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "query_pre_attn_scalar": 256},
    ),
}  # fmt: skip
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512}  # fmt: skip


def make_base(name: str, folder: Path, tiny: bool) -> Path:
    """Save a random bfloat16 model of a shape of SHAPES, or a tiny one of that architecture; return its folder."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    architecture, shape = SHAPES[name]
    tokenizer = tiny_tokenizer()
    config = {"llama": LlamaConfig, "gemma2": Gemma2Config}[architecture](
        **(shape | TINY if tiny else shape),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1 if tiny else 0.02,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # The tokenizer knows fewer tokens than the vocabulary has. Without weights, the others are never the likeliest.
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :].zero_()
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_models(work: Path, tiny: bool) -> dict[str, Any]:
    """Make both bases and the adapters."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name in SHAPES:
        make_base(name, work, tiny)
    base = served_base(work)
    random_adapters(base, work / "adapters", RANK)
    n_bytes = sum(file.stat().st_size for name in SHAPES for file in (work / name).glob("*.safetensors"))
    return {"ok": None, "bases": list(SHAPES), "weights_bytes": n_bytes, "adapters": SERVED, "rank": RANK}


def fill_store(work: Path) -> None:
    """Make the store anew, with the adapters that are served from the start."""
    shutil.rmtree(store_of(work), ignore_errors=True)
    for n in range(SERVED):
        publish(work, f"a{n}", f"a{n}")


def served_base(work: Path) -> Base:
    return resolve(str(work / "llama-1b"))


def store_of(work: Path) -> Path:
    return work / "store"


def adapter_folder(work: Path, weights: str) -> Path:
    """The folder of one of the adapters a0, a1, ... that `make_models` made."""
    return work / "adapters" / f"r{RANK}-{weights.removeprefix('a')}"


def publish(work: Path, name: str, weights: str) -> str:
    """Publish adapter `weights` under `name`; return the exact version."""
    return adapter_store.publish(store_of(work), name, adapter_folder(work, weights), served_base(work)).id
