"""What a request body becomes before vLLM reads it. Pure: a JSON object in, another out.

- the exact version answers, so `model` becomes `name@version` (and the reply says so);
- an adapter is asked as it was trained: where the request brings no system text, its manifest's is put first;
- where the base's chat template has no system role, system texts are folded into the first user turn;
- prefix-cache blocks are shared only among requests of one key;
- a stream always reports its usage to us; `wants_usage` says whether the caller asked for it too.
"""

import hashlib
from typing import Any

from serve.openai_errors import Refusal
from train.store import Manifest

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
Body = dict[str, Any]


def prepare(
    path: str,
    body: Body,
    manifest: Manifest | None,
    *,
    salt: str = "",
    max_completion_tokens: int,
    fold_system: bool = False,
) -> Body:
    """The body to hand on; `manifest` is None for the base. Raises Refusal 400 for what the bounds forbid."""
    ready = dict(body)
    for name in _BOUNDS:
        value = body.get(name)
        if isinstance(value, int) and value > max_completion_tokens:
            raise Refusal(400, f"{name} is {value}; at most {max_completion_tokens} is allowed here", param=name)
    if manifest is not None:
        ready["model"] = manifest.id
        if manifest.prompt.get("system"):
            _insert_system(path, ready, manifest.prompt["system"])
    if fold_system and path == CHAT and isinstance(ready.get("messages"), list):
        ready["messages"] = folded(ready["messages"])
    if salt:
        ready["cache_salt"] = hashlib.sha256(f"{salt} {body.get('cache_salt') or ''}".encode()).hexdigest()[:32]
    if ready.get("stream") and path != RESPONSES:
        options = body.get("stream_options")
        ready["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return ready


def folded(messages: list[Any]) -> list[Any]:
    """The same conversation without system turns: their texts, in order, open the first user turn."""
    texts = [_text(message) for message in messages if _is_system(message)]
    rest = [message for message in messages if not _is_system(message)]
    for place, message in enumerate(rest):
        if texts and isinstance(message, dict) and message.get("role") == "user":
            rest[place] = {**message, "content": "\n\n".join([*texts, _text(message)])}
            break
    return rest


def wants_usage(path: str, body: Body) -> bool:
    """Whether the caller asked for the usage chunk at a stream's end."""
    options = body.get("stream_options")
    return path == RESPONSES or bool(isinstance(options, dict) and options.get("include_usage"))


def n_sequences(path: str, body: Body) -> int:
    """How many sequences the engine will run for this body."""
    n = body.get("n")
    times = n if isinstance(n, int) and n > 0 else 1
    prompt = body.get("prompt") if path == COMPLETIONS else None
    # A list of numbers is one prompt of token ids.
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return times * (len(prompt) if several else 1)  # type: ignore[arg-type]


def _insert_system(path: str, body: Body, system: str) -> None:
    if path == CHAT:
        messages = body.get("messages")
        if isinstance(messages, list) and not any(_is_system(message) for message in messages):
            body["messages"] = [{"role": "system", "content": system}, *messages]
    elif path == RESPONSES and not body.get("instructions"):
        given = body.get("input")
        if not (isinstance(given, list) and any(_is_system(message) for message in given)):
            body["instructions"] = system


def _text(message: Body) -> str:
    """A message's text, whether given as one text or in parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")
