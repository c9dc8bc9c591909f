"""Conversations in every order of roles, through chat templates of many families: nothing lost, nothing added."""

import itertools
from pathlib import Path

import pytest

from counsel.chat import template_text
from serve.api_errors import ApiError
from serve.chat_turns import Template, fit_turns, template_in, template_of
from tests.tiny import tiny_tokenizer

ROLES = ("system", "developer", "user", "assistant")
ORDERS = [roles for n in (1, 2, 3, 4) for roles in itertools.product(ROLES, repeat=n)]

# Short forms of the templates of well-known families.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
QWEN = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% endif %}{% endfor %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ (system if loop.first else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
FIRST_SYSTEM_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' and loop.first %}[S]{{ m.content }}"
    "{% elif m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEMPLATES = {
    "ours for Gemma": template_text("gemma"),
    "ChatML": CHATML,
    "Qwen": QWEN,
    "Gemma 2": GEMMA_2,
    "Llama 2": LLAMA_2,
    "first system only": FIRST_SYSTEM_ONLY,
    "no system": NO_SYSTEM,
}


def tokenizer_with(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_order_of_four_turns_is_rendered_completely_or_refused(name):
    """340 orders: each text once and in its place, no other text, only roles that the template has; or a 400."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    template = template_of(tokenizer)
    refused = []
    for roles in ORDERS:
        turns = [{"role": role, "content": f"words{n}"} for n, role in enumerate(roles)]
        try:
            fitted = fit_turns(turns, template)
        except ApiError as error:
            refused.append((error, next(role for role in roles if role not in ("system", "developer"))))
            continue
        text = tokenizer.apply_chat_template(fitted, tokenize=False, add_generation_prompt=True)
        assert [text.count(turn["content"]) for turn in turns] == [1] * len(turns), (roles, text)
        spoken = [text.index(turn["content"]) for turn in turns if turn["role"] in ("user", "assistant")]
        assert spoken == sorted(spoken), (roles, text)
        assert "developer" not in text, (roles, text)
    # Only templates that require a user turn first refuse, and only a conversation that an assistant begins.
    for error, first in refused:
        assert (error.status, first) == (400, "assistant")
        assert "no assistant turn before the first user turn" in error.message
    assert (len(refused) > 0) == (name in ("Gemma 2", "Llama 2"))


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        ("u", "[user]0"),
        ("s", "[user]0"),
        ("su", "[user]0+1"),
        ("us", "[user]0+1"),
        ("uu", "[user]0+1"),
        ("ssu", "[user]0+1+2"),
        ("dsu", "[user]0+1+2"),
        ("suas", "[user]0+1[model]2[user]3"),
        ("suasu", "[user]0+1[model]2[user]3+4"),
        ("uaau", "[user]0[model]1+2[user]3"),
        ("au", "[model]0[user]1"),
    ],
)
def test_our_gemma_template_has_two_roles(roles, text):
    """Written by hand: system and developer texts become the user's, and neighbors become one turn."""
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}
    turns = [{"role": names[role], "content": str(n)} for n, role in enumerate(roles)]
    expected = "<bos>"
    for part in text.split("[")[1:]:
        role, words = part.split("]")
        turn_text = words.replace("+", "\n\n")
        expected += f"<start_of_turn>{role}\n{turn_text}<end_of_turn>\n"
    tokenizer = tokenizer_with(template_text("gemma"))
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    with_start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert with_start == expected + "<start_of_turn>model\n"


def test_parts_and_empty_texts_in_our_gemma_template():
    """All parts of a system text are kept; a turn without text adds no blank line."""
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]
    turns = [{"role": "system", "content": parts}, {"role": "user", "content": ""}, {"role": "user", "content": "hi"}]
    text = tokenizer_with(template_text("gemma")).apply_chat_template(turns, tokenize=False)
    assert text == "<bos><start_of_turn>user\nbe kind\n\nhi<end_of_turn>\n"


TOOL_TURNS = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]},
    {"role": "tool", "content": "sunny", "tool_call_id": "1"},
]


def test_tool_turns_need_a_template_with_tools():
    """A call or a result that the template would drop is a 400; a template with tools gets them unchanged."""
    assert fit_turns(TOOL_TURNS, template_of(tokenizer_with(QWEN))) == TOOL_TURNS
    for text in (template_text("gemma"), CHATML, NO_SYSTEM):
        with pytest.raises(ApiError, match="no turns for tools") as refused:
            fit_turns(TOOL_TURNS, template_of(tokenizer_with(text)))
        assert refused.value.status == 400


def test_rendering_shows_what_a_template_accepts(tmp_path: Path):
    """The families' known limits; a model without a template accepts everything."""
    assert template_of(tokenizer_with(template_text("gemma"))) == Template(tools=False)
    assert template_of(tokenizer_with(QWEN)) == Template(developer=False)
    strict = Template(False, False, False, developer=False, repeats=False, assistant_first=False, tools=False)
    assert template_of(tokenizer_with(GEMMA_2)) == strict
    tokenizer = tokenizer_with(CHATML)
    tokenizer.save_pretrained(tmp_path)
    assert template_in(tmp_path, chat_template=NO_SYSTEM).system_first is False
    tokenizer.chat_template = None
    assert template_of(tokenizer) == Template()


def test_system_texts_are_joined_for_a_template_with_one_system_turn():
    """Two system turns at the start become one; a later one becomes the user's."""
    turns = [{"role": role, "content": str(n)} for n, role in enumerate(("system", "developer", "user", "system"))]
    fitted = fit_turns(turns, template_of(tokenizer_with(FIRST_SYSTEM_ONLY)))
    assert fitted == [{"role": "system", "content": "0\n\n1"}, {"role": "user", "content": "2\n\n3"}]
