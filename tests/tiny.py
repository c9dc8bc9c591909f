"""Tiny random models and adapters, made in about a second: enough for real vLLM, real PEFT and real training.

Their output is noise: they can show that two code paths agree, never that a model is good.
"""

import string
from pathlib import Path

from counsel.chat import template_text
from counsel.manifest import FORMAT, Manifest

WORDS = (
    "i feel lonely since we moved and work is hard what can help me sleep talk to a friend you are not alone "
    "system user assistant model supportive listen breathe slowly thank you for sharing this with me"
)


def tiny_tokenizer():
    """A byte-level BPE tokenizer with a few hundred tokens, Gemma's special tokens and this project's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, string.printable], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=1024
    )
    fast.chat_template = template_text("gemma")
    return fast


def tiny_base(path: Path, kind: str = "gemma2", seed: int = 0) -> Path:
    """Save a random two-layer `gemma2`, `gemma3` or `llama` model with `tiny_tokenizer` in `path`; return `path`."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig

    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # Large enough that greedy output differs between models and logits are not nearly equal.
        "initializer_range": 0.3,
    }
    config = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "llama": LlamaConfig}[kind](**shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    if kind == "gemma2":
        # Gemma scales and ties its embeddings: without this, every token's most likely successor would be itself.
        model.get_input_embeddings().weight.data.mul_(0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_gpt2(path: Path) -> Path:
    """Save a random one-layer GPT-2, a base for which vLLM serves no LoRA, in `path`; return `path`."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_adapter(
    base: Path, path: Path, seed: int, rank: int = 8, targets: tuple[str, ...] | None = None, std: float = 0.1
) -> Path:
    """Save a random LoRA adapter for `base` in `path`, with B far from zero so that output differs; return `path`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets) if targets else "all-linear")
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    peft_model.save_pretrained(path)
    return path


def tiny_manifest(name: str, version: str = "0" * 12, system: str = "", rank: int = 8, base: str = "f00d") -> Manifest:
    """The manifest of an adapter without files; a higher version is a later one."""
    return Manifest(
        format=FORMAT,
        name=name,
        version=version,
        created_utc=f"2026-01-01T00:00:00.{int(version, 16):06d}+00:00",
        base={"name": "tiny", "hub_id": "tiny", "fingerprint": base},
        rank=rank,
        alpha=16.0,
        target_modules=["q_proj"],
        files={},
        prompt={"system": system},
        run=None,
    )
