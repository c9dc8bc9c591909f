"""Conversations in training: which tokens are trained, after which prompt, and with which loss and gradients."""

from pathlib import Path

import pytest
import torch
import trl
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from counsel.errors import UserError
from counsel.files import read_json
from tests.test_train_fast import adapted, gradients, slow_loss
from tests.tiny import tiny_base, tiny_tokenizer
from tests.train_runs import recipe_for
from train.cpu.proof import fast_loss, speed_up
from train.prompts import UNSCORED, encode, marks_replies

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral's: no system role of its own, and the system text is in the last user turn.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set asked = messages | selectattr('role', 'eq', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ system + '\n\n' if system and m is eq(asked | last) }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Marks the words of a reply, but not its end of turn.
WORDS_ONLY = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}",
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]  # fmt: skip
OURS = {"chatml": CHATML, "mistral": MISTRAL, "gemma, ours": None, "words only": WORDS_ONLY}
# TRL 1.16's own copies of the templates that models ship, and sequences for three replies.
SHIPPED = {"qwen3": 3, "qwen2_5": 1, "llama3": 1, "gemma3": 1, "phi3": 3, "qwen3_instruct_2507": 1,
           "lfm2": 1, "cohere": 1}  # fmt: skip
MARKED = [f"{name}_training" for name in ("qwen3", "qwen2_5", "llama3", "gemma", "gemma3", "deepseekv3", "lfm2")]


def tokenizer_with(template: str):
    """The tiny tokenizer with one of OURS, or a template that TRL ships by name."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    text = OURS[template] if template in OURS else (TRL_TEMPLATES / f"{template}.jinja").read_text()
    tokenizer.chat_template = text or tokenizer.chat_template
    return tokenizer


def talk(exchanges: int, system: str = "") -> list[dict[str, str]]:
    """A conversation whose replies begin or end with spaces, which some templates trim."""
    turns = [{"role": "system", "content": system}] if system else []
    for n in range(exchanges):
        turns.append({"role": "user", "content": f"i feel lonely {n}" + "?" * n})
        turns.append({"role": "assistant", "content": " " * (n % 2) + f"you are not alone {n}" + "\n" * (n % 3)})
    return turns


def row(messages: list[dict[str, str]]) -> dict:
    return {"question": messages[-2]["content"], "answer": messages[-1]["content"], "messages": messages}


@pytest.mark.parametrize("exchanges", [1, 2, 3])
@pytest.mark.parametrize("system", ["", "listen"])
@pytest.mark.parametrize("template", [*OURS, *SHIPPED])
def test_each_reply_is_trained_after_the_prompt_that_is_served(template, system, exchanges):
    """Some sequence begins with the served prompt of a reply, and there trains the reply with its end of turn."""
    tokenizer, messages = tokenizer_with(template), talk(exchanges, system)

    encoded = encode(tokenizer, [row(messages)], "", 1000, "all")

    labels = 0
    for at in range(len(messages) - 2 * exchanges + 1, len(messages), 2):
        prompt = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(messages[: at + 1], return_dict=False)
        n = len(prompt)
        assert any(
            tokens.ids[: len(whole)] == whole and tokens.labels[n - 1 : len(whole)] == [UNSCORED, *whole[n:]]
            for tokens in encoded.sequences
        )
        labels += len(whole) - n
    # Each reply is trained once.
    assert sum(label != UNSCORED for tokens in encoded.sequences for label in tokens.labels) == labels
    assert (encoded.replies, encoded.replies_lost) == (exchanges, 0)
    rewrites = exchanges if template == "mistral" and system else 1
    assert len(encoded.sequences) == min(exchanges, SHIPPED.get(template, rewrites))


@pytest.mark.parametrize("template", MARKED)
def test_marked_templates_give_trls_assistant_only_loss(template, tmp_path):
    """Ids and labels are those of TRL's trainer with assistant_only_loss, on a conversation and on one exchange."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer, talks = tokenizer_with(template), [talk(3), talk(1), talk(2)]
    trainer = SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(
            vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)),
        args=SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, max_length=512, report_to="none",
                       bf16=False, use_cpu=True),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in talks]),
        processing_class=tokenizer,
    )  # fmt: skip

    encoded = encode(tokenizer, map(row, talks), "", 512, "all")

    assert marks_replies(tokenizer)
    assert encoded.examples() == list(trainer.train_dataset.select_columns(["input_ids", "labels"]))


def test_marks_without_the_end_of_turn_are_not_used():
    """With them the model would not learn to stop, so all that follows the prompt is trained."""
    tokenizer = tokenizer_with("words only")

    (tokens,) = encode(tokenizer, [row(talk(2))], "", 1000, "all").sequences

    assert not marks_replies(tokenizer)
    assert tokens.labels.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3", "qwen3_training"])
