"""What the turns of a request may hold: text, tool calls and their results. Everything else is refused.

A multimodal base fetches any address that a caller names, and vLLM recognizes an image by a dozen different fields. So
this module does not search for them: each turn is built again from the fields known below, and a part of one that is
not exactly text is an error. What clients add to a turn for themselves (ids, times, cache marks) is left out.
"""

from typing import Any

from serve.api_errors import ApiError

Turn = dict[str, Any]
# Type of a part -> the field that holds its text.
_TEXT_OF = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
_TEXT_OF |= {"summary_text": "text", "reasoning_text": "text"}
_IGNORED = ("type", "cache_control", "annotations", "logprobs", "id")
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "tools")
_MEDIA = ("images", "audio", "video", "files")
_ITEM_FIELDS = {
    "function_call": ("type", "id", "call_id", "name", "namespace", "arguments", "status"),
    "function_call_output": ("type", "id", "call_id", "output", "status"),
    "custom_tool_call": ("type", "id", "call_id", "name", "input", "status"),
    "custom_tool_call_output": ("type", "id", "call_id", "output", "status"),
    "reasoning": ("type", "id", "summary", "content", "encrypted_content", "status"),
}


def messages_of(given: Any) -> list[Turn]:
    """The messages of a chat request. Raises ApiError 400, with the place, for what is not text."""
    if not isinstance(given, list):
        raise ApiError(400, "messages must be a list of turns", param="messages")
    return [_message(turn, f"messages.{n}") for n, turn in enumerate(given)]


def items_of(given: Any) -> str | list[Turn]:
    """The input of a responses request. Raises ApiError 400, with the place, for what is not text."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise ApiError(400, "input must be a string or a list of turns", param="input")
    return [_item(item, f"input.{n}") for n, item in enumerate(given)]


def _message(turn: Any, place: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ApiError(400, f"{place} is not a message; it must be an object with a role", param=place)
    for name in _MEDIA:
        if turn.get(name):
            raise ApiError(400, f"{place}.{name} is given; only text is supported", param=place)
    kept = {name: turn[name] for name in _MESSAGE_FIELDS if turn.get(name) is not None and turn[name] != []}
    content = turn.get("content")
    if content is None and isinstance(turn.get("refusal"), str):
        # A model's refusal comes back in the form in which OpenAI returned it.
        content = turn["refusal"]
    kept["content"] = _content(content, "text", f"{place}.content")
    return kept


def _item(item: Any, place: str) -> Turn:
    kind = item.get("type") or "message" if isinstance(item, dict) else None
    if kind == "message":
        message = _message(item, place)
        if message["role"] != "assistant":
            message["content"] = _content(message["content"], "input_text", f"{place}.content")
            return message
        return _answer(message, item, place)
    if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
        raise ApiError(
            400,
            f"{place} is of type {kind!r:.40}; only messages, reasoning, and function calls and their outputs are "
            "supported",
            param=place,
        )
    kept = {name: item[name] for name in _ITEM_FIELDS[kind] if item.get(name) is not None}
    if "output" in kept:
        kept["output"] = _content(kept["output"], "input_text", f"{place}.output")
    if kind == "reasoning":
        # vLLM reads only the first part.
        kept["summary"] = _one_part(kept.get("summary"), "summary_text", f"{place}.summary")
        kept["content"] = _one_part(kept.get("content"), "reasoning_text", f"{place}.content")
    return kept


def _answer(message: Turn, item: Turn, place: str) -> Turn:
    """An assistant's turn in the form vLLM requires: with an id, a status, and all of its text in one part."""
    content = message["content"]
    if isinstance(content, str) or content is None:
        return message
    text = "".join(part["text"] for part in content)
    part = {"type": "output_text", "text": text, "annotations": []}
    status = item.get("status") or "completed"
    return {
        "type": "message",
        "id": item.get("id") or f"msg_{place.rpartition('.')[2]}",
        "role": "assistant",
        "status": status,
        "content": [part],
    }


def _one_part(given: Any, kind: str, place: str) -> list[Turn]:
    parts = _content(given or [], kind, place)
    text = "".join(part["text"] for part in parts) if isinstance(parts, list) else parts
    return [{"type": kind, "text": text}] if text else []


def _content(given: Any, kind: str, place: str) -> Any:
    """The content as it is passed on: a string, or parts that are all of `kind`."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise ApiError(400, f"{place} must be a string or a list of parts", param=place)
    return [{"type": kind, "text": _text(part, f"{place}.{n}")} for n, part in enumerate(given)]


def _text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = (part.get("type") or "text") if isinstance(part, dict) else None
    field = _TEXT_OF.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise ApiError(400, f"{place} is of type {kind!r:.40}; only text is supported", param=place)
    if not isinstance(part.get(field), str):
        raise ApiError(400, f"{place} has no text in {field!r}; only text is supported", param=place)
    other = next((name for name in part if name not in (*_IGNORED, field) and part[name] is not None), None)
    if other is not None:
        raise ApiError(400, f"{place} contains {other!r:.40}; only text is supported", param=place)
    return str(part[field])
