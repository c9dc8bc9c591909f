"""vLLM on a base's int8 copy, with adapters, against transformers and PEFT with the same integers, in float32."""

import pytest
import torch

from counsel.catalog import resolve
from serve.int8_base import int8_folder, make_int8
from tests.test_cpu_lora_engine import QUESTIONS, answers, asked, engine_of
from tests.tiny import tiny_adapter, tiny_base

# Rounding turns a difference in the last bit of an activation into a step: with relative noise of 1e-6 on its own, the
# reference's log-probabilities move by up to this much.
BOUND_NATS = {"llama": 0.15, "gemma2": 0.02, "gemma3": 0.035}
pytestmark = pytest.mark.slow  # a separate engine for each kind of model: a minute each


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights have one scale per output, and its inputs one per token: 127 is the largest."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = rounded(layer.weight.data), layer.bias

    def forward(self, x):
        return torch.nn.functional.linear(rounded(x), self.weight, self.bias)


def rounded(numbers):
    # The padding token's embedding is zeros, and so is what follows from it.
    scale = (numbers.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-30)
    return torch.round(numbers / scale) * scale


def reference(base, adapter):
    """transformers' model, or PEFT's, with every linear layer but the vocabulary's in int8; adapters in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, attribute = name.rpartition(".")
            layer.forward = Int8Linear(layer).forward
            assert getattr(model.get_submodule(parent), attribute) is layer
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3"])
def test_each_answer_of_a_mixed_batch_is_the_references(tmp_path, monkeypatch, kind):
    """Base and two adapters in one batch: the log-probability of every answered token, and no token beats it."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny_base(tmp_path / "base", kind=kind)
    paths = [tiny_adapter(folder, tmp_path / f"a{rank}", seed=rank, rank=rank) for rank in (4, 8)]
    base = resolve(str(folder))
    make_int8(base)
    picks = [(question, pick) for question in QUESTIONS for pick in (None, 0, 1)]
    with engine_of(int8_folder(base), enforce_eager=True) as engine:
        outputs = answers(engine, (folder, paths), picks)
    models = {pick: reference(folder, None if pick is None else paths[pick]) for pick in (None, 0, 1)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (question, pick), output in zip(picks, outputs, strict=True):
        text = tokenizer.apply_chat_template(asked(question), tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        answer = list(output.outputs[0].token_ids)
        with torch.inference_mode():
            ids = torch.tensor([prompt + answer])
            scores = {of: model(ids).logits[0].log_softmax(dim=-1) for of, model in models.items()}
        misses = dict.fromkeys(models, 0.0)
        for step, (token, entries) in enumerate(zip(answer, output.outputs[0].logprobs, strict=True)):
            for of in models:
                expected = scores[of][len(prompt) - 1 + step]
                beaten = (expected.max() - expected[token]).item()
                misses[of] = max(misses[of], abs(entries[token].logprob - expected[token].item()), beaten)
        assert misses[pick] < BOUND_NATS[kind], (question, pick)
        if kind != "gemma3":  # its tiny adapters hardly change an answer
            assert min(miss for of, miss in misses.items() if of != pick) > BOUND_NATS[kind], (question, pick, misses)
