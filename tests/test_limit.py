"""The floors of benchmarks/limit.py, by hand, and that each load of the benchmark has one."""

import json

import pytest

from benchmarks.limit import Limits
from benchmarks.serving import CELLS_BY_NAME, cell_limit
from serve.model_shape import read_shape


@pytest.fixture
def limits(tmp_path):
    """Two layers of 8 and 16, one head, vocabulary 32; a machine of 1000 bytes and 10,000 operations per second."""
    config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1,
              "vocab_size": 32, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Limits(read_shape(tmp_path), 1000.0, 10_000.0, None)


def test_a_decode_step_reads_every_weight_once(limits):
    """Linear: 2 x (4 x 64 + 3 x 128) = 1280 weights; vocabulary 256; 2 bytes each, at 1000 bytes/s."""
    assert limits.shape.linear == 1280
    assert limits.decode_step_s(1) == pytest.approx(2 * 1536 / 1000)
    # Keys and values: 2 x 2 bytes x 2 layers x 8 numbers for each token of each request.
    assert limits.decode_step_s(1, context=10) == pytest.approx((2 * 1536 + 10 * 64) / 1000)
    # Rank 2 on every linear layer: 2 bytes x 2 x 2 layers x (4 x 16 + 3 x 24).
    assert limits.decode_step_s(1, adapters=3, rank=2) == pytest.approx((2 * 1536 + 3 * 1088) / 1000)
    # With 100 requests the products take longer than reading.
    assert limits.decode_step_s(100) == pytest.approx(2 * 100 * 1536 / 10_000)


def test_prompts_and_training_are_bounded_by_products(limits):
    """Two operations per weight and token forward, four with the gradient of the inputs."""
    assert limits.prefill_tokens_s() == pytest.approx(10_000 / 2560)
    assert limits.training_tokens_s() == pytest.approx(10_000 / 5120)
    prompt_s, steps_s = 2 * 10 * 2560 / 10_000, 4 * limits.decode_step_s(2, 10)
    assert limits.load_tokens_s(2, 10, 4) == pytest.approx(8 / (prompt_s + steps_s))


def test_each_load_of_the_benchmark_has_a_limit(limits):
    """More adapters, and higher ranks, never raise it."""
    for cell in CELLS_BY_NAME.values():
        assert cell_limit(limits, cell, 16) > 0
    base, four, all_of_them = (CELLS_BY_NAME[name] for name in ("base_c32", "mixed4_c32", "mixed16_c32"))
    assert cell_limit(limits, base, 64) >= cell_limit(limits, four, 8) >= cell_limit(limits, all_of_them, 64)
