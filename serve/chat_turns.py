"""Which orders of turns a base's chat template takes, and how a conversation is brought into one that it takes.

Templates differ: some refuse a system turn, lose it without a word, take one only at the start, or want user and
assistant in strict alternation, and some know no tools. One rule makes every conversation fit, so that nothing is
dropped and nothing is said that nobody wrote: what a template does not take as a system turn is said by the user, and
turns of one role that it does not take one after the other are one turn, joined by a blank line in their order. What
still does not fit is refused.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.api_errors import ApiError

Turn = dict[str, Any]
BLANK_LINE = "\n\n"
SYSTEM_ROLES = ("system", "developer")
_WITH_SYSTEM_LATER = ("us", "usa", "sus", "suas", "suasu", "ss", "ssu")
_CALL = {"id": "call00000", "type": "function", "function": {"name": "function-1", "arguments": '{"a": 1}'}}


@dataclass(frozen=True)
class Template:
    """What a chat template renders whole. The default is one that takes everything, as most do."""

    system_first: bool = True
    system_alone: bool = True
    system_later: bool = True
    developer: bool = True
    repeats: bool = True
    assistant_first: bool = True
    tools: bool = True


TAKES_ALL = Template()


def template_of(tokenizer: Any) -> Template:
    """Find out by rendering: each kind of order, with a text in each turn that must come out once."""
    if not tokenizer.chat_template:
        return TAKES_ALL

    def keeps(roles: str) -> bool:
        names = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}
        return _renders(tokenizer, [{"role": names[role], "content": f"text-{n}"} for n, role in enumerate(roles)])

    called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    answered = {"role": "tool", "tool_call_id": _CALL["id"], "name": "function-1", "content": "text-2"}
    return Template(
        system_first=keeps("su") and keeps("sua") and keeps("suau"),
        system_alone=keeps("s") and keeps("sa"),
        system_later=all(map(keeps, _WITH_SYSTEM_LATER)),
        developer="developer" in tokenizer.chat_template and keeps("du"),
        repeats=all(map(keeps, ("uu", "uauu", "uaa", "uaau"))),
        assistant_first=keeps("a") and keeps("au") and keeps("aua"),
        tools=_renders(tokenizer, [{"role": "user", "content": "text-0"}, called, answered]),
    )


def template_in(model: Path, chat_template: str | None = None) -> Template:
    """The same for a model's folder; `chat_template`, a file or a text, in place of the model's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if chat_template:
        from vllm.renderers.hf import load_chat_template

        tokenizer.chat_template = load_chat_template(chat_template)
    return template_of(tokenizer)


def settle(turns: Sequence[Turn], template: Template) -> list[Turn]:
    """The same conversation as `template` takes it. Raises ApiError 400 where there is no such order."""
    settled: list[Turn] = []
    first = next((turn.get("role") for turn in turns if turn.get("role") not in SYSTEM_ROLES), None)
    opens = template.system_first and (template.system_alone or first == "user")
    # Whether the last one holds only texts of system turns that the user says.
    lent = False
    for turn in turns:
        role = turn.get("role")
        opening = all(before.get("role") in SYSTEM_ROLES for before in settled)
        said = _said_as(role, opens if opening else template.system_later, template)
        borrowed = role in SYSTEM_ROLES and said == "user"
        if said != role:
            turn = {**turn, "role": said}
        before = settled[-1] if settled else {}
        once = not (template.system_later if said in SYSTEM_ROLES else template.repeats)
        if before.get("role") == said and _is_text(before) and _is_text(turn) and (lent or borrowed or once):
            texts = filter(None, (text_of(before), text_of(turn)))
            settled[-1] = {**before, "content": BLANK_LINE.join(texts)}
            lent = lent and borrowed
        else:
            settled.append(turn)
            lent = borrowed
    _refuse_what_does_not_fit(settled, template)
    return settled


def _said_as(role: Any, taken: bool, template: Template) -> Any:
    if role == "developer" and not template.developer:
        role = "system"
    return "user" if role in SYSTEM_ROLES and not taken else role


def text_of(turn: Turn) -> str:
    """A turn's text, whether given as one text or in parts."""
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _is_text(turn: Turn) -> bool:
    return turn.get("role") in (*SYSTEM_ROLES, "user", "assistant") and not turn.get("tool_calls")


def _refuse_what_does_not_fit(turns: list[Turn], template: Template) -> None:
    first = next((turn.get("role") for turn in turns if turn.get("role") not in SYSTEM_ROLES), None)
    if first == "assistant" and not template.assistant_first:
        raise ApiError(
            400, "this base's chat template takes no assistant turn before the first user turn", param="messages"
        )
    if not template.tools and any(_is_of_tools(turn) for turn in turns):
        raise ApiError(
            400, "this base's chat template has no turns for tools: send their calls and results as text",
            param="messages",
        )  # fmt: skip


def _is_of_tools(turn: Turn) -> bool:
    kind = turn.get("type", "message")
    return turn.get("role") in ("tool", "function") or bool(turn.get("tool_calls")) or "call" in str(kind)


def _renders(tokenizer: Any, turns: list[Turn]) -> bool:
    """Whether each text comes out once, and those of user and assistant in their order."""
    from jinja2 import TemplateError

    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, KeyError):
        # Some templates join a text with nothing, where they do not expect it missing.
        return False
    texts = [str(turn["content"]) for turn in turns if turn["content"]]
    names = [call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())]
    if any(text.count(word) != 1 for word in texts) or any(name not in text for name in names):
        return False
    said = [turn["content"] for turn in turns if turn["role"] in ("user", "assistant") and turn["content"]]
    places = [text.index(words) for words in said]
    return all(before < after for before, after in itertools.pairwise(places))
