"""The graph passes that vLLM runs before inductor, for a CPU: none. serve/cpu/platform.py names this class."""

from typing import Any

from vllm.compilation.passes.pass_manager import PostGradPassManager


class CpuPassManager(PostGradPassManager):
    """vLLM's pass manager without its passes, which ask for CUDA's kernels by name and fail where those are missing.

    None is needed: on a CPU vLLM's operators are traced as plain torch (`ir_enable_torch_wrap` is off), and inductor
    itself puts back the operators that write in place.
    """

    def __call__(self, graph: Any) -> None:
        return None
