"""Every causal model family, tiny: those on the fast CPU path train exactly as by the model's own forward."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.families import families, tiny_model
from train.cpu.loss import unsupported_reason
from train.cpu.proof import fast_loss, mismatch, speed_up

# Convolution, Mamba, linear attention or recurrence: packed rows would carry their state from row to row.
MIXES_ROWS = ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "nemotron_h",
              "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba2")  # fmt: skip
# These make their own masks or losses, which the fast path does not support.
UNSUPPORTED = ("bloom", "cohere", "cohere2", "falcon", "mamba", "modernbert-decoder", "mpt", "nemotron", "stablelm")
# Common on CPUs. EXAONE 4 has a window in its config but not on every layer.
FAST = ("apertus", "arcee", "deepseek_v3", "exaone4", "gemma", "gemma3_text", "glm4", "gpt2", "granite", "llama",
        "ministral", "mistral", "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
        "starcoder2")  # fmt: skip
# One of each kind, for a quick run of the tests.
QUICK = ("bamba", "exaone4", "falcon", "gemma3_text", "gpt2", "lfm2", "llama", "nemotron", "qwen3_5_text",
         "recurrent_gemma", "stablelm")  # fmt: skip
# SIZES cannot make these small, or they need a package or a part (another model, images) that is missing here.
NOT_BUILT = ("blt", "cohere_compass_text", "dbrx", "fuyu", "gemma4_assistant", "gemma4_unified_assistant", "got_ocr2",
             "moshi", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text", "reformer",
             "roc_bert", "xlm")  # fmt: skip
# These can be built, but their forward needs more than tokens and a mask.
NEEDS_MORE: tuple[str, ...] = ()


pytestmark = [
    # PEFT splits fused experts by a rank_pattern of its own, part of which matches nothing in some families.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    # transformers' gpt_bigcode compiles its activation with it.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny layers gain nothing from a second thread, and waiting for it takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows() -> dict[str, torch.Tensor]:
    """Three rows of 40, 33 and 21 tokens that share a prefix of 12; answers start at 20, 15 and 14."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (3, 40), generator=generator)
    ids[:, :12] = ids[0, :12]
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (answer, end) in enumerate(((20, 40), (15, 33), (14, 21))):
        mask[row, :end] = 1
        labels[row, answer:end] = ids[row, answer:end]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def lora_for(model) -> LoraConfig:
    """All linear layers, except those that PEFT rejects in Mamba models."""
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
    values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return values


def slow_reason(family: str) -> str | None:
    """Why a tiny model of the family takes TRL's path; None if it takes the fast path, which is then checked."""
    model = tiny_model(family)
    lora = lora_for(model)
    reason = unsupported_reason(model, "cpu") or mismatch(model, lora)
    if reason is None:
        peft_model, inputs = adapted(model, lora), rows()
        expected = own_loss(peft_model, inputs)
        expected.backward()
        expected_gradients = gradients(peft_model)
        speed_up(peft_model)
        loss = fast_loss(peft_model, inputs)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in gradients(peft_model).items():
            scale = float(expected_gradients[name].abs().max())
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3 * scale, msg=name)
    return reason


def check(family: str) -> None:
    reason = slow_reason(family)
    if family in FAST:
        assert reason is None
    if family in (*MIXES_ROWS, *UNSUPPORTED):
        assert reason


@pytest.mark.parametrize("family", QUICK)
def test_a_family_of_each_kind_trains_as_by_its_own_forward(family):
    """Full and windowed attention take the fast path and agree; families that mix rows do not take it."""
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families()) - {*QUICK, *NOT_BUILT, *NEEDS_MORE}))
def test_every_family_trains_as_by_its_own_forward(family):
    """Every family that can be built tiny takes the fast path if it agrees, and TRL's otherwise."""
    if family == "gemma3n" and not importlib.util.find_spec("timm"):
        pytest.skip("its images need timm")
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_BUILT)
def test_excluded_families_cannot_be_built(family):
    """A family that a later transformers can build must move to the test above."""
    with pytest.raises(Exception, match=r".*"):  # each fails in its own way
        tiny_model(family)


@pytest.mark.parametrize("first", ["conv", "full_attention"])
def test_state_that_crosses_between_rows_is_detected(first):
    """LFM2 with convolutions leaves the fast path because its first row changes the second; without, it takes it."""
    from transformers import AutoModelForCausalLM

    from tests.families import tiny_config

    config = tiny_config("lfm2")
    config.layer_types = [first, "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config)

    reason = mismatch(model, lora_for(model))

    assert (reason is None) == (first == "full_attention"), reason
