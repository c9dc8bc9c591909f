"""A LoRA layer as one step of autograd: frozen weight and adapter share each pass over the activations.

PEFT's own forward makes the same product with five more passes over arrays of the layer's size (cast, scale, add, and
their gradients), which on a CPU cost as much as the adapter's arithmetic.
"""

from types import MethodType
from typing import Any

import torch
from torch.nn import functional


class LoraLinear(torch.autograd.Function):
    """x (..., n) -> x @ weight.T + bias + scale * x @ a.T @ b.T, with gradients to x, a and b; the rest is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> Any:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)
        inner = functional.linear(flat, low_a).mul_(scale)
        out = functional.linear(flat, weight, bias)
        out.addmm_(inner, low_b.t())
        ctx.save_for_backward(flat, weight, low_a, low_b, inner)
        ctx.scale, ctx.dtypes = scale, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        flat, weight, low_a, low_b, inner = ctx.saved_tensors
        grad_output = upstream[0]
        grad_scores = grad_output.reshape(-1, grad_output.shape[-1]).to(weight.dtype)
        slope_inner = (grad_scores @ low_b).mul_(ctx.scale)
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_scores @ weight).addmm_(slope_inner, low_a)
            grad_x = grad_x.view(*grad_output.shape[:-1], -1).to(x_dtype)
        grad_a = (slope_inner.t() @ flat).to(a_dtype)
        grad_b = (grad_scores.t() @ inner).to(b_dtype)
        return grad_x, None, None, grad_a, grad_b, None


def fuse_lora(model: Any) -> int:
    """Replace the forward of every plain LoRA linear layer of a PEFT model; return how many were.

    Layers with dropout, a variant such as DoRA, several adapters, or a quantised base keep PEFT's own, and so does
    every layer while its adapter is switched off or merged.
    """
    from peft.tuners.lora.layer import Linear

    count = 0
    for module in model.modules():
        # An exact type: subclasses are the quantised layers.
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear and _is_plain(module):
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _is_plain(module: Any) -> bool:
    names = module.active_adapters
    return len(names) == 1 and not module.lora_variant and not getattr(module.lora_dropout[names[0]], "p", 0.0)


def _forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x, *args, **kwargs)
    name = self.active_adapters[0]
    base = self.base_layer
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])
