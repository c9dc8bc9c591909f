"""vLLM's own C++ norms for eager models on a CPU.

vLLM builds them for CPUs but uses them only on GPUs, so an uncompiled CPU model computes each norm with eight torch
operators. A small model's step is mostly the cost of launching operators (docs/cpu-lora.md). A `vllm.general_plugins`
entry point runs `register` in vLLM's processes; serve/cpu/platform.py decides when the norms are used.
"""

PROVIDER = "counsel_cpu"


def register() -> None:
    """Register the kernels with vLLM, on this project's CPU platform only."""
    from vllm.platforms import current_platform

    if type(current_platform).__module__ != "serve.cpu.platform":
        return

    import torch
    from vllm import ir

    if PROVIDER in ir.ops.rms_norm.impls:
        return  # vLLM may load a plugin twice per process

    # vLLM requires the same parameter names as the operators'.
    def supports_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> bool:
        same_dtype = weight is not None and weight.dtype == x.dtype
        return variance_size is None and same_dtype and x.dim() == 2 and x.is_contiguous()

    def supports_add_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        return supports_norm(x, weight, epsilon, variance_size) and x_residual.is_contiguous()

    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=supports_norm)
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=supports_add_norm, inplace=True)
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual
