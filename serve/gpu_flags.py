"""The part of the launch plan that is for NVIDIA GPUs. Its figures come from serve/gpu_plan.py.

Checked against vLLM's parser and its config with the GPUs' answers replaced (tests/test_plan.py), never run on one.
"""

import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from counsel.catalog import Base
from counsel.errors import UserError
from counsel.files import read_json
from serve import quantization
from serve.config import DEFAULT_MAX_CPU_LORAS, DEFAULT_MAX_LORAS, ServeConfig
from serve.gpu_plan import (
    FIXED_BYTES,
    GIB,
    HOST_SHARE,
    MEMORY_SHARE,
    TOKENS_PER_REQUEST,
    WANTED_REQUESTS,
    Layout,
    choose_layout,
    choose_rank,
    weakest,
)
from serve.hardware import Gpu, Hardware
from serve.model_shape import ModelShape, read_shape
from serve.plan_builder import PlanBuilder, unserved_rank

CONTEXT_LIMIT = 4096
# What vLLM's builds for CUDA need.
LOWEST = (7, 5)
# vLLM refuses float16 for these, whose activations overflow in it.
NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")


def add_gpu(builder: PlanBuilder, config: ServeConfig, base: Base, machine: Hardware, ranks: Sequence[int]) -> None:
    """Add every choice for these GPUs. Raises UserError for what vLLM would refuse, or what does not fit."""
    gpu, model_config = weakest(machine), read_json(Path(base.path) / "config.json")
    if gpu.capability < LOWEST:
        has, needs = (".".join(map(str, capability)) for capability in (gpu.capability, LOWEST))
        raise UserError(
            f"{gpu.name}: compute capability {has}; vLLM needs {needs} or higher: "
            "serve with a vLLM for CPUs (the cpu extra), or on a newer GPU"
        )
    served = quantization.served_format(_asked_quantization(config), model_config, gpu.capability)
    shape = read_shape(Path(base.path), served.bits if served else 16)
    _add_dtype(builder, config, model_config.get("model_type", ""), _stored_dtype(model_config), gpu)
    if served is not None:
        why = quantization.why(served, gpu.capability)
        if config.quantization:
            builder.flag("--quantization", config.quantization, why=why)
        else:
            builder.note("quantized base", why)
    if shape is None:
        _add_unknown(builder, config, machine, ranks)
    else:
        context = config.max_model_len or min(CONTEXT_LIMIT, shape.max_position or CONTEXT_LIMIT)
        layout = choose_layout(config, shape, machine, ranks, context)
        _add_parallel(builder, config, shape, layout, machine)
        _add_slots(builder, config, shape, layout, ranks)
        _add_capacity(builder, config, shape, layout, context)
    if config.compile:
        why = "a batch without adapters runs a graph without their kernels; costs seconds at the start, and memory"
        builder.flag("--compilation-config", json.dumps({"cudagraph_specialize_lora": True}), why=why)
    if "--scheduler-cls" not in config.vllm_args:
        why = (
            "ours was never run on a GPU; adapters beyond the slots may wait without end (adapter_wait_s does nothing)"
        )
        builder.note("vLLM's own scheduler", why)


def _asked_quantization(config: ServeConfig) -> str | None:
    """`--quantization`, also where it is given in vllm_args; None if neither asks.

    Raises UserError for one in vllm_args that was not checked.
    """
    words = shlex.split(config.vllm_args.replace("=", " "))
    asked = [value for word, value in itertools.pairwise(words) if word in ("--quantization", "-q")]
    if not asked:
        return config.quantization
    if asked[-1] not in quantization.ON_LOAD:
        raise UserError(
            f"vllm_args asks for quantization {asked[-1]}, which was not checked with adapters; "
            f"checked: {', '.join(quantization.ON_LOAD)}"
        )
    return asked[-1]


def _stored_dtype(model_config: dict[str, object]) -> str:
    text = model_config.get("text_config")
    for config in (model_config, text if isinstance(text, dict) else {}):
        if stored := config.get("dtype") or config.get("torch_dtype"):
            return str(stored)
    return "float32"


