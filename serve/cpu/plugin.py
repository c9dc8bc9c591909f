"""vLLM's CPU platform with this project's LoRA arithmetic, offered through the `vllm.platform_plugins` entry point.

On CUDA, and with a vLLM that this was not tested with, it stays out of the way.
"""

import logging

from serve.hardware import vllm_is_cpu_build, vllm_version

TESTED = ("0.32.",)

logger = logging.getLogger("vllm.counsel")


def register() -> str | None:
    """The platform class to use instead of vLLM's own, or None to leave vLLM's choice."""
    if not vllm_is_cpu_build():
        return None
    version = vllm_version()
    if not (version or "").startswith(TESTED):
        logger.warning(
            "Counsel Stack's CPU LoRA was not tested with vLLM %s (but with %s): vLLM's own is used, which is slower "
            "and may answer a base-model request as the adapter it is batched with (docs/cpu-lora.md)",
            version,
            ", ".join(f"{prefix}x" for prefix in TESTED),
        )
        return None
    return "serve.cpu.platform.CounselCpuPlatform"
