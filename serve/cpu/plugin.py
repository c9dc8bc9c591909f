"""Offers vLLM this project's CPU platform, through the `vllm.platform_plugins` entry point.

On CUDA, and with a vLLM version that it was not tested with, vLLM keeps its own platform.
"""

import logging

from serve.vllm_api import untested, vllm_is_cpu_build

logger = logging.getLogger("vllm.counsel")


def register() -> str | None:
    """The platform class to use, or None to keep vLLM's own."""
    if not vllm_is_cpu_build():
        return None
    reason = untested()
    if reason:
        logger.warning(
            "%s; vLLM's own CPU LoRA is used: it is slower, and may answer a base request as the adapter that it is "
            "batched with (docs/cpu-lora.md)",
            reason,
        )
        return None
    return "serve.cpu.platform.CounselCpuPlatform"
