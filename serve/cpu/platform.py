"""The platform class that serve/cpu/plugin.py names; apart from it, since importing this imports vLLM."""

import os
from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from serve.cpu.ops import PROVIDER
from serve.launch import EXECUTOR, START_METHOD

WORKER = "serve.cpu.worker.CounselCpuWorker"
SCHEDULER = "serve.cpu.scheduler.CleanBlocksScheduler"

# The class vLLM itself would take: the plain CPU platform, or AMD's where zentorch is installed.
_Native = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


class CounselCpuPlatform(_Native):  # type: ignore[misc, valid-type]
    """vLLM's CPU platform with LoRA grouped by adapter, compiled layer by layer, or eager with vLLM's C++ kernels."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "serve.cpu.lora.GroupedPunicaWrapper"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "serve.cpu.passes.CpuPassManager"

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
        from vllm.config import CompilationMode
        from vllm.config.kernel import IrOpPriorityConfig

        if vllm_config.compilation_config.mode != CompilationMode.NONE:
            return super().get_default_ir_op_priority(vllm_config)
        kernels = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=kernels, fused_add_rms_norm=kernels)

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Let vLLM adapt its config to a CPU, with our worker and scheduler, and take back four of its decisions."""
        from vllm.config import CompilationMode

        compilation = vllm_config.compilation_config
        mode, start_method = compilation.mode, os.environ.get(START_METHOD)
        parallel = vllm_config.parallel_config
        executor = parallel.distributed_executor_backend
        if parallel.worker_cls not in ("auto", WORKER):
            # Compiled code needs our worker. With one of the user's own vLLM's decisions stand: eager.
            super().check_and_update_config(vllm_config)
            return
        parallel.worker_cls = WORKER
        # Stock turns compilation off when it sees LoRA, whose stock operators cannot be traced; ours is one opaque
        # operator a layer. LoRA decides nothing else in there.
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            super().check_and_update_config(vllm_config)
        finally:
            vllm_config.lora_config = lora_config
        if lora_config is not None and vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        if executor == os.environ.get(EXECUTOR) == "uni":
            # Stock insists on a process of its own for the model, to bind that process's threads to cores.
            parallel.distributed_executor_backend = executor
        if start_method is not None:
            # Stock insists on new interpreters, which import everything again, whatever was chosen.
            os.environ[START_METHOD] = start_method
        if mode == CompilationMode.VLLM_COMPILE:
            # Stock compiles the whole model as one graph, and fails to read it back from its own cache. Cut at the
            # attention, as on a GPU, the layers share one graph: a third of the time, once, and 5 s from then on.
            compilation.mode = mode
            compilation.compile_sizes = []
