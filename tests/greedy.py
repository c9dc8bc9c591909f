"""What transformers and PEFT answer, for tests to hold the server against."""

from pathlib import Path
from typing import Any

Conversation = list[dict[str, str]]


def greedy_ids(base: Path, adapter: Path | None, messages: Conversation, n_tokens: int) -> list[int]:
    """The base's (or PEFT adapter's) greedy answer in float32: `n_tokens` argmax steps, end-of-sequence ignored.

    Token ids, since the tiny models write half characters that every detokenizer treats in its own way.
    """
    return greedy_answers(base, adapter, [messages], n_tokens)[0]


def greedy_answers(base: Path, adapter: Path | None, asked: list[Conversation], n_tokens: int) -> list[list[int]]:
    """`greedy_ids` for several conversations with one loading of the model."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = _model(base, adapter)
    answers = []
    for messages in asked:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        said: list[int] = []
        cache = None
        with torch.inference_mode():
            for _ in range(n_tokens):
                step = model(ids, past_key_values=cache, use_cache=True)
                cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
                said.append(int(ids))
        answers.append(said)
    return answers


def _model(base: Path, adapter: Path | None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
