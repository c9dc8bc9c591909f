"""What a request body becomes before vLLM reads it. Pure: a JSON object in, another out.

- the exact version answers, so `model` becomes `name@version` (and the reply says so);
- turns hold text, and calls of tools (serve/content_parts.py);
- an adapter is asked as it was trained: where the request brings no system text, its manifest's is put first;
- turns stand in an order that the base's chat template takes (serve/chat_turns.py);
- prefix-cache blocks are shared only among requests of one key.
"""

import hashlib
from typing import Any

from counsel.store import Manifest
from serve.api_errors import ApiError
from serve.chat_turns import SYSTEM_ROLES, TAKES_ALL, Template, settle
from serve.content_parts import items_of, messages_of

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_SWITCHES = ("stream", "store", "background")
# Log-probabilities that a server holds for one request at the weight of one answer: some 5 MB.
_LOGPROBS = 20_000
# vLLM tokenizes bad words on its event loop, twice for each prompt: a megabyte of them would stop every stream.
_BAD_WORDS, _BAD_WORD_CHARS = 128, 4096
Body = dict[str, Any]


def rewrite(
    path: str,
    body: Body,
    manifest: Manifest | None,
    *,
    salt: str = "",
    max_completion_tokens: int,
    template: Template = TAKES_ALL,
) -> Body:
    """The body to hand on; `manifest` is None for the base. Raises ApiError 400 for what the bounds forbid."""
    # To many clients null means that nothing is given; vLLM refuses some.
    ready = {name: value for name, value in body.items() if value is not None}
    if body.get("tools") == []:
        del ready["tools"]
    if "tools" not in ready and body.get("tool_choice") in ("auto", "none"):
        del ready["tool_choice"]
    if not body.get("stream"):
        ready.pop("stream_options", None)
    for name in _BOUNDS:
        if (value := whole(body, name)) is None:
            continue
        if value == -1:
            # As some clients say "as many as there are".
            del ready[name]
            continue
        if value > max_completion_tokens:
            raise ApiError(400, f"{name} is {value}; at most {max_completion_tokens} is allowed here", param=name)
        ready[name] = value
    for name in _SWITCHES:
        if not isinstance(body.get(name), bool | None):
            # vLLM asks some of these before it reads "false" as false.
            raise ApiError(400, f"{name} is {body[name]!r:.40}; it must be true or false", param=name)
    if body.get("background"):
        raise ApiError(
            400, "background is true; only answers that somebody waits for are given here", param="background"
        )
    _refuse_bad_words(body.get("bad_words"))
    if path == RESPONSES:
        # Nothing is kept for later requests.
        ready["store"] = False
    if manifest is not None:
        ready["model"] = manifest.id
    system = manifest.prompt.get("system") or "" if manifest is not None else ""
    if path == CHAT and "messages" in body:
        turns = messages_of(body["messages"])
        if system and not any(map(_is_system, turns)):
            turns = [{"role": "system", "content": system}, *turns]
        ready["messages"] = settle(turns, template)
    elif path == RESPONSES and body.get("input") is not None:
        _settle_responses(ready, system, template)
    if salt:
        ready["cache_salt"] = hashlib.sha256(f"{salt} {body.get('cache_salt') or ''}".encode()).hexdigest()[:32]
    return ready


def _settle_responses(ready: Body, system: str, template: Template) -> None:
    """A responses request's instructions and input, as the template takes them together."""
    given = items_of(ready["input"])
    instructions = ready.get("instructions")
    if system and not instructions and not (isinstance(given, list) and any(map(_is_system, given))):
        instructions = system
    said = given if isinstance(given, list) else [{"role": "user", "content": given}]
    opening = [{"role": "system", "content": instructions}] if instructions else []
    turns = settle([*opening, *said], template)
    ready.pop("instructions", None)
    if opening and turns[:1] == opening:
        ready["instructions"] = instructions
        turns = turns[1:]
    ready["input"] = given if turns == said else turns


def weight(path: str, body: Body, max_completion_tokens: int, max_model_len: int) -> int:
    """How many answers a request counts for: the sequences that the engine runs, or more where it makes the server
    hold many log-probabilities. Raises ApiError 400 when a number is none."""
    n = _n_sequences(path, body)
    top = whole(body, "top_logprobs")
    # Of chat, `logprobs` switches them on; of completions, it is their number.
    asked = whole(body, "logprobs") if path == COMPLETIONS else top or (0 if body.get("logprobs") is True else None)
    of_prompt = whole(body, "prompt_logprobs")
    if of_prompt is None and body.get("echo") and asked is not None:
        of_prompt = asked
    held = 0
    if of_prompt is not None:
        sizes = (min(size, max_model_len) for size in _prompt_sizes(path, body))
        held += sum(sizes) * (abs(of_prompt) + 1)
    if asked is not None:
        bounds = [value for name in _BOUNDS if (value := whole(body, name)) is not None and value >= 0]
        held += n * min([*bounds, max_completion_tokens]) * (abs(asked) + 1)
    return max(n, -(-held // _LOGPROBS))


def _n_sequences(path: str, body: Body) -> int:
    times = max(1, whole(body, "n") or 1)
    prompt = body.get("prompt") if path == COMPLETIONS else None
    # A list of numbers is one prompt of token ids.
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return times * (len(prompt) if several else 1)  # type: ignore[arg-type]


def _prompt_sizes(path: str, body: Body) -> list[int]:
    """The most tokens that each prompt may have: its token ids, or a token for each character of its text."""
    prompt = body.get("prompt") if path == COMPLETIONS else None
    if prompt is None:
        return [len(str(body.get("messages") or body.get("input")))]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return [len(part) if isinstance(part, str | list) else 1 for part in prompt]
    return [len(prompt) if isinstance(prompt, str | list) else 1]


def whole(body: Body, name: str) -> int | None:
    """A bounded field. vLLM would read "64" as 64: what we do not read as a number must not reach it."""
    value = body.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ApiError(400, f"{name} is {value!r:.40}; it must be a whole number", param=name)


def _refuse_bad_words(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise ApiError(400, "bad_words must be a list of texts", param="bad_words")
    if len(given) > _BAD_WORDS or sum(map(len, given)) > _BAD_WORD_CHARS:
        raise ApiError(
            400, f"bad_words may be {_BAD_WORDS}, of {_BAD_WORD_CHARS} characters together", param="bad_words"
        )


def _is_system(turn: Body) -> bool:
    return turn.get("role") in SYSTEM_ROLES
