"""How much memory a training needs at its peak, estimated from shapes before anything is loaded.

Never compared with a GPU's own count so far; `make gpu-proof` puts both next to each other.
"""

from typing import Any, NamedTuple

from train.hardware import Precision, attention_for
from train.lora import LayerSizes, count_parameters
from train.recipe import Recipe

# NF4 with double quantization: 4 bits and a share of its scales, 0.127 bits, in place of 16.
NF4_SHARE = 4.127 / 16
# Kept per layer for the backward pass, in rows of the model's width; with checkpointing, all but one layer keep fewer.
KEPT_ROWS, CHECKPOINTED_ROWS = 34, 2
# The eager kernel keeps each attention score as computed, in float32 within softmax, and as a probability.
SCORE_BYTES = 8
LIBRARIES = 1 << 30


class MemoryEstimate(NamedTuple):
    """Bytes by what holds them. trainable: parameters of the adapter."""

    weights: int
    optimizer: int
    activations: int
    libraries: int
    trainable: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations + self.libraries


def estimate_memory(
    recipe: Recipe, precision: Precision, weight_bytes: int, config: Any, layers: LayerSizes, longest: int
) -> MemoryEstimate:
    """The peak of one process.

    weight_bytes: of the base's files, in 16 bits. config: the base's. layers: those that the adapter changes. longest:
    tokens of the longest row.
    """
    config = config.get_text_config()
    width = 2 if precision.dtype == "bfloat16" else 4
    if precision.load_in_4bit:
        embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) * 2
        weights = round((weight_bytes - embeddings) * NF4_SHARE) + embeddings
    else:
        weights = weight_bytes * width // 2
    trainable = count_parameters(recipe, layers)
    # float32 weight, gradient and two moments; 8-bit moments are a quarter of that.
    optimizer = trainable * (8 + (2 if "8bit" in precision.optimizer else 8))
    length = recipe.max_length if precision.packing else min(longest, recipe.max_length)
    rows = KEPT_ROWS * recipe.batch_size * length * config.hidden_size * width
    eager = attention_for(precision, config) == "eager"
    scores = SCORE_BYTES * recipe.batch_size * config.num_attention_heads * length**2 if eager else 0
    if recipe.gradient_checkpointing:
        kept = CHECKPOINTED_ROWS * recipe.batch_size * length * config.hidden_size * width * config.num_hidden_layers
        activations = kept + rows + scores
    else:
        activations = (rows + scores) * config.num_hidden_layers
    return MemoryEstimate(weights, optimizer, activations, LIBRARIES, trainable)
