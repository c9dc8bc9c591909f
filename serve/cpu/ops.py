"""vLLM's own C++ kernels for norms, offered to eager models on a CPU.

vLLM compiles them for CPUs too but reaches for them only on GPUs: an uncompiled CPU model does each norm as eight torch
operators. A small model's step is largely the cost of launching operators (docs/cpu-lora.md). A `vllm.general_plugins`
entry point runs `register` in vLLM's processes; serve/cpu/platform.py says when the norms are used.
"""

PROVIDER = "counsel_cpu"


def register() -> None:
    """Register the kernels with vLLM; on anything but this project's CPU platform, do nothing."""
    from vllm.platforms import current_platform

    if type(current_platform).__module__ != "serve.cpu.platform":
        return

    import torch
    from vllm import ir

    if PROVIDER in ir.ops.rms_norm.impls:
        return  # vLLM may load a plugin twice in one process

    # vLLM matches the parameters of these by name with the operators'.
    def plain(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        same = weight is not None and weight.dtype == x.dtype
        return variance_size is None and same and x.dim() == 2 and x.is_contiguous()

    def plain_add(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        return plain(x, weight, epsilon, variance_size) and x_residual.is_contiguous()

    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=plain)
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=plain_add, inplace=True)
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual
