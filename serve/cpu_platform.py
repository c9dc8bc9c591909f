"""The platform class that serve/platform.py names; apart from it, since importing this imports vLLM."""

import os
from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from serve.cpu_ops import PROVIDER

# The class vLLM itself would take: the plain CPU platform, or AMD's where zentorch is installed.
_Native = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")

COMPILE = "COUNSEL_CPU_COMPILE"  # 1: compile although LoRA is on


class CounselCpuPlatform(_Native):  # type: ignore[misc, valid-type]
    """vLLM's CPU platform with LoRA grouped by adapter, and either eager kernels or torch.compile beside it."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "serve.cpu_lora.GroupedPunicaWrapper"

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        """Decide on eager before operators are chosen: stock decides after, and runs an eager model's norms, rotary
        embeddings and activations in the form meant for the compiler."""
        from vllm.config import CompilationMode

        super().apply_config_platform_defaults(vllm_config)
        if vllm_config.lora_config is not None and os.environ.get(COMPILE) != "1":
            vllm_config.compilation_config.mode = CompilationMode.NONE

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
        # Stock turns compilation off here when it sees LoRA, whose stock operators cannot be traced; ours is one opaque
        # operator a layer. LoRA decides nothing else in there.
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            super().check_and_update_config(vllm_config)
        finally:
            vllm_config.lora_config = lora_config
