"""The platform class that serve/platform.py names; apart from it, since importing this imports vLLM."""

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

# The class vLLM itself would take: the plain CPU platform, or AMD's where zentorch is installed.
_Native = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


class CounselCpuPlatform(_Native):  # type: ignore[misc, valid-type]
    """vLLM's CPU platform, with LoRA grouped by adapter."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "serve.cpu_lora.GroupedPunicaWrapper"