def test_the_last_reply_alone(template):
    """`last` trains what a single prompt and completion would."""
    tokenizer, messages = tokenizer_with(template), talk(3, "listen")
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)

    encoded = encode(tokenizer, [row(messages)], "not used", 1000, "last")

    (tokens,) = encoded.sequences
    assert tokens.ids == whole
    assert tokens.labels[: len(prompt)] == [UNSCORED] * len(prompt)
    assert tokens.labels[len(prompt) : -1] == whole[len(prompt) : -1]
    assert encoded.replies == 1


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3", "gemma, ours", "qwen3_training"])
def test_loss_and_gradients_are_those_of_training_turn_by_turn(template, tmp_path):
    """The summed loss and every gradient of a conversation are the sums over its replies, each trained alone.

    On the fast path and by transformers' full logits. The trainer divides both by the same number of labels.
    """
    base = tiny_base(tmp_path / "base", "llama")
    tokenizer, messages = tokenizer_with(template), talk(3, "listen")
    tokenizer_size = len(tokenizer)
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    whole = collate(encode(tokenizer, [row(messages)], "", 1000, "all").examples())
    slow, fast = adapted(base), adapted(base)
    for model in (slow, fast):
        model.get_base_model().resize_token_embeddings(tokenizer_size)
    fast.load_state_dict(slow.state_dict())
    speed_up(fast)

    alone = 0.0
    for end in (3, 5, 7):
        part = collate(encode(tokenizer, [row(messages[:end])], "", 1000, "last").examples())
        loss = slow_loss(slow, part)
        loss.backward()
        alone += loss.item()
    expected = gradients(slow)
    slow.zero_grad()
    for model, loss in ((slow, slow_loss(slow, whole)), (fast, fast_loss(fast, whole))):
        loss.backward()
        assert loss.item() == pytest.approx(alone, rel=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_replies_beyond_max_length_are_counted(template):
    """Of each conversation stays what fits: a reply of which no token does is lost, and so is a row without any."""
    tokenizer, messages = tokenizer_with(template), talk(3)
    starts = [
        len(tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, return_dict=False))
        for at in (1, 3, 5)
    ]
    for limit in (starts[0], starts[0] + 1, starts[1], starts[1] + 1, starts[2], starts[2] + 1):
        kept = sum(start < limit for start in starts)

        encoded = encode(tokenizer, [row(messages)], "", limit, "all")

        assert (encoded.replies, encoded.replies_lost) == (3, 3 - kept)
        assert (encoded.rows, encoded.rows_left_out) == (1, int(not kept))
        assert all(len(tokens.ids) <= limit for tokens in encoded.sequences)
        assert all(any(label != UNSCORED for label in tokens.labels) for tokens in encoded.sequences)


def test_a_greeting_is_not_trained():
    """An assistant turn before the first question answers nothing: a server never generates it."""
    messages = [{"role": "assistant", "content": "hello"}, *talk(1)]

    encoded = encode(tokenizer_with("chatml"), [row(messages)], "", 1000, "all")

    assert encoded.replies == 1


def test_a_conversation_that_the_template_rejects_is_named_by_its_turns():
    """Gemma 3's own template wants user and assistant to take turns."""
    messages = [*talk(1), {"role": "assistant", "content": "and breathe"}]

    with pytest.raises(
        UserError, match="rejects a conversation with the turns user, assistant, assistant: Conversation"
    ):
        encode(tokenizer_with("gemma3"), [row(messages)], "", 1000, "all")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


def with_second_exchange(monkeypatch) -> None:
    """Give each training and validation row a second exchange."""
    from train import data

    prepare = data.prepare

    def prepared(config):
        splits, report = prepare(config)
        for name in ("train", "val"):
            splits[name] = [
                each | {"messages": [
                    {"role": "user", "content": each["question"]}, {"role": "assistant", "content": each["answer"]},
                    {"role": "user", "content": "thank you " + "and " * 30},
                    {"role": "assistant", "content": "sleep " * 9},
                ]} for each in splits[name]
            ]  # fmt: skip
        return splits, report

    monkeypatch.setattr(data, "prepare", prepared)


def test_a_run_on_conversations(base, tmp_path, monkeypatch, capsys):
    """Summary, card and stderr count replies; the validation loss is the mean over the tokens of all of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from counsel.run import Run
    from train.sft import train

    with_second_exchange(monkeypatch)
    recipe = recipe_for(base, tmp_path, store="", max_steps=2, evaluations=1, max_length=200)

    done = train(recipe)

    assert (done["rows"], done["sequences"], done["replies"], done["replies_lost"]) == (24, 24, 48, 0)
    card = (recipe.run_path / "adapter" / "README.md").read_text()
    assert "48 replies of 24 conversations" in card
    assert "trained on 48 answers" in card
    assert "48 replies in 24 sequences, 0 lost by cutting" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    total = count = 0.0
    for each in Run(recipe.run_path).split("val")[: recipe.max_val_rows]:
        messages = [{"role": "system", "content": "listen"}, *each["messages"]]
        for end in (3, 5):
            prompt = tokenizer.apply_chat_template(messages[: end - 1], add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([tokenizer.apply_chat_template(messages[:end], return_dict=False)])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
            count += ids.shape[1] - len(prompt)
    assert done["val_loss_base"] == pytest.approx(total / count, rel=2e-2)


def test_a_run_on_last_replies_that_loses_some(base, tmp_path, monkeypatch, capsys):
    """Cut at 60 tokens, no last reply fits, and the run is refused; with all turns, the first replies are kept."""
    from dataclasses import replace

    from train.sft import train

    with_second_exchange(monkeypatch)
    recipe = recipe_for(base, tmp_path, store="", max_steps=2, evaluations=1, max_length=60, samples=0)

    with pytest.raises(UserError, match="validation rows has a prompt that alone fills 60 tokens"):
        train(replace(recipe, train_on_turns="last"))
    done = train(recipe)

    assert (done["rows"], done["replies"], done["replies_lost"]) == (24, 24, 24)
    assert "24 of 48 training replies lost: they begin after 60 tokens" in capsys.readouterr().err
    assert "Lost to training: 24 replies" in (recipe.run_path / "adapter" / "README.md").read_text()
    assert read_json(recipe.run_path / "config.json")["train_on_turns"] == "all"
