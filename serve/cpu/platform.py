"""The platform class that serve/cpu/plugin.py names. In a separate module, because it imports vLLM."""

import os
from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from serve.cpu.ops import PROVIDER
from serve.launch import EXECUTOR, START_METHOD

WORKER = "serve.cpu.worker.CounselCpuWorker"
SCHEDULER = "serve.cpu.scheduler.CleanBlocksScheduler"

# The class that vLLM itself would choose: the plain CPU platform, or AMD's if zentorch is installed.
_VllmPlatform = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


class CounselCpuPlatform(_VllmPlatform):  # type: ignore[misc, valid-type]
    """vLLM's CPU platform with LoRA grouped by adapter; compiled per layer, or eager with vLLM's C++ kernels."""

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
        """Let vLLM adapt its config to a CPU, add our worker and scheduler, and undo four of vLLM's decisions."""
        from vllm.config import CompilationMode

        compilation = vllm_config.compilation_config
        mode, start_method = compilation.mode, os.environ.get(START_METHOD)
        parallel = vllm_config.parallel_config
        executor = parallel.distributed_executor_backend
        if parallel.worker_cls not in ("auto", WORKER):
            # Compiled code needs our worker. With a worker of the user's, vLLM's decisions stay, eager mode included.
            super().check_and_update_config(vllm_config)
            return
        parallel.worker_cls = WORKER
        # With LoRA, vLLM turns compilation off, because its own operators cannot be traced. Ours is one opaque operator
        # per layer, so vLLM must not see LoRA here. Nothing else in its method depends on LoRA.
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            super().check_and_update_config(vllm_config)
        finally:
            vllm_config.lora_config = lora_config
        if lora_config is not None and vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        if executor == os.environ.get(EXECUTOR) == "uni":
            # vLLM runs the model in a separate process, to bind that process's threads to cores.
            parallel.distributed_executor_backend = executor
        if start_method is not None:
            # vLLM overrides this with new interpreters, which import everything again.
            os.environ[START_METHOD] = start_method
        if mode == CompilationMode.VLLM_COMPILE:
            # vLLM compiles the whole model as one graph, and cannot read it back from its own cache. Split at the
            # attention, as on a GPU, the layers share one graph: it compiles in a third of the time, once, and loads
            # in 5 s after that.
            compilation.mode = mode
            compilation.compile_sizes = []
