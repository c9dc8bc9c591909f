"""Offers vLLM this project's CPU platform, through the `vllm.platform_plugins` entry point.

On CUDA, and with a vLLM version that it was not tested with, vLLM keeps its own platform.
"""

import logging

from serve.hardware import vllm_is_cpu_build, vllm_version

TESTED = ("0.32.",)

logger = logging.getLogger("vllm.counsel")


def register() -> str | None:
    """The platform class to use, or None to keep vLLM's own."""
    if not vllm_is_cpu_build():
        return None
    version = vllm_version()
    if not (version or "").startswith(TESTED):
        logger.warning(
            "Counsel Stack's CPU LoRA was not tested with vLLM %s (only with %s), so vLLM's own is used: it is slower, "
            "and may answer a base request as the adapter that it is batched with (docs/cpu-lora.md)",
            version,
            ", ".join(f"{prefix}x" for prefix in TESTED),
        )
        return None
    return "serve.cpu.platform.CounselCpuPlatform"
