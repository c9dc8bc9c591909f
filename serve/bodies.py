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
_SWITCHES = ("stream", "store", "background")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
# vLLM tokenizes bad words on its event loop, twice for each prompt: a megabyte of them would stop every stream.
_BAD_WORDS, _BAD_WORD_CHARS = 128, 4096
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
        if (_whole(body, name) or 0) > max_completion_tokens:
            value = body[name]
            raise Refusal(400, f"{name} is {value}; at most {max_completion_tokens} is allowed here", param=name)
    for name in _SWITCHES:
        if not isinstance(body.get(name), bool | None):
            # vLLM asks some of these before it reads "false" as false.
            raise Refusal(400, f"{name} is {body[name]!r:.40}; it must be true or false", param=name)
    if body.get("background"):
        raise Refusal(
            400, "background is true; only answers that somebody waits for are given here", param="background"
        )
    _refuse_bad_words(body.get("bad_words"))
    for turn in _turns(None, body.get("messages") if path == CHAT else body.get("input")):
        _refuse_media(turn)
    if path == RESPONSES:
        # Nothing is kept for later requests.
        ready["store"] = False
    if manifest is not None:
        ready["model"] = manifest.id
        if manifest.prompt.get("system"):
            _insert_system(path, ready, manifest.prompt["system"])
    if fold_system and path == CHAT and isinstance(ready.get("messages"), list):
        ready["messages"] = folded(ready["messages"])
    if fold_system and path == RESPONSES and ready.get("input"):
        ready["input"] = folded(_turns(ready.pop("instructions", None), ready["input"]))
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
    """How many sequences the engine will run for this body. Raises Refusal 400 when `n` is no whole number."""
    times = max(1, _whole(body, "n") or 1)
    prompt = body.get("prompt") if path == COMPLETIONS else None
    # A list of numbers is one prompt of token ids.
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return times * (len(prompt) if several else 1)  # type: ignore[arg-type]


def _whole(body: Body, name: str) -> int | None:
    """A bounded field. vLLM would read "64" and 64.0 as 64: what we do not read as a number must not reach it."""
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise Refusal(400, f"{name} is {value!r:.40}; it must be a whole number", param=name)


def _refuse_bad_words(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise Refusal(400, "bad_words must be a list of texts", param="bad_words")
    if len(given) > _BAD_WORDS or sum(map(len, given)) > _BAD_WORD_CHARS:
        raise Refusal(
            400, f"bad_words may be {_BAD_WORDS}, of {_BAD_WORD_CHARS} characters together", param="bad_words"
        )


def _refuse_media(turn: Any) -> None:
    """Refuse pictures, sound and files: a multimodal base would fetch whatever address a caller names."""
    parts = turn.get("content") if isinstance(turn, dict) else None
    for part in parts if isinstance(parts, list) else ():
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in _TEXT_PARTS:
            raise Refusal(400, f"a content part is of type {kind!r:.40}; only text is read here", param="messages")


def _turns(instructions: Any, given: Any) -> list[Any]:
    """A responses request's instructions and input as one list of turns."""
    turns = given if isinstance(given, list) else [{"role": "user", "content": given}]
    return [{"role": "system", "content": instructions}, *turns] if instructions else turns


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
