"""How to spread a base and its adapters over NVIDIA GPUs: copies, splits, slots and context, chosen to fit the memory.

Pure, from config.json and the cards' memory. An estimate: vLLM measures at its start what is left for keys and values,
and refuses to start if one request of full length does not fit. Never run on a GPU: docs/accelerators.md.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from counsel.adapter_check import SERVED_RANKS
from counsel.errors import UserError
from serve.config import DEFAULT_MAX_CPU_LORAS, DEFAULT_MAX_LORA_RANK, DEFAULT_MAX_LORAS, ServeConfig
from serve.hardware import Gpu, Hardware
from serve.model_shape import ModelShape

GIB = 1 << 30
# vLLM's own share, and its steps: longer ones on cards of 70 GiB and more.
MEMORY_SHARE = 0.92
LARGE_GPU_BYTES = 70 * GIB
LONG_STEP_TOKENS, STEP_TOKENS = 8192, 2048
# CUDA's context, NCCL's buffers and captured graphs, with and without adapters.
FIXED_BYTES = 3 * GIB // 2
# A copy of the model should have room for this much at once, or more GPUs share it.
WANTED_REQUESTS, TOKENS_PER_REQUEST = 16, 1024
SHORTEST_CONTEXT = 1024
# Adapters in host memory take at most this share of it.
HOST_SHARE = 0.4


class Layout(NamedTuple):
    """One way to serve: `data_parallel` copies, each split over `tensor_parallel` GPUs.

    kv_tokens: the tokens whose keys and values fit in one copy, estimated.
    """

    tensor_parallel: int
    data_parallel: int
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    max_model_len: int
    max_num_seqs: int
    kv_tokens: int
    weight_bytes: int
    slot_bytes: int

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.data_parallel


def weakest(machine: Hardware) -> Gpu:
    """The GPU that decides for all: the least memory and the lowest compute capability."""
    return Gpu(
        machine.gpus[0].name,
        min(gpu.memory_bytes for gpu in machine.gpus),
        min(gpu.capability for gpu in machine.gpus),
    )


def choose_rank(config: ServeConfig, ranks: Sequence[int]) -> int:
    """`--max-lora-rank` on a GPU: the lowest that serves the whole store."""
    largest = max(ranks, default=DEFAULT_MAX_LORA_RANK)
    return config.max_lora_rank or next((rank for rank in SERVED_RANKS if rank >= largest), SERVED_RANKS[-1])


def choose_layout(
    config: ServeConfig, shape: ModelShape, machine: Hardware, ranks: Sequence[int], context: int
) -> Layout:
    """The layout for a base on these GPUs; `context` is the longest one to serve if it fits.

    Adapter slots are given up before the context is. Raises UserError when even one slot and a short context do not
    fit, or when the GPUs are too few for what the config asks for.
    """
    rank, gpu = choose_rank(config, ranks), weakest(machine)
    splits = _splits(config, shape, len(machine.gpus))
    slots = [config.max_loras] if config.max_loras else [DEFAULT_MAX_LORAS, 4, 2, 1]
    if config.max_cpu_loras:
        slots = [min(n, config.max_cpu_loras) for n in slots]
    for length, requests in _lengths(config, context):
        for max_loras in slots:
            for tensor, data in splits:
                layout = _layout(config, shape, machine, (tensor, data), max_loras, rank, length)
                if layout.kv_tokens >= max(length, requests * TOKENS_PER_REQUEST):
                    return layout
    tensor, data = splits[-1]
    least = _layout(config, shape, machine, (tensor, data), slots[-1], rank, SHORTEST_CONTEXT)
    needed = (least.weight_bytes + least.slot_bytes) / GIB
    raise UserError(
        f"the base does not fit: weights and {slots[-1]} adapter slots of rank {rank} take {needed:.1f} GiB on each "
        f"of {tensor} GPUs of {gpu.memory_bytes / GIB:.0f} GiB, and no context of "
        f"{config.max_model_len or SHORTEST_CONTEXT} tokens fits beside them; take more or larger GPUs, "
        "--quantization fp8, a shorter --max-model-len or a lower --max-lora-rank"
    )


def _splits(config: ServeConfig, shape: ModelShape, n_gpus: int) -> list[tuple[int, int]]:
    """The pairs of tensor and data parallelism to try, fewest GPUs per copy first."""
    tensor, data = config.tensor_parallel_size, config.data_parallel_size
    if (tensor or 1) * (data or 1) > n_gpus:
        raise UserError(
            f"tensor_parallel_size {tensor or 1} times data_parallel_size {data or 1} needs "
            f"{(tensor or 1) * (data or 1)} GPUs; there are {n_gpus}"
        )
    if tensor and (reason := shape.refusal(tensor)):
        raise UserError(f"tensor_parallel_size is {tensor}, but this base cannot be split so: {reason}")
    if tensor:
        return [(tensor, data or 1)]
    powers = [1 << k for k in range(n_gpus.bit_length()) if 1 << k <= n_gpus // (data or 1)]
    sizes = [size for size in powers if not shape.refusal(size)]
    if shape.experts and not data:
        # Data-parallel ranks of a mixture of experts work in lockstep.
        return [(size, 1) for size in sizes[-1:]]
    return [(size, data or n_gpus // size) for size in sizes]


def _lengths(config: ServeConfig, context: int) -> Iterator[tuple[int, int]]:
    """Context lengths to try, with the requests that should fit: first comfortably, then at least one."""
    yield context, WANTED_REQUESTS
    yield context, 1
    while not config.max_model_len and context > SHORTEST_CONTEXT:
        context = max(SHORTEST_CONTEXT, context // 2)
        yield context, 1


def _layout(
    config: ServeConfig,
    shape: ModelShape,
    machine: Hardware,
    split: tuple[int, int],
    max_loras: int,
    rank: int,
    length: int,
) -> Layout:
    tensor, data = split
    gpu = weakest(machine)
    step_tokens = LONG_STEP_TOKENS if gpu.memory_bytes >= LARGE_GPU_BYTES else STEP_TOKENS
    weights, slots = shape.weight_bytes(tensor), max_loras * shape.slot_bytes(rank, tensor)
    # Of the longest step. Each running request's scores take 12 bytes: float32, sorted, and their order.
    activations = step_tokens * 2 * (8 * shape.hidden + 4 * shape.intermediate // tensor)
    fixed = FIXED_BYTES + weights + slots + activations
    left = int(gpu.memory_bytes * MEMORY_SHARE) - fixed
    token = shape.kv_bytes(tensor_parallel=tensor)
    scores = 12 * shape.vocabulary
    seqs = config.max_num_seqs or min(config.queued, max(1, left // (TOKENS_PER_REQUEST * token + scores)))
    kv_tokens = max(0, left - seqs * scores) // token
    return Layout(
        tensor,
        data,
        max_loras,
        _host_adapters(config, shape, machine, rank, tensor * data, max_loras),
        rank,
        length,
        seqs,
        kv_tokens,
        weights,
        slots,
    )


def _host_adapters(
    config: ServeConfig, shape: ModelShape, machine: Hardware, rank: int, n_processes: int, max_loras: int
) -> int:
    """`--max-cpu-loras`: as many as fit in host memory, where each GPU's process keeps its own copy of each adapter."""
    if config.max_cpu_loras:
        return config.max_cpu_loras
    room = int(machine.memory_bytes * HOST_SHARE) // (shape.adapter_bytes(rank) * n_processes)
    return max(max_loras, min(DEFAULT_MAX_CPU_LORAS, room))
