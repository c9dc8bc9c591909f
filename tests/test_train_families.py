"""Every causal family of transformers, tiny: what takes the fast CPU path trains as the model's own forward does."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.families import families, tiny_model
from train.cpu.loss import unservable_reason
from train.cpu.proof import loss_of, speed_up, why_unproven

# Convolution, Mamba, linear attention or recurrence: a line of rows would carry their state from row to row.
MIXES_ROWS = ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "nemotron_h",
              "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba2")  # fmt: skip
# Their own masks or losses, which the fast path does not make.
OTHERWISE_OWN = ("bloom", "cohere", "cohere2", "falcon", "mamba", "modernbert-decoder", "mpt", "nemotron", "stablelm")
# What people train on a CPU; EXAONE 4 has a window on its object and not on every layer.
FAST = ("apertus", "arcee", "deepseek_v3", "exaone4", "gemma", "gemma3_text", "glm4", "gpt2", "granite", "llama",
        "ministral", "mistral", "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
        "starcoder2")  # fmt: skip
# The same in a plain run of the tests: one of each kind.
QUICK = ("bamba", "exaone4", "falcon", "gemma3_text", "gpt2", "lfm2", "llama", "nemotron", "qwen3_5_text",
         "recurrent_gemma", "stablelm")  # fmt: skip
# What these names cannot make small, or what needs a package or a part (another model, images) that is not here.
NOT_BUILT = ("blt", "cohere_compass_text", "dbrx", "fuyu", "gemma4_assistant", "gemma4_unified_assistant", "got_ocr2",
             "moshi", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text", "reformer",
             "roc_bert", "xlm")  # fmt: skip
# What is built, and whose own forward wants more than tokens and a mask.
NEEDS_MORE: tuple[str, ...] = ()


@pytest.fixture(autouse=True)
def one_thread():
    """Layers of this size gain nothing from a second thread, and its waiting costs most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows() -> dict[str, torch.Tensor]:
    """Three rows of 40, 33 and 21 tokens that share an opening of 12; answers begin at 20, 15 and 14."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (3, 40), generator=generator)
    ids[:, :12] = ids[0, :12]
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (answer, end) in enumerate(((20, 40), (15, 33), (14, 21))):
        mask[row, :end] = 1
        labels[row, answer:end] = ids[row, answer:end]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def lora_for(model) -> LoraConfig:
    """All linear layers, but for those that PEFT refuses in Mamba models."""
    refused = ["out_proj", "conv1d"] if model.config.model_type in ("falcon_h1", "nemotron_h") else None
    return LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", exclude_modules=refused, task_type="CAUSAL_LM")


def adapted(model, lora):
    """The model with an adapter whose B is not zero."""
    torch.manual_seed(3)
    peft_model = get_peft_model(model, lora)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return peft_model.eval()


def own_loss(model, inputs):
    """The summed loss of each row alone, without padding, by the model's own forward and torch's cross-entropy."""
    total = torch.zeros(())
    for ids, mask, labels in zip(*(inputs[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length]).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(
            logits, labels[1:length], ignore_index=-100, reduction="sum"
        )  # fmt: skip
    return total


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def verdict(family: str) -> str | None:
    """Why a tiny model of the family takes TRL's own path; None where it takes the fast one and that was right."""
    model = tiny_model(family)
    lora = lora_for(model)
    reason = unservable_reason(model, "cpu") or why_unproven(model, lora)
    if reason is None:
        peft_model, inputs = adapted(model, lora), rows()
        expected = own_loss(peft_model, inputs)
        expected.backward()
        expected_gradients = gradients(peft_model)
        speed_up(peft_model)
        found = loss_of(peft_model, inputs)
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in gradients(peft_model).items():
            scale = float(expected_gradients[name].abs().max())
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3 * scale, msg=name)
    return reason


def check(family: str) -> None:
    reason = verdict(family)
    if family in FAST:
        assert reason is None
    if family in (*MIXES_ROWS, *OTHERWISE_OWN):
        assert reason


@pytest.mark.parametrize("family", QUICK)
def test_a_family_of_each_kind_trains_as_by_its_own_forward(family):
    """Full and windowed attention take the fast path and are right; what mixes rows does not take it."""
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families()) - {*QUICK, *NOT_BUILT, *NEEDS_MORE}))
def test_every_family_trains_as_by_its_own_forward(family):
    """All that can be built tiny: the fast path where it is right, and TRL's own elsewhere."""
    if family == "gemma3n" and not importlib.util.find_spec("timm"):
        pytest.skip("its images need timm")
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_BUILT)
def test_what_is_left_out_cannot_be_built(family):
    """A family that transformers' next version makes buildable is to move into the test above."""
    with pytest.raises(Exception, match=r".*"):  # each fails in its own way
        tiny_model(family)


@pytest.mark.parametrize("first", ["conv", "full_attention"])
def test_state_that_crosses_between_rows_is_what_is_found(first):
    """LFM2 with convolutions is refused for what the first row does to the second; without, it takes the fast path."""
    from transformers import AutoModelForCausalLM

    from tests.families import tiny_config

    config = tiny_config("lfm2")
    config.layer_types = [first, "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config)

    reason = why_unproven(model, lora_for(model))

    assert (reason is None) == (first == "full_attention"), reason
