"""What this machine can do at most with a model, beside which every measured speed is shown: `make bench-limit`.

    python -m benchmarks.limit --model smollm2-135m

Measured, with as many threads as the server uses, each the fastest of several runs:

read_gb_s     memory read, by summing 1 GB, which no cache holds
bf16_gflop_s  products of bfloat16 matrices in the model's own shapes, `tokens` rows at a time
int8_gflop_s  the same in 8-bit integers with vLLM's operator, scales included

From these and the model's shape, the floor of a load: a decode step reads each weight once, and every adapter and key
and value in use; a prompt's token multiplies each weight once, which is two operations; training with frozen weights
multiplies them twice, forward and for the gradient of the inputs. `of limit` is measured speed over the floor's.
Nothing else is counted (attention, sampling, HTTP), so 1 cannot be reached.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.catalog import resolve
from counsel.cli import Command, Result, main, option
from counsel.errors import UserError
from counsel.processor import processor
from counsel.values import PositiveInt
from serve.hardware import detect
from serve.model_shape import ModelShape, read_shape

READ_BYTES = 1 << 30
RUNS = 7


@dataclass(frozen=True)
class BenchLimit:
    """Which model's matrices to multiply, and how many rows at a time."""

    model: str = option("smollm2-135m", "base model")
    tokens: PositiveInt = option(512, "rows of a product: the tokens of one prefill step")


@dataclass(frozen=True)
class Limits:
    """What a machine reads and multiplies per second, and the shape of one model.

    int8_flop_s: None where vLLM's operator is missing.
    """

    shape: ModelShape
    read_bytes_s: float
    bf16_flop_s: float
    int8_flop_s: float | None

    def decode_step_s(self, requests: int, context: int = 0, adapters: int = 0, rank: int = 0) -> float:
        """Least seconds of a step that gives `requests` requests, each `context` tokens long, one token each."""
        read = 2 * self.shape.multiplied + requests * context * self.shape.kv_bytes()
        read += adapters * self.shape.adapter_bytes(rank)
        return max(read / self.read_bytes_s, 2 * requests * self.shape.multiplied / self.bf16_flop_s)

    def prefill_tokens_s(self) -> float:
        """Most prompt tokens per second. The vocabulary is multiplied for a prompt's last token only."""
        return self.bf16_flop_s / (2 * self.shape.linear)

    def training_tokens_s(self) -> float:
        """Most tokens per second of LoRA training; the vocabulary's part, only for answers' tokens, is left out."""
        return self.bf16_flop_s / (4 * self.shape.linear)

    def load_tokens_s(self, requests: int, prompt: int, new: int, adapters: int = 0, rank: int = 0) -> float:
        """Most new tokens per second of `requests` requests that are sent together, their prompts included."""
        steps_s = new * self.decode_step_s(requests, prompt, adapters, rank)
        return requests * new / (requests * prompt / self.prefill_tokens_s() + steps_s)


def known_shape(folder: Path) -> ModelShape:
    """The shape of the base in `folder`. Raises UserError where config.json does not tell it."""
    shape = read_shape(folder)
    if shape is None:
        raise UserError(f"the sizes of {str(folder)!r} are not in its config.json; measure another base")
    return shape


def measure_limits(shape: ModelShape, tokens: int = 512) -> Limits:
    """Measure this machine for a model of this shape, in about ten seconds. Imports vLLM into this process."""
    import torch

    torch.set_num_threads(len(detect().cpus))
    read_s = fastest_s(torch.ones(READ_BYTES // 4).sum)
    flops = sum(n * 2 * tokens * inner * outer for n, inner, outer in shape.matrices)
    bf16_s = sum(n * fastest_s(_bf16_product(tokens, inner, outer)) for n, inner, outer in shape.matrices)
    products = [(n, _int8_product(tokens, inner, outer)) for n, inner, outer in shape.matrices]
    int8_s = sum(n * fastest_s(product) for n, product in products if product)
    return Limits(shape, READ_BYTES / read_s, flops / bf16_s, flops / int8_s if int8_s else None)


def fastest_s(call: Callable[[], Any], runs: int = RUNS) -> float:
    """Seconds of the fastest of `runs` calls, after one that is not counted."""
    call()
    best_s = math.inf
    for _ in range(runs):
        started_s = time.perf_counter()
        call()
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s


def _bf16_product(tokens: int, inner: int, outer: int) -> Callable[[], Any]:
    import torch

    x, weight = torch.randn(tokens, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
    return lambda: torch.nn.functional.linear(x, weight)


def _int8_product(tokens: int, inner: int, outer: int) -> Callable[[], Any] | None:
    """vLLM's product with its quantization of the activations; None if this build of vLLM has none."""
    import torch

    try:
        from vllm import _custom_ops as ops
    except ImportError:
        return None
    if not hasattr(torch.ops._C, "create_onednn_scaled_mm_handler"):
        return None
    x = torch.randn(tokens, inner).bfloat16()
    weight = torch.randint(-127, 128, (outer, inner), dtype=torch.int8).t()
    handler = ops.create_onednn_scaled_mm(weight, torch.full((outer, 1), 0.01), torch.bfloat16, True, False, 32)
    out = torch.empty(tokens, outer, dtype=torch.bfloat16)

    def product() -> None:
        quantized, scales, zero_points = ops.onednn_scaled_int8_quant(x, None, None, True)
        ops.onednn_scaled_mm(handler, quantized, out, scales, zero_points, None, None)

    return product


def bench_limit(config: BenchLimit) -> Result:
    """Print what this machine can do with the model, and the floors that follow."""
    limits = measure_limits(known_shape(resolve(config.model).path), config.tokens)
    figures = {
        "read_gb_s": round(limits.read_bytes_s / 1e9, 2),
        "bf16_gflop_s": round(limits.bf16_flop_s / 1e9, 1),
        "int8_gflop_s": round(limits.int8_flop_s / 1e9, 1) if limits.int8_flop_s else None,
        "decode_c1_tokens_s_limit": round(1 / limits.decode_step_s(1), 1),
        "decode_c32_tokens_s_limit": round(32 / limits.decode_step_s(32), 1),
        "prefill_tokens_s_limit": round(limits.prefill_tokens_s(), 1),
        "training_tokens_s_limit": round(limits.training_tokens_s(), 1),
    }
    for name, value in figures.items():
        print(f"{name:<28}{value}")
    return Result({"processor": str(processor()), "model": config.model, **figures})


if __name__ == "__main__":
    sys.exit(
        main(
            "benchmarks.limit",
            {"": Command(BenchLimit, bench_limit, "measure what this machine can do at most with a model")},
        )
    )
