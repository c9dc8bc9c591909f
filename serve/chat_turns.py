"""Which orders of turns a base's chat template accepts, and how a conversation is changed into one that it accepts.

Templates differ: some refuse a system turn, drop it silently, accept one only at the start, or require user and
assistant to alternate, and some have no tools. One rule makes every conversation fit, without dropping or inventing
text: a system turn that a template does not accept becomes a user turn, and consecutive turns of one role that it does
not accept become one turn, joined by a blank line in their order. What still does not fit is refused.
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
    """What a chat template renders completely. The default accepts everything, as most templates do."""

    system_first: bool = True
    system_alone: bool = True
    system_later: bool = True
    developer: bool = True
    repeats: bool = True
    assistant_first: bool = True
    tools: bool = True


ACCEPTS_ALL = Template()


def template_of(tokenizer: Any) -> Template:
    """Find out by rendering each kind of order, with a text in each turn that must appear exactly once."""
    if not tokenizer.chat_template:
        return ACCEPTS_ALL

    def renders(roles: str) -> bool:
        names = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}
        return _renders_all(tokenizer, [{"role": names[role], "content": f"text-{n}"} for n, role in enumerate(roles)])

    called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    answered = {"role": "tool", "tool_call_id": _CALL["id"], "name": "function-1", "content": "text-2"}
    return Template(
        system_first=renders("su") and renders("sua") and renders("suau"),
        system_alone=renders("s") and renders("sa"),
        system_later=all(map(renders, _WITH_SYSTEM_LATER)),
        developer="developer" in tokenizer.chat_template and renders("du"),
        repeats=all(map(renders, ("uu", "uauu", "uaa", "uaau"))),
        assistant_first=renders("a") and renders("au") and renders("aua"),
        tools=_renders_all(tokenizer, [{"role": "user", "content": "text-0"}, called, answered]),
    )


def template_in(model: Path, chat_template: str | None = None) -> Template:
    """The same for a model's folder; `chat_template`, a file or a template itself, replaces the model's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if chat_template:
        from vllm.renderers.hf import load_chat_template

        tokenizer.chat_template = load_chat_template(chat_template)
    return template_of(tokenizer)


def fit_turns(turns: Sequence[Turn], template: Template) -> list[Turn]:
    """The same conversation in an order that `template` accepts. Raises ApiError 400 when there is none."""
    fitted: list[Turn] = []
    first = next((turn.get("role") for turn in turns if turn.get("role") not in SYSTEM_ROLES), None)
    system_first = template.system_first and (template.system_alone or first == "user")
    # Whether the last turn is a user turn made of system texts alone.
    last_from_system = False
    for turn in turns:
        role = turn.get("role")
        at_start = all(before.get("role") in SYSTEM_ROLES for before in fitted)
        new_role = _accepted_role(role, system_first if at_start else template.system_later, template)
        from_system = role in SYSTEM_ROLES and new_role == "user"
        if new_role != role:
            turn = {**turn, "role": new_role}
        last = fitted[-1] if fitted else {}
        no_repeat = not (template.system_later if new_role in SYSTEM_ROLES else template.repeats)
        joins = last_from_system or from_system or no_repeat
        if last.get("role") == new_role and _is_text(last) and _is_text(turn) and joins:
            texts = filter(None, (text_of(last), text_of(turn)))
            fitted[-1] = {**last, "content": BLANK_LINE.join(texts)}
            last_from_system = last_from_system and from_system
        else:
            fitted.append(turn)
            last_from_system = from_system
    _refuse_unfitting(fitted, template)
    return fitted


def _accepted_role(role: Any, system_accepted: bool, template: Template) -> Any:
    if role == "developer" and not template.developer:
        role = "system"
    return "user" if role in SYSTEM_ROLES and not system_accepted else role


def text_of(turn: Turn) -> str:
    """A turn's text, given as a string or in parts."""
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _is_text(turn: Turn) -> bool:
    return turn.get("role") in (*SYSTEM_ROLES, "user", "assistant") and not turn.get("tool_calls")


def _refuse_unfitting(turns: list[Turn], template: Template) -> None:
    first = next((turn.get("role") for turn in turns if turn.get("role") not in SYSTEM_ROLES), None)
    if first == "assistant" and not template.assistant_first:
        raise ApiError(
            400, "this base's chat template accepts no assistant turn before the first user turn", param="messages"
        )
    if not template.tools and any(_uses_tools(turn) for turn in turns):
        raise ApiError(
            400, "this base's chat template has no turns for tools; send their calls and results as text",
            param="messages",
        )  # fmt: skip


def _uses_tools(turn: Turn) -> bool:
    kind = turn.get("type", "message")
    return turn.get("role") in ("tool", "function") or bool(turn.get("tool_calls")) or "call" in str(kind)


def _renders_all(tokenizer: Any, turns: list[Turn]) -> bool:
    """Whether each text appears once, and those of user and assistant in their order."""
    from jinja2 import TemplateError

    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, KeyError):
        # Some templates concatenate a text that is None here.
        return False
    texts = [str(turn["content"]) for turn in turns if turn["content"]]
    names = [call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())]
    if any(text.count(word) != 1 for word in texts) or any(name not in text for name in names):
        return False
    spoken = [turn["content"] for turn in turns if turn["role"] in ("user", "assistant") and turn["content"]]
    places = [text.index(words) for words in spoken]
    return all(before < after for before, after in itertools.pairwise(places))
