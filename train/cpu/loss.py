"""The loss on the answer tokens only, without logits for the prompt: TRL's loss, faster on a CPU.

On a CPU, TRL 1.16 projects every position of a row onto the vocabulary, in fp32 tiles, and does it twice (it recomputes
in the backward pass), although the loss counts only the answer. Here only answer positions reach the output head, in
the base's own precision, and the gradient of the hidden states is computed in the same pass over the logits.
`make bench-train` measures the effect; tests/test_train_fast.py checks that the loss agrees.
"""

import functools
from typing import Any

import torch
from torch.nn import functional

# Rows of logits held at a time. (128, 262144) in fp32 is 128 MB, and the logits of a small vocabulary stay in cache.
CHUNK_ROWS = 128


class AnswerLoss(torch.autograd.Function):
    """Summed negative log-likelihood of `targets` (N,) under `hidden` (N, H) @ `weight` (V, H).T, in nats."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, softcap: float | None) -> Any:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = functional.linear(hidden[rows].to(weight.dtype), weight, bias).float()
            if softcap is not None:
                squashed = torch.tanh(logits / softcap)
                logits = squashed * softcap
            chunk_targets = targets[rows].unsqueeze(-1)
            log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_total - logits.gather(-1, chunk_targets)).sum()
            if gradient is None:
                continue
            # d loss / d logits = softmax - one-hot, written over the logits.
            grad_logits = logits.sub_(log_total).exp_()
            grad_logits.scatter_add_(-1, chunk_targets, torch.full_like(chunk_targets, -1, dtype=grad_logits.dtype))
            if softcap is not None:
                grad_logits.mul_(1 - squashed * squashed)
            gradient[rows] = grad_logits.to(weight.dtype) @ weight
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.gradient * grad_outputs[0].to(ctx.gradient.dtype), None, None, None, None


def unsupported_reason(model: Any, device: str) -> str | None:
    """Why the fast path is not tried with a causal model on `device`; None if it is (see train/cpu/proof.py)."""
    if device != "cpu":
        return f"the device is {device}, where TRL's own kernel already scores answer tokens only"
    if getattr(model, "is_quantized", False):
        return "the base is quantized"
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"attention is {config._attn_implementation}"
    # SFTTrainer then adds the router's loss to that of the answers.
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0:
        return f"the model has router_aux_loss_coef {config.router_aux_loss_coef}"
    if getattr(model, "base_model", model) is model:
        return "the model has no separate backbone"
    return None


def add_answer_loss(model: Any) -> None:
    """Make a causal model accept `model(..., targets=targets)`: the summed loss over targets that are not -100.

    A target is the token to predict at its own position: labels shifted left by one. This goes through the model's own
    forward, so that wrappers such as DistributedDataParallel see the call.
    """
    original = model.forward
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    # generate() checks its arguments against the signature, which wraps() keeps.
    @functools.wraps(type(model).forward)
    def forward(*args: Any, targets: Any = None, **kwargs: Any) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        kwargs.pop("labels", None)
        hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        answers = targets != -100
        head = model.get_output_embeddings()
        return AnswerLoss.apply(hidden[answers], head.weight, head.bias, targets[answers], softcap)

    model.forward = forward


def drop_needless_casts(model: Any) -> None:
    """Stop PEFT from casting each activation to fp32 for the adapter: autocast would cast it back to bf16."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, because each step allocates the same large blocks again.

    By default glibc maps each block above 32 MB anew, and the kernel zeroes its pages at every step.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 64 << 20)
