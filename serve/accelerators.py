"""The launch plan on accelerators that this project was never run on (docs/accelerators.md)."""

from counsel.errors import UserError
from serve.config import DEFAULT_MAX_CPU_LORAS, DEFAULT_MAX_LORA_RANK, DEFAULT_MAX_LORAS, ServeConfig
from serve.hardware import Hardware
from serve.plan_builder import PlanBuilder

# vLLM's own sources have adapter kernels for these, and nothing of ours depends on the device.
PASSED_THROUGH = {"rocm": "AMD GPUs (ROCm)", "xpu": "Intel GPUs (XPU)"}
# vLLM runs on these through another project's plugin, whose handling of adapters was not looked at.
REFUSED = {"tpu": "TPUs (tpu-inference)", "metal": "Apple GPUs (vllm-metal)"}


def add_untested(builder: PlanBuilder, config: ServeConfig, machine: Hardware) -> None:
    """Add what was asked for, and leave the rest to vLLM. Raises UserError for a device of REFUSED."""
    if machine.device in REFUSED:
        raise UserError(
            f"this vLLM is built for {REFUSED[machine.device]}, on which adapters were not checked; "
            "install the cpu or the cuda extra (docs/accelerators.md)"
        )
    builder.note(PASSED_THROUGH[machine.device], "never run by this project: vLLM's own defaults, and what you set")
    max_loras = config.max_loras or min(DEFAULT_MAX_LORAS, config.max_cpu_loras or DEFAULT_MAX_LORAS)
    flags = {
        "--max-loras": max_loras,
        "--max-cpu-loras": config.max_cpu_loras or max(max_loras, DEFAULT_MAX_CPU_LORAS),
        "--max-lora-rank": config.max_lora_rank or DEFAULT_MAX_LORA_RANK,
        "--dtype": config.dtype,
        "--max-model-len": config.max_model_len,
        "--max-num-seqs": config.max_num_seqs,
        "--tensor-parallel-size": config.tensor_parallel_size,
        "--data-parallel-size": config.data_parallel_size,
        "--quantization": config.quantization,
        "--kv-cache-memory-bytes": config.kv_cache_memory_gb and int(config.kv_cache_memory_gb * 1e9),
    }
    for flag, value in flags.items():
        if value is not None:
            builder.flag(flag, str(value))
