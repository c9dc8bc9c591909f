"""The fast CPU path computes the same loss and gradients as TRL's, with fewer operations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tiny_base
from train.cpu.lora import fuse_lora
from train.cpu.loss import AnswerLoss, unsupported_reason
from train.cpu.packing import pack
from train.cpu.proof import fast_loss, speed_up


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 40, 33 and 21 tokens that share a prefix of 12; answers start at 20, 15 and 14."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (3, 40), generator=generator)
    ids[:, :12] = ids[0, :12]
    ids[:, 12] = torch.tensor([30, 31, 32])
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (answer, end) in enumerate(((20, 40), (15, 33), (14, 21))):
        mask[row, :end] = 1
        labels[row, answer:end] = ids[row, answer:end]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def adapted(path, dtype=torch.float32):
    """A tiny model with a LoRA whose B is not zero, the same in every call."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    torch.manual_seed(3)
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return peft_model


def slow_loss(model, inputs):
    """The summed loss by transformers' own full logits and torch's cross-entropy."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_config(base, **changes):
    """The base again, random, with its config changed."""
    config = AutoConfig.from_pretrained(base)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    return base


SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("gemma3", {}),
        # Rows of 40, 33 and 21 tokens: windows that end inside the prefix, inside the row, and beyond short rows.
        ("gemma3", {"sliding_window": 5, "layer_types": SLIDING_THEN_FULL}),
        ("gemma3", {"sliding_window": 16, "layer_types": SLIDING_THEN_FULL}),
        ("gemma3", {"sliding_window": 30, "layer_types": SLIDING_THEN_FULL}),
    ],
)
def test_fast_path_gives_the_same_loss_and_gradients(tmp_path, kind, changes):
    """Loss and every adapter gradient agree with padded rows, full logits and PEFT's own layers, to rounding."""
    base = with_config(tiny_base(tmp_path / "base", kind), **changes)
    inputs = batch()
    slow, fast = adapted(base), adapted(base)
    assert unsupported_reason(fast.get_base_model(), "cpu") is None
    assert fuse_lora(adapted(base)) == 14  # seven linear layers in each of two blocks
    speed_up(fast)

    slow_value, fast_value = slow_loss(slow, inputs), fast_loss(fast, inputs)
    slow_value.backward()
    fast_value.backward()

    assert fast_value.item() == pytest.approx(slow_value.item(), rel=1e-5)
    expected, actual = gradients(slow), gradients(fast)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_window_changes_the_loss(tmp_path):
    """Without the window, transformers itself scores the same weights differently, so the test above would notice."""
    base = tiny_base(tmp_path / "base", "gemma3")
    narrow, wide = (
        slow_loss(adapted(with_config(base, sliding_window=window, layer_types=SLIDING_THEN_FULL)), batch()).item()
        for window in (16, 4096)
    )

    assert narrow != pytest.approx(wide, rel=1e-3)


def test_a_batch_is_packed_without_padding():
    """The shared prefix appears once, padding not at all, and each target is the next token of the same row."""
    inputs = batch()

    packed = pack(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])

    # 12 shared tokens, of which the last stays with its rows: 11 + (40 - 11) + (33 - 11) + (21 - 11)
    assert (packed.rows.shared_prefix, packed.ids.shape[1]) == (11, 72)
    assert packed.rows.ends == (40, 62, 72)
    assert packed.positions[0, :12].tolist() == list(range(12))
    assert packed.positions[0, 40].item() == 11
    scored = [(packed.targets[0, start:end] != -100).sum().item() for start, end in packed.rows.spans()]
    assert scored == [20, 18, 7]
    assert packed.targets[0, 39].item() == -100
    assert packed.targets[0, 38].item() == inputs["input_ids"][0, 39].item()


def test_equal_rows_keep_their_own_first_answer_token():
    """Rows with the same prompt still predict their own first answer tokens."""
    ids = torch.tensor([[7, 8, 9, 20], [7, 8, 9, 21]])
    labels = torch.tensor([[-100, -100, -100, 20], [-100, -100, -100, 21]])

    packed = pack(ids, torch.ones_like(ids), labels)

    assert packed.rows.shared_prefix == 2
    assert packed.targets[0].tolist() == [-100, -100, 20, -100, 21, -100]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_answer_loss_matches_cross_entropy(softcap):
    """Value and gradient are those of torch's cross-entropy over the (capped) logits, across chunks of rows."""
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (300,))
    hidden = torch.randn(300, 8, requires_grad=True)
    twin = hidden.detach().clone().requires_grad_()

    total = AnswerLoss.apply(hidden, weight, None, targets, softcap)
    (total * 0.5).backward()
    logits = twin @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected * 0.5).backward()

    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_unsupported_models_get_a_reason(tmp_path):
    """A GPU, eager attention and a router loss leave the model to TRL, with the reason."""
    base = tiny_base(tmp_path / "base", "gemma2")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")

    assert unsupported_reason(model, "cpu") is None
    assert "cuda" in unsupported_reason(model, "cuda")
    model.config.output_router_logits, model.config.router_aux_loss_coef = False, 0.01
    assert "router_aux_loss_coef 0.01" in unsupported_reason(model, "cpu")
    model.set_attn_implementation("eager")
    assert "eager" in unsupported_reason(model, "cpu")
