"""Checks, on a copy of the model before training, that the fast path computes what the model itself computes.

A config does not show how a model mixes tokens. A layer with convolution, recurrence or its own kind of attention would
read the packed rows (train/cpu/packing.py) as one sequence. So two short rows go through the model's own forward and
through the fast path, in fp32, with the adapter that will be trained. The loss and every gradient must agree, and the
first row must not influence the second.
"""

import copy
import gc
from typing import Any

import torch

from train.cpu.lora import fuse_lora
from train.cpu.loss import add_answer_loss, drop_needless_casts
from train.cpu.packing import ATTENTION, pack, register

# In fp32 equal losses differ by about 1e-6; state that crosses between rows changes the loss by 1e-4 or more.
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-3


def speed_up(model: Any) -> None:
    """Put a PEFT model on the fast path: its base then accepts `targets` and `rows`, which `fast_loss` passes."""
    causal = model.get_base_model()
    register()
    causal.set_attn_implementation(ATTENTION)
    add_answer_loss(causal)
    fuse_lora(model)
    drop_needless_casts(model)


def fast_loss(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The summed loss, in nats, of a right-padded batch (input_ids, attention_mask, labels) on the fast path."""
    batch = pack(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    # transformers makes each layer's mask from this one. It covers the longest row, and so the shorter ones.
    mask = torch.ones(1, batch.rows.longest, dtype=torch.long)
    return model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=mask,
        targets=batch.targets,
        rows=batch.rows,
    )


def mismatch(model: Any, lora: Any) -> str | None:
    """How the fast path differs from TRL on `model` (causal, without adapter) with the PEFT config `lora`; None if not.

    The model does not change. Needs memory for a copy of it in fp32.
    """
    # Making an adapter draws random numbers; the run's own generator must not advance.
    with torch.random.fork_rng(devices=[]):
        try:
            return _first_difference(model, lora)
        except Exception as error:  # whatever fails in an unknown model, TRL trains it, and the run reports why
            return f"the fast path fails on this model ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        finally:
            gc.collect()  # a patched copy refers to itself


def _first_difference(model: Any, lora: Any) -> str | None:
    inputs = _two_rows(model.config.get_text_config().vocab_size)
    _try_training_step(model, lora, inputs)
    copied = _adapted_copy(model, lora, torch.float32)
    own_loss, own_gradients = _own_loss(copied, inputs), _gradients(copied)
    speed_up(copied)
    total = fast_loss(copied, inputs)
    total.backward()
    fast_total, fast_gradients = float(total.detach()), _gradients(copied)
    second, second_after = _second_row(copied, inputs), _second_row(copied, _with_another_first_row(inputs))
    if not _close(fast_total, own_loss, LOSS_TOLERANCE):
        return f"the fast path's loss is {fast_total:.5f} on two rows where the model's own is {own_loss:.5f}"
    if not _close(second, second_after, LOSS_TOLERANCE):
        return f"the first row changes the loss of the second from {second:.5f} to {second_after:.5f} on the fast path"
    # A gradient that is nearly zero holds only rounding errors.
    least = 1e-3 * max(float(own.norm()) for own in own_gradients.values())
    for name, own in own_gradients.items():
        difference = float((fast_gradients[name] - own).norm()) / max(float(own.norm()), least)
        if not difference <= GRADIENT_TOLERANCE:
            return f"the fast path's gradient of {name} differs by {difference:.1%}"
    return None


def _two_rows(vocab_size: int) -> dict[str, torch.Tensor]:
    """Rows of 44 and 30 tokens that share their first 9; the answers are the last 22 and 16."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size // 4, vocab_size, (2, 44), generator=generator)
    ids[1, :9] = ids[0, :9]
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (answer, end) in enumerate(((22, 44), (14, 30))):
        mask[row, :end] = 1
        labels[row, answer:end] = ids[row, answer:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _with_another_first_row(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows, with other tokens after the shared prefix of the first row."""
    ids, labels = inputs["input_ids"].clone(), inputs["labels"].clone()
    ids[0, 9:] = ids[0, 9:].flip(0)
    labels[0, 22:] = ids[0, 22:]
    return {**inputs, "input_ids": ids, "labels": labels}


def _adapted_copy(model: Any, lora: Any, dtype: torch.dtype) -> Any:
    """A copy of the model in `dtype` with an adapter that has an effect: a new adapter adds zero."""
    from peft import get_peft_model

    copied = get_peft_model(copy.deepcopy(model).to(dtype), copy.deepcopy(lora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in copied.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return copied.eval()


def _try_training_step(model: Any, lora: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Check that one training step runs: dropout is on, and bf16 goes through autocast."""
    copied = _adapted_copy(model, lora, model.dtype).train()
    speed_up(copied)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = fast_loss(copied, inputs)
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {float(loss)}")


def _own_loss(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """The summed loss by the model's own forward; its gradients stay in the adapter."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    return float(loss.detach())


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's gradients, cleared from the model."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def _second_row(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """The loss of the second row alone, on the fast path, in a batch with the first."""
    labels = inputs["labels"].clone()
    labels[0] = -100
    with torch.no_grad():
        return float(fast_loss(model, {**inputs, "labels": labels}))


def _close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * abs(other)