def _add_dtype(builder: PlanBuilder, config: ServeConfig, model_type: str, stored: str, gpu: Gpu) -> None:
    capability = ".".join(map(str, gpu.capability))
    has_bfloat16 = gpu.capability >= (8, 0)
    if config.dtype == "float32":
        raise UserError(
            "dtype is float32, which vLLM's adapter kernels for GPUs do not take; allowed: auto, bfloat16, float16"
        )
    if config.dtype == "bfloat16" and not has_bfloat16:
        raise UserError(
            f"dtype is bfloat16, which a GPU of compute capability {capability} does not have; use --dtype float16"
        )
    if config.dtype != "auto":
        dtype, why = config.dtype, "set with dtype"
    elif not has_bfloat16:
        dtype, why = "float16", f"a GPU of compute capability {capability} has no bfloat16 (8.0 and higher have)"
    elif stored == "float16":
        dtype, why = "float16", "the base is stored in it"
    else:
        dtype, why = "bfloat16", f"the base is stored in {stored}, and compute capability {capability} has bfloat16"
    if dtype == "float16" and model_type in NO_FLOAT16:
        if not has_bfloat16:
            raise UserError(
                f"a GPU of compute capability {capability} has no bfloat16, {model_type} overflows in float16, and "
                "adapter kernels take no float32; use a GPU of capability 8.0 or higher, or another base"
            )
        if config.dtype == "float16":
            raise UserError(f"dtype is float16, in which {model_type} overflows; use --dtype bfloat16")
        dtype, why = "bfloat16", f"{model_type} overflows in float16"
    builder.flag("--dtype", dtype, why=why)


def _add_parallel(
    builder: PlanBuilder, config: ServeConfig, shape: ModelShape, layout: Layout, machine: Hardware
) -> None:
    n_gpus, tensor, data = len(machine.gpus), layout.tensor_parallel, layout.data_parallel
    memory = f"{weakest(machine).memory_bytes / GIB:.0f} GiB"
    weights = f"{shape.weight_bytes() / GIB:.1f} GiB of weights"
    if config.tensor_parallel_size:
        why = "set with tensor_parallel_size"
    elif shape.experts and tensor > 1 and not config.data_parallel_size:
        why = f"{weights}: the GPUs share one copy; copies of a mixture of experts wait for each other at every step"
    elif tensor > 1:
        why = (
            f"{weights}, adapter slots and room for {WANTED_REQUESTS} requests of {TOKENS_PER_REQUEST} tokens do not "
            f"fit on {_gpus(tensor // 2)} of {memory}: {tensor} share each copy, and exchange results in every layer"
        )
    else:
        why = f"{weights} and the adapter slots fit on one GPU of {memory}"
    builder.flag("--tensor-parallel-size", str(tensor), why=why)
    if config.data_parallel_size:
        why = "set with data_parallel_size; every adapter is loaded into each copy"
    elif data > 1:
        why = f"{data} copies answer different requests and exchange nothing; every adapter is loaded into each"
    elif tensor == n_gpus == 1:
        why = "there is one GPU"
    else:
        why = "one copy"
    if layout.gpus < n_gpus:
        reason = "as asked" if config.tensor_parallel_size or config.data_parallel_size else _why_unused(shape, layout)
        why += f"; {n_gpus - layout.gpus} of {n_gpus} GPUs stay unused: {reason}"
    builder.flag("--data-parallel-size", str(data), why=why)


def _why_unused(shape: ModelShape, layout: Layout) -> str:
    larger = 2 * layout.tensor_parallel
    return shape.refusal(larger) or "a copy takes 1, 2, 4, 8, ... GPUs"


def _gpus(n: int) -> str:
    return "one GPU" if n == 1 else f"{n} GPUs"


def _add_slots(
    builder: PlanBuilder, config: ServeConfig, shape: ModelShape, layout: Layout, ranks: Sequence[int]
) -> None:
    why = f"one batch can mix so many adapters; their slots take {layout.slot_bytes / GIB:.1f} GiB on each GPU"
    if not config.max_loras and layout.max_loras < min(DEFAULT_MAX_LORAS, config.max_cpu_loras or DEFAULT_MAX_LORAS):
        why += f", and {2 * layout.max_loras} would leave too little for keys and values"
    builder.flag("--max-loras", str(layout.max_loras), why=f"{why} (max_loras)")
    each = shape.adapter_bytes(layout.max_lora_rank) / GIB
    why = f"adapters that stay in host memory, {each:.2f} GiB each"
    why += f" in each of {layout.gpus} processes" if layout.gpus > 1 else ""
    if not config.max_cpu_loras and layout.max_cpu_loras < DEFAULT_MAX_CPU_LORAS:
        why += f"; more would take over {HOST_SHARE:.0%} of it"
    builder.flag("--max-cpu-loras", str(layout.max_cpu_loras), why=f"{why} (max_cpu_loras)")
    builder.flag("--max-lora-rank", str(layout.max_lora_rank), why=_why_rank(config, layout.max_lora_rank, ranks))


