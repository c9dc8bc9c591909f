"""The graph passes that vLLM runs before inductor: none on a CPU. serve/cpu/platform.py names this class."""

from typing import Any

from vllm.compilation.passes.pass_manager import PostGradPassManager


class CpuPassManager(PostGradPassManager):
    """vLLM's pass manager without its passes, which name CUDA kernels and fail without them.

    A CPU needs none: vLLM's operators are traced as plain torch (`ir_enable_torch_wrap` is off), and inductor restores
    the operators that write in place.
    """

    def __call__(self, graph: Any) -> None:
        return None
