"""Greedy answers of transformers and PEFT, to compare the server with."""

from pathlib import Path
from typing import Any, NamedTuple

Conversation = list[dict[str, str]]


class Greedy(NamedTuple):
    """A greedy answer: per step the chosen token, and by how many logits each runner-up lost."""

    ids: list[int]
    lost_by: list[dict[int, float]]

    def is_near_tie(self, ids: list[int], margin: float) -> bool:
        """Whether the first token in `ids` that differs lost by less than `margin`."""
        step = next((n for n, (ours, theirs) in enumerate(zip(self.ids, ids, strict=False)) if ours != theirs), None)
        return step is not None and self.lost_by[step].get(ids[step], margin) < margin


def greedy_ids(base: Path, adapter: Path | None, messages: Conversation, n_tokens: int) -> list[int]:
    """The base's (or PEFT adapter's) greedy answer in float32: `n_tokens` argmax steps, end-of-sequence ignored.

    Token ids, because tiny models write incomplete characters, which detokenizers handle differently.
    """
    return greedy_answers(base, adapter, [messages], n_tokens)[0].ids


def greedy_answers(base: Path, adapter: Path | None, asked: list[Conversation], n_tokens: int) -> list[Greedy]:
    """`greedy_ids` with the margin of each choice, for several conversations; the model is loaded once."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = _model(base, adapter)
    answers = []
    for messages in asked:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        answer, cache = Greedy([], []), None
        with torch.inference_mode():
            for _ in range(n_tokens):
                step = model(ids, past_key_values=cache, use_cache=True)
                best = step.logits[0, -1].topk(5)
                cache, ids = step.past_key_values, best.indices[None, :1]
                answer.ids.append(int(best.indices[0]))
                lost_by = (best.values[0] - best.values).tolist()
                answer.lost_by.append(dict(zip(best.indices.tolist()[1:], lost_by[1:], strict=True)))
        answers.append(answer)
    return answers


def _model(base: Path, adapter: Path | None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
