"""The estimate of training's memory: against numbers by hand, and for every recipe that names a card."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from counsel.cli import load_config
from train.hardware import TrainHardware, choose_precision
from train.lora import adapted_layers
from train.memory import MemoryEstimate, estimate_memory
from train.recipe import RECIPES, Recipe

# From the config.json of each base on the hub. Gemma2Config() is the 2B model.
QWEN3: dict[str, Any] = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                         "vocab_size": 151936}  # fmt: skip
BASES = {
    "gemma2-2b": Gemma2Config(),
    "gemma2-9b": Gemma2Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                              num_key_value_heads=8),
    "llama31-8b": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                              num_key_value_heads=8, vocab_size=128256),
    "qwen3-4b": Qwen3Config(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True, **QWEN3),
    "qwen3-8b": Qwen3Config(hidden_size=4096, intermediate_size=12288, **QWEN3),
}  # fmt: skip
CARDS = sorted(path.stem for path in RECIPES.glob("*gb.yaml"))


def estimated(recipe: Recipe, base: str, gb: int = 80, flash: bool = False) -> MemoryEstimate:
    config = BASES[base]
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    precision = choose_precision(recipe, TrainHardware("cuda", "a card", True, gb << 30, flash_attention=flash))
    return estimate_memory(recipe, precision, 2 * parameters, config, adapted_layers(recipe, config), 4096)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_leaves_a_quarter_of_its_card_free(name, flash):
    """With FlashAttention and without: the estimate is rough, and fragments and the display need some."""
    base, _, card = name.rpartition("-")
    gb = int(card.removesuffix("gb"))

    assert estimated(load_config(Recipe, str(RECIPES / f"{name}.yaml"), {}), base, gb, flash).total <= 0.75 * (gb << 30)


def test_each_card_has_a_recipe():
    assert {card.rpartition("-")[2] for card in CARDS} == {"12gb", "24gb", "48gb", "80gb"}


def test_llama_in_16_bits_by_hand():
    """8,030,261,248 parameters; an adapter of rank 16 has 32 layers x 16 x 81,920 of inputs and outputs."""
    found = estimated(Recipe(batch_size=2, max_length=1000), "llama31-8b")

    assert found.trainable == 32 * 16 * 81_920 == 41_943_040
    assert found.weights == 16_060_522_496
    assert found.optimizer == 671_088_640  # 16 bytes each: weight, gradient, two moments
    assert found.activations == 34 * 2 * 1000 * 4096 * 2 * 32 == 17_825_792_000
    assert found.total == sum(found[:4])


def test_llama_in_4_bits_checkpointed_by_hand():
    """Embedding and head (2 x 525,336,576) stay in 16 bits; 8-bit moments; one layer is computed again at a time."""
    changes = {"load_in_4bit": True, "optim": "paged_adamw_8bit", "gradient_checkpointing": True}
    found = estimated(Recipe(batch_size=2, max_length=1000, **changes), "llama31-8b")

    embeddings = 2 * 2 * 525_336_576
    # 13,959,176,192 bytes x 4.127 / 16 bits
    assert found.weights == 3_600_595_009 + embeddings
    assert found.optimizer == 41_943_040 * 10
    assert found.activations == 2 * 2 * 1000 * 4096 * 2 * 32 + 34 * 2 * 1000 * 4096 * 2


def test_eager_attention_keeps_its_scores_and_flash_attention_does_not():
    """Gemma 2 2B, 8 heads: 8 bytes for each of 1,000 x 1,000 scores, in every layer, or in one with checkpointing."""
    flash = {"attn_implementation": "flash_attention_2", "batch_size": 1, "max_length": 1000}
    for checkpointing, layers in ((False, 26), (True, 1)):
        recipe = Recipe(**flash, gradient_checkpointing=checkpointing)
        without, with_it = (estimated(recipe, "gemma2-2b", flash=found) for found in (False, True))
        assert without.activations - with_it.activations == 8 * 8 * 1000 * 1000 * layers


def test_packed_sequences_are_full():
    """Whatever the longest row: here shorter than max_length."""
    packed = Recipe(attn_implementation="flash_attention_2", packing=True, batch_size=1, max_length=8192)

    whole, padded = (estimated(packed, "llama31-8b", flash=flash).activations for flash in (True, False))
    assert whole == 2 * padded
