"""Every served adapter changes what it was trained to change, whatever the names of its base's layers."""

import json
from pathlib import Path

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Phi3Config

from counsel import store as adapter_store
from counsel.adapter_check import check
from counsel.catalog import Base, resolve
from counsel.client import make_client
from counsel.errors import UserError
from counsel.lora_layers import served_layers
from counsel.trial import Trial
from serve.server import Server
from tests.conftest import tiny_config
from tests.tiny import tiny_adapter, tiny_gpt2, tiny_tokenizer

PROMPT = "i feel lonely since we moved"


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny random Phi-3, whose layers are called qkv_proj and gate_up_proj."""
    folder, tokenizer = tmp_path_factory.mktemp("fused") / "phi3", tiny_tokenizer()
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return resolve(str(folder))


def adapter_on(base: Base, path: Path, target: str) -> tuple[Path, list[int]]:
    """An adapter on one kind of layer, and the eight tokens of PEFT's answer with it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=[target])).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    tuned.save_pretrained(path)
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(tuned(torch.tensor([ids])).logits[0, -1].argmax()))
    return path, ids[-8:]


def test_fused_layers_answer_as_peft_and_a_layer_left_out_is_refused(fused, tmp_path):
    """qkv_proj and gate_up_proj give PEFT's answer. down_proj, left out by a flag, gives 404, not the base's answer."""
    expected = {}
    config = tiny_config(
        tmp_path, fused.path, max_loras=4, vllm_args="--lora-target-modules qkv_proj gate_up_proj o_proj"
    )
    for target in ("qkv_proj", "gate_up_proj", "down_proj"):
        source, expected[target] = adapter_on(fused, tmp_path / target, target)
        adapter_store.publish(Path(config.store), target, source, fused)
    with Server(config, quiet=True) as server:
        client = make_client(server.base_url)

        def answer(model: str) -> list[int]:
            reply = client.completions.create(
                model=model, prompt=PROMPT, max_tokens=8, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            return reply.choices[0].model_extra["token_ids"]

        for target in ("qkv_proj", "gate_up_proj"):
            assert answer(target) == expected[target]
        with pytest.raises(openai.NotFoundError, match="does not answer as it was trained to"):
            answer("down_proj")
        assert "down_proj" not in {model.id for model in client.models.list()}


def test_publish_refuses_a_layer_that_vllm_leaves_out(fused, tmp_path, monkeypatch):
    """The error names the layer, and the layers to train instead."""
    source, _ = adapter_on(fused, tmp_path / "a", "o_proj")
    layers = served_layers(fused.path)
    assert set(layers.targets) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    fewer = {layer: place for layer, place in layers.places.items() if "o_proj" not in place}
    monkeypatch.setattr("counsel.adapter_check.served_layers", lambda base: type(layers)(fewer, layers.targets))
    with pytest.raises(UserError, match=r"self_attn.o_proj, which vLLM would leave as in the base; .*qkv_proj"):
        adapter_store.publish(tmp_path / "store", "a", source, fused)
    assert check(source, fused.path, served=False).target_modules == ("o_proj",)  # may be trained, but not published


def test_a_base_without_lora_in_vllm_gets_no_adapter(tmp_path):
    """vLLM serves GPT-2, but no adapter on it."""
    folder = tiny_gpt2(tmp_path / "gpt2")
    assert "no LoRA on GPT2LMHeadModel" in served_layers(folder).refusal
    base = resolve(str(folder))
    with pytest.raises(UserError, match="no LoRA on GPT2LMHeadModel"):
        adapter_store.publish(tmp_path / "store", "a", tiny_adapter(base.path, tmp_path / "a", seed=1), base)


EXPECTED = Trial([1, 2, 3], [-1.0, -2.0], [-1.3, -1.6])


@pytest.mark.parametrize(
    ("base", "adapter", "applied"),
    [
        ([-1.0, -2.0], [-1.3, -1.6], True),
        ([-1.0, -2.0], [-1.0, -2.0], False),
        # In bfloat16, with some more rounding.
        ([-1.01, -1.98], [-1.29, -1.63], True),
        ([-1.01, -1.98], [-1.0, -1.99], False),
        # Not the change that was trained.
        ([-1.0, -2.0], [-0.7, -2.4], False),
        # The engine's rounding is larger than the change: any change is accepted, no change is not.
        ([-1.4, -2.6], [-1.39, -2.6], True),
        ([-1.4, -2.6], [-1.4, -2.6], False),
    ],
)
def test_an_adapter_is_applied_if_it_changes_what_it_changed_in_training(base, adapter, applied):
    """The observed change against the expected one, with an engine's rounding."""
    assert EXPECTED.applied(base, adapter) == applied


def test_the_manifest_is_json(fused, tmp_path):
    """The trial is read back unchanged."""
    source, _ = adapter_on(fused, tmp_path / "a", "qkv_proj")
    manifest = adapter_store.publish(tmp_path / "store", "a", source, fused)
    document = json.loads((adapter_store.version_dir(tmp_path / "store", manifest) / "manifest.json").read_text())
    assert Trial.kept(document["trial"]) == Trial.kept(manifest.trial)
