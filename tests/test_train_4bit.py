"""A 4-bit base on a CPU has correct gradients after an evaluation pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from counsel.catalog import Base
from train.hardware import TrainHardware, choose_precision
from train.recipe import Recipe
from train.sft import load_base

CPU = TrainHardware("cpu", "here", bf16=True, memory_bytes=24 << 30)


def gradient(base: Base, evaluate_first: bool) -> torch.Tensor:
    """Every adapter gradient of one fixed batch, in one vector."""
    recipe = Recipe(base=str(base.path), load_in_4bit=True, force_4bit=True)
    torch.manual_seed(0)
    model = get_peft_model(
        load_base(recipe, choose_precision(recipe, CPU), base), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.arange(5, 69).view(2, 32)
    if evaluate_first:
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def test_gradients_are_correct_after_an_evaluation_pass(tmp_path):
    """Their cosine to those of a model without an evaluation pass is at least .999 (plain bitsandbytes 0.50: .73)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # Wide enough for the packed kernel: it takes layers whose sizes are multiples of its block.
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2)
    ).to(torch.bfloat16).save_pretrained(tmp_path)  # fmt: skip
    base = Base("tiny", "tiny", "none", tmp_path)

    untouched, evaluated = gradient(base, evaluate_first=False), gradient(base, evaluate_first=True)

    assert untouched.abs().max() > 0
    assert torch.nn.functional.cosine_similarity(untouched, evaluated, dim=0).item() >= 0.999


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch_fused"])
def test_forced_4_bits_keep_the_recipes_optimizer(optimizer):
    """force_4bit keeps base and optimizer as asked, without a downgrade."""
    precision = choose_precision(Recipe(load_in_4bit=True, force_4bit=True, optim=optimizer), CPU)

    assert (precision.load_in_4bit, precision.optimizer, precision.downgrades) == (True, optimizer, ())
