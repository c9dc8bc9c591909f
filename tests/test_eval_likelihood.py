"""Likelihoods are measured on the tokens that training trains: eval's token ids against TRL's for the same row."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from counsel.chat import prompt_messages, template_text
from eval.likelihood import Renderer
from tests.tiny import WORDS, tiny_base, tiny_tokenizer
from train.prompts import examples

SYSTEM = "you are supportive"
QUESTION = "i feel lonely since we moved"
ANSWERS = (
    "talk to a friend",
    "Sleep is hard, I know.\n\nBreathe slowly: café, 😀 ok",
    "a",
    "1) <b>rest</b> & 'listen'",
)

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}BODY"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Each writes around the answer, and changes it, as the family does that it is named after.
TEMPLATES = {
    "gemma": template_text("gemma"),
    "chatml": TURNS.replace("BODY", "{{ m.content }}"),
    "qwen3": TURNS.replace(
        "BODY",
        "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ said }}",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    ),
    "rewriting": TURNS.replace("BODY", "{{ '(' + m.content | replace('\n', ' ') | upper + ')' }}"),
}
# The families' own templates, as shipped with TRL.
SHIPPED = (
    "qwen3",
    "qwen3_5_think",
    "llama3_2",
    "gemma3",
    "phi3_5",
    "deepseek_r1_distill",
    "gptoss",
    "glm4moe",
    "lfm2_v2",
)
TEMPLATES |= {
    f"trl {name}": (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8") for name in SHIPPED
}
RENDERED = {"rewriting": lambda answer: answer.replace("\n", " ").upper()}


def sentencepiece_like() -> Any:
    """Like Llama's and Mistral's: a space belongs to the next word, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    letters = sorted(set("▁" + WORDS.replace(" ", "")))
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special + byte_tokens, initial_alphabet=letters, show_progress=False
    )
    inner.train_from_iterator(WORDS.split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with enough vocabulary for both tokenizers; TRL needs one, with any weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    ))  # fmt: skip


def trained_rows(model: Any, tokenizer: Any, folder: Path) -> list[tuple[list[int], list[int]]]:
    """What TRL trains on: each answer's token ids, and its labels (-100 where nothing is learned)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"question": QUESTION, "answer": answer} for answer in ANSWERS]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), completion_only_loss=True, max_length=512, report_to="none",
                       bf16=False, use_cpu=True),
        train_dataset=Dataset.from_list(examples(rows, SYSTEM)),
        processing_class=tokenizer,
    )  # fmt: skip
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-like"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_eval_scores_the_tokens_that_training_trains(family: str, kind: str, tiny_llama: Any, tmp_path: Path) -> None:
    """The ids are TRL's up to the end of the answer; the scored tokens are trained, and are the answer alone."""
    tokenizer = tiny_tokenizer() if kind == "byte-level" else sentencepiece_like()
    tokenizer.chat_template = TEMPLATES[family]
    tokenizer.save_pretrained(tmp_path)
    renderer = Renderer(tmp_path)

    for answer, (ids, labels) in zip(ANSWERS, trained_rows(tiny_llama, tokenizer, tmp_path), strict=True):
        span = renderer.span(prompt_messages(QUESTION, SYSTEM), answer)
        expected = RENDERED.get(family, lambda text: text)(answer)

        assert span is not None
        assert span.text == expected
        assert span.ids == ids[: len(span.ids)]
        assert all(label != -100 for label in labels[span.start : len(span.ids)])
        scored = tokenizer.decode(span.ids[span.start :])
        # A token may include the space before the answer or the newline after it, and nothing else of the template.
        assert scored.strip() == expected
        assert len(scored) <= len(expected) + 2


def test_an_answer_that_the_template_leaves_out_has_no_span(tmp_path: Path) -> None:
    """The answer is not rendered, so nothing is scored."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)

    assert Renderer(tmp_path).span(prompt_messages(QUESTION, SYSTEM), "talk") is None


def test_the_likelihood_under_a_think_block_is_the_loss_of_training(tmp_path: Path) -> None:
    """Nats by hand from the training row's logits; the raw answer after the generation prompt would differ."""
    import torch
    from transformers import AutoModelForCausalLM

    base = tiny_base(tmp_path / "base", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["qwen3"]
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    (ids, labels), *_ = trained_rows(model, tokenizer, tmp_path)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    learned = {at: -float(logprobs[at - 1, ids[at]]) for at, label in enumerate(labels) if label != -100}
    span = Renderer(base).span(prompt_messages(QUESTION, SYSTEM), ANSWERS[0])
    assert span is not None
    end = [at for at, label in enumerate(labels) if label != -100 and at >= len(span.ids)]
    block = [at for at in learned if at < span.start]

    assert tokenizer.decode([ids[at] for at in block]) == "<think>\n\n</think>\n\n"
    assert tokenizer.decode([ids[at] for at in end]) == "<|im_end|>\n"
    with torch.inference_mode():
        ours = model(torch.tensor([span.ids])).logits[0].log_softmax(-1)
    total = -sum(float(ours[at - 1, span.ids[at]]) for at in range(span.start, len(span.ids)))
    assert total == pytest.approx(sum(learned.values()) - sum(learned[at] for at in [*block, *end]), rel=1e-5)
