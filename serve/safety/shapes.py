"""OpenAI's shapes, as far as the crisis gate reads and writes them: the model's strings, and texts of ours."""

import json
import time
from collections.abc import Iterator
from typing import Any

from serve.request_rewrite import CHAT, COMPLETIONS, RESPONSES, Body

FIELD = "counsel_safety"
FILTERED = "content_filter"
DONE = b"data: [DONE]\n\n"
# Fields of a choice or an output item whose strings are not the model's words, or repeat them.
_NOT_WORDS = frozenset(
    ("id", "item_id", "call_id", "type", "role", "index", "status", "object", "finish_reason", "stop_reason",
     "logprobs", "token_ids", "prompt_token_ids", "annotations", "encrypted_content")
)  # fmt: skip
# What the model says to the person, piece by piece. Everything else it writes leaves whole.
SPOKEN = frozenset(("content", "text", "reasoning", "reasoning_content", "refusal"))
_NO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

Place = tuple[str | int, ...]


def words_in(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every string that the model wrote in part of a reply, with its place there."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _NOT_WORDS:
                yield from words_in(inner, (*place, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from words_in(inner, (*place, _place_in_list(number, inner)))


def words_replaced(value: Any, by: dict[Place, str], place: Place = ()) -> Any:
    """The same part with other strings in their places, and without what repeats the old ones."""
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if name not in ("token_ids", "prompt_token_ids")}
        replaced = {
            name: inner if name in _NOT_WORDS else words_replaced(inner, by, (*place, name))
            for name, inner in kept.items()
        }
        return replaced | ({"logprobs": None} if "logprobs" in replaced else {})
    if isinstance(value, list):
        return [words_replaced(inner, by, (*place, _place_in_list(n, inner))) for n, inner in enumerate(value)]
    return by.get(place, value)


def _place_in_list(number: int, item: Any) -> int:
    # A streamed tool call names its place among the others.
    return int(item.get("index", number)) if isinstance(item, dict) else number


def is_structured(body: Body) -> bool:
    """Whether a request asks for an answer of a form that a text of ours would break."""
    response_format = body.get("response_format")
    text = body.get("text")
    formats = (response_format, text.get("format") if isinstance(text, dict) else None)
    asked = any(f is not None and not (isinstance(f, dict) and f.get("type") == "text") for f in formats)
    return asked or body.get("structured_outputs") is not None


def number_of_choices(path: str, body: Body) -> int:
    """How many answers the reply will have."""
    times = body.get("n") or 1
    prompt = body.get("prompt") if path == COMPLETIONS else None
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return int(times) * (len(prompt) if several else 1)  # type: ignore[arg-type]


def head_of(path: str, request_id: str, model: str) -> Body:
    """What every chunk of a stream of ours begins with."""
    prefix, kind = ("chatcmpl", "chat.completion.chunk") if path == CHAT else ("cmpl", "text_completion")
    return {"id": f"{prefix}-{request_id}", "object": kind, "created": int(time.time()), "model": model}


def chunk(path: str, head: Body, index: int, text: str, finish: str | None = None, *, field: Body) -> bytes:
    """One event of a chat or completions stream, with the reply's field `counsel_safety`."""
    said: Body = {"delta": {"role": "assistant", "content": text}} if path == CHAT else {"text": text}
    choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
    return event({**head, "choices": [choice], FIELD: field})


def event(data: Any, kind: str = "") -> bytes:
    """A server-sent event; /v1/responses also names its kind."""
    name = f"event: {kind}\n" if kind else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def whole_body(path: str, head: Body, n: int, text: str, field: Body) -> Body:
    """A reply of ours that is not a stream: `text` in each of `n` answers."""
    if path == RESPONSES:
        return {**response_of(head, "completed", [message_item(head, text)]), FIELD: field}
    said: Body = {"message": {"role": "assistant", "content": text}} if path == CHAT else {"text": text}
    choices = [{"index": n, **said, "logprobs": None, "finish_reason": FILTERED} for n in range(n)]
    kind = "chat.completion" if path == CHAT else "text_completion"
    return {**head, "object": kind, "choices": choices, "usage": _NO_USAGE, FIELD: field}


def response_of(head: Body, status: str, output: list[Body]) -> Body:
    """A response object of ours."""
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return {
        "id": f"resp_{head['id']}", "object": "response", "created_at": head["created"], "model": head["model"],
        "status": status, "output": output, "usage": {**usage, **details}, "error": None, "incomplete_details": None,
        "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None, "top_p": None,
        "tool_choice": "auto", "tools": [],
    }  # fmt: skip


def message_item(head: Body, text: str) -> Body:
    """An output item of ours in a response."""
    part: Body = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
    return {
        "id": f"msg_safety_{head['id']}", "type": "message", "role": "assistant", "status": "completed",
        "content": [part],
    }  # fmt: skip


def item_events(head: Body, text: str, first_number: int, index: int = 0) -> list[bytes]:
    """The six events by which a response's stream sends an output item of ours."""
    item = message_item(head, text)
    part: Body = item["content"][0]
    place: Body = {"item_id": item["id"], "output_index": index, "content_index": 0}
    empty: Body = {**item, "status": "in_progress", "content": []}
    events: list[Body] = [
        {"type": "response.output_item.added", "output_index": index, "item": empty},
        {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
        {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []},
        {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]
    return [event({**e, "sequence_number": first_number + n}, e["type"]) for n, e in enumerate(events)]
