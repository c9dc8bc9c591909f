"""What vLLM makes of launch plans on GPUs that are not there: its own parser and `VllmConfig`, in a process of its own.

Only the answers of NVML and of torch's device queries are replaced, so vLLM takes its CUDA platform; nothing can be
computed. Works with a CUDA build and with a CPU build, whose sources are the same, of either release.

    python -m tests.fake_gpus FILE      FILE: a JSON list of {"gpus", "gb", "capability", "argv"}; prints a JSON list
"""

import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GB = 10**9


def configs_of(cases: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """For each case what vLLM would run with, or {"error": its refusal}."""
    file = folder / "cases.json"
    file.write_text(json.dumps(list(cases)))
    done = subprocess.run([sys.executable, "-m", "tests.fake_gpus", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


# What a CUDA build's operators tell about the card when vLLM's quantized layers are imported.
_ASKED_AT_IMPORT = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)


class _Compiled(types.ModuleType):
    """Stands for a module of a CUDA build that a CPU build lacks: any name can be imported from it, none works."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: (_ for _ in ()).throw(NotImplementedError(f"{self.__name__}.{name}"))


class _Cards:
    count, gb, capability = 1, 80.0, (9, 0)


def _pretend() -> Any:
    """Replace what vLLM asks the driver, and make CUDA its platform; return that."""
    for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn"):
        if importlib.util.find_spec("vllm._vllm_fa2_C") is None:
            sys.modules[name] = _Compiled(name)
    import torch
    import vllm.third_party.pynvml as nvml

    for name in _ASKED_AT_IMPORT:
        if not hasattr(torch.ops._C, name):
            setattr(torch.ops._C, name, lambda *_: True)
    answers = {
        "nvmlInit": lambda *_: None,
        "nvmlShutdown": lambda *_: None,
        "nvmlDeviceGetCount": lambda: _Cards.count,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCudaComputeCapability": lambda _: _Cards.capability,
        "nvmlDeviceGetMemoryInfo": lambda *_: types.SimpleNamespace(total=int(_Cards.gb * GB), used=0),
        "nvmlDeviceGetName": lambda _: "described",
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetP2PStatus": lambda *_: nvml.NVML_P2P_STATUS_OK,
    }
    for name, answer in answers.items():
        setattr(nvml, name, answer)
    import vllm.platforms as platforms
    from vllm.platforms.cuda import NvmlCudaPlatform

    class Cuda(NvmlCudaPlatform):
        """Without the caches of a device that does not change."""

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            from vllm.platforms.interface import DeviceCapability

            return DeviceCapability(*_Cards.capability)

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            wanted = capability if isinstance(capability, tuple) else divmod(capability, 10)
            return _Cards.capability >= wanted

        @classmethod
        def device_count(cls) -> int:
            return _Cards.count

    platform = Cuda()
    platforms._current_platform = platform  # type: ignore[attr-defined]
    for module, name, value in (
        (torch.cuda, "device_count", lambda: _Cards.count),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda *_: _Cards.capability),
        (torch.accelerator, "device_count", lambda: _Cards.count),
        (torch.accelerator, "is_available", lambda: True),
        (torch.cuda, "get_device_properties", lambda *_, **__: types.SimpleNamespace(
            multi_processor_count=100, total_memory=int(_Cards.gb * GB), name="described", is_integrated=False,
            major=_Cards.capability[0], minor=_Cards.capability[1], shared_memory_per_block_optin=1 << 17, warp_size=32,
        )),
    ):  # fmt: skip
        setattr(module, name, value)
    return platform


def _inspect_here() -> None:
    """vLLM asks a process of its own what a model class can do, which takes 10 s for each; ask the class itself."""
    from vllm.model_executor.models import registry

    registry._LazyRegisteredModel.inspect_model_cls = lambda model: registry._ModelInfo.from_model_cls(  # type: ignore
        model.load_model_cls()
    )


def _config(parser: Any, case: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    _Cards.count, _Cards.gb, _Cards.capability = case["gpus"], case["gb"], tuple(case["capability"])
    args = parser.parse_args(case["argv"])
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        # As vLLM's worker does at its start.
        current_platform.check_if_supports_dtype(config.model_config.dtype)
    except Exception as error:  # vLLM's refusals have no class in common
        return {"error": f"{type(error).__name__}: {error}"}
    lora, parallel = config.lora_config, config.parallel_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": config.model_config.quantization,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "step_tokens": config.scheduler_config.max_num_batched_tokens,
        "scheduler": config.scheduler_config.scheduler_cls,
        "async": config.scheduler_config.async_scheduling,
        "prefix_cache": config.cache_config.enable_prefix_caching,
        "memory_share": config.cache_config.gpu_memory_utilization,
        "tensor": parallel.tensor_parallel_size,
        "data": parallel.data_parallel_size,
        "api_processes": args.api_server_count,
        "max_loras": lora.max_loras,
        "max_cpu_loras": lora.max_cpu_loras,
        "max_lora_rank": lora.max_lora_rank,
        "lora_dtype": str(lora.lora_dtype).removeprefix("torch."),
        "graphs": str(config.compilation_config.cudagraph_mode.name),
        "specialize_lora": config.compilation_config.cudagraph_specialize_lora,
        "eager": config.model_config.enforce_eager,
    }


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    platform = _pretend()
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ModuleNotFoundError:  # vLLM 0.33
        from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert current_platform is platform
    _inspect_here()
    parser = make_arg_parser(FlexibleArgumentParser())
    print(json.dumps([_config(parser, case) for case in cases]))


if __name__ == "__main__":
    main()