def _why_rank(config: ServeConfig, rank: int, ranks: Sequence[int]) -> str:
    cost = "on a GPU every adapter is computed and stored at this rank"
    if unserved := unserved_rank(ranks, rank):
        return unserved
    if config.max_lora_rank:
        return f"set with max_lora_rank; {cost}"
    if not ranks:
        return f"the store is empty; {cost}, so set --max-lora-rank to what you will publish"
    return f"serves the store's largest, {max(ranks)}: {cost}; one of a higher rank is served after a restart"


def _add_capacity(builder: PlanBuilder, config: ServeConfig, shape: ModelShape, layout: Layout, context: int) -> None:
    if config.max_model_len:
        why = "set with max_model_len"
    elif layout.max_model_len < context:
        why = f"shorter than {context}, because no longer request would fit"
    else:
        why = f"the model's limit, up to {CONTEXT_LIMIT}"
    builder.flag("--max-model-len", str(layout.max_model_len), why=why)
    why = "set with max_num_seqs"
    if not config.max_num_seqs:
        limit = f"the gateway lets in {config.queued} answers at once (queued)"
        why = limit if layout.max_num_seqs == config.queued else f"so many of {TOKENS_PER_REQUEST} tokens fit in a copy"
    builder.flag("--max-num-seqs", str(layout.max_num_seqs), why=why)
    if config.kv_cache_memory_gb:
        kv_bytes = int(config.kv_cache_memory_gb * 1e9)
        builder.flag("--kv-cache-memory-bytes", str(kv_bytes), why="set with kv_cache_memory_gb")
    else:
        room = layout.kv_tokens * shape.kv_bytes(tensor_parallel=layout.tensor_parallel)
        why = (
            f"vLLM measures what is left for keys and values; estimated: {room / GIB:.1f} GiB, {layout.kv_tokens:,} "
            f"tokens in each copy, beside {layout.weight_bytes / GIB:.1f} GiB of weights and at least "
            f"{FIXED_BYTES / GIB:.1f} GiB of its own"
        )
        builder.flag("--gpu-memory-utilization", str(MEMORY_SHARE), why=why)
    if not shape.recurrent:
        why = "requests that begin alike, with one adapter and one key, read their common beginning once"
        builder.flag("--enable-prefix-caching", why=why)


def _add_unknown(builder: PlanBuilder, config: ServeConfig, machine: Hardware, ranks: Sequence[int]) -> None:
    """For a base whose config.json does not tell its size: what is asked for, and vLLM's own defaults."""
    tensor, data = config.tensor_parallel_size or 1, config.data_parallel_size or 1
    if tensor * data > len(machine.gpus):
        raise UserError(
            f"tensor_parallel_size {tensor} times data_parallel_size {data} needs {tensor * data} GPUs; "
            f"there are {len(machine.gpus)}"
        )
    builder.note("no estimate", "this base's config.json lacks the usual names for its sizes, so vLLM finds what fits")
    max_loras = config.max_loras or min(DEFAULT_MAX_LORAS, config.max_cpu_loras or DEFAULT_MAX_LORAS)
    rank = choose_rank(config, ranks)
    builder.flag("--tensor-parallel-size", str(tensor), why="set with tensor_parallel_size, or 1")
    builder.flag("--data-parallel-size", str(data), why="set with data_parallel_size, or 1")
    builder.flag("--max-loras", str(max_loras), why="adapters that one batch can mix (max_loras)")
    max_cpu_loras = config.max_cpu_loras or max(max_loras, DEFAULT_MAX_CPU_LORAS)
    builder.flag("--max-cpu-loras", str(max_cpu_loras), why="adapters that stay in host memory (max_cpu_loras)")
    builder.flag("--max-lora-rank", str(rank), why=_why_rank(config, rank, ranks))
    for flag, value in (("--max-model-len", config.max_model_len), ("--max-num-seqs", config.max_num_seqs)):
        if value:
            builder.flag(flag, str(value), why="set by you")
