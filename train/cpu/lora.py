"""A LoRA layer as one autograd step: the frozen weight and the adapter share each pass over the activations.

PEFT's forward computes the same with five more passes over arrays of the layer's size (cast, scale, add, and their
gradients). On a CPU these cost as much as the adapter's arithmetic.
"""

from types import MethodType
from typing import Any

import torch
from torch.nn import functional


class LoraLinear(torch.autograd.Function):
    """x (..., n) -> x @ weight.T + bias + scale * x @ a.T @ b.T. Only x, a and b get gradients; the rest is frozen."""

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
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        flat, weight, low_a, low_b, inner = ctx.saved_tensors
        shape = grad_outputs[0].shape
        grad_output = grad_outputs[0].reshape(-1, shape[-1]).to(weight.dtype)
        grad_inner = (grad_output @ low_b).mul_(ctx.scale)
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_output @ weight).addmm_(grad_inner, low_a)
            grad_x = grad_x.view(*shape[:-1], -1).to(x_dtype)
        grad_a = (grad_inner.t() @ flat).to(a_dtype)
        grad_b = (grad_output.t() @ inner).to(b_dtype)
        return grad_x, None, None, grad_a, grad_b, None


def fuse_lora(model: Any) -> int:
    """Replace the forward of every plain LoRA linear layer of a PEFT model; return how many were replaced.

    PEFT's own forward stays on layers with dropout, a variant such as DoRA, several adapters, or a quantized base, and
    on every layer while its adapter is disabled or merged.
    """
    from peft.tuners.lora.layer import Linear

    count = 0
    for module in model.modules():
        # The exact type, because subclasses are the quantized layers.
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
