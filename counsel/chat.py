"""The messages for a question, and our chat templates: training, serving and eval must use the same ones.

Gemma 2's chat template raises on a system role. The stack gives the Gemma family its own template
(`templates/gemma.jinja`), which puts the system text into the first user turn, so the same messages fit every base.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SYSTEM_PROMPT = (
    "You are a supportive conversation partner. Listen, reflect what the person feels, and offer gentle, practical "
    "ideas in plain words. You are a research model, not a clinician: do not diagnose and do not advise on medication. "
    "If someone may be in danger, encourage them to contact local emergency services or a crisis line now."
)

NOTICE = (
    "Counsel Stack is a supportive-conversation research model. It is not a clinician and not for crisis management. "
    "If you or someone else may be in danger, contact your local emergency number or a crisis line "
    "(findahelpline.com lists them by country)."
)

TEMPLATES = Path(__file__).parent / "templates"

Message = dict[str, str]


def prompt_messages(question: str, system: str = SYSTEM_PROMPT) -> list[Message]:
    """The messages that ask `question`: a system turn, unless `system` is empty, and a user turn."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": question}]


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """The whole conversation of a data row, from its first turn to the assistant's last.

    row: its `messages`, if it has any; otherwise its `question` and `answer` (see docs/data.md). Roles are system (at
    most once, first), user and assistant, of which the last two take turns.
    """
    if row.get("messages"):
        return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The messages, which begin with their own system message, or else with `system` unless that is empty."""
    if not system or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def template_text(name: str) -> str:
    """The Jinja source of a chat template shipped with the stack, by the stem of its file (`gemma`)."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
