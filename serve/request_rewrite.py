"""What a request body becomes before vLLM reads it. Pure: a JSON object in, another out.

- `model` becomes the exact `name@version`, which the reply then names;
- turns hold only text and tool calls (serve/content_parts.py);
- an adapter is prompted as in training: its manifest's system prompt comes first where the request has none;
- turns are in an order that the base's chat template accepts (serve/chat_turns.py);
- prefix-cache blocks are shared only among requests of one key.
"""

import hashlib
from typing import Any

from counsel.store import Manifest
from serve.api_errors import ApiError
from serve.chat_turns import ACCEPTS_ALL, BLANK_LINE, SYSTEM_ROLES, Template, fit_turns, text_of
from serve.content_parts import items_of, messages_of

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_SWITCHES = ("stream", "store", "background")
# This many log-probabilities that the server must hold (about 5 MB) count as one answer in the limits.
_LOGPROBS = 20_000
# vLLM tokenizes bad words on its event loop, twice per prompt: a megabyte of them would stop every stream.
_MAX_BAD_WORDS, _MAX_BAD_WORD_CHARS = 128, 4096
_MAX_LENGTH_PENALTY = 10
Body = dict[str, Any]


def rewrite(
    path: str,
    body: Body,
    manifest: Manifest | None,
    *,
    salt: str = "",
    guidance: str = "",
    max_completion_tokens: int,
    template: Template = ACCEPTS_ALL,
) -> Body:
    """The body to pass on; `manifest` is None for the base, and `guidance` is added to the system turn.

    Raises ApiError 400 for what the bounds forbid.
    """
    # Many clients send null for a field that is not given; vLLM refuses it in some fields.
    rewritten = {name: value for name, value in body.items() if value is not None}
    if body.get("tools") == []:
        del rewritten["tools"]
    if "tools" not in rewritten and body.get("tool_choice") in ("auto", "none"):
        del rewritten["tool_choice"]
    if not body.get("stream"):
        rewritten.pop("stream_options", None)
    for name in _BOUNDS:
        if (value := whole_number(body, name)) is None:
            continue
        if value == -1:
            # Some clients mean "no limit".
            del rewritten[name]
            continue
        if value > max_completion_tokens:
            raise ApiError(400, f"{name} is {value}; at most {max_completion_tokens} is allowed here", param=name)
        rewritten[name] = value
    for name in _SWITCHES:
        if not isinstance(body.get(name), bool | None):
            # vLLM tests some of these as strings, where "false" is true, before it parses them.
            raise ApiError(400, f"{name} is {body[name]!r:.40}; it must be true or false", param=name)
    if body.get("background"):
        raise ApiError(
            400, "background is true; only requests that wait for their answer are served here", param="background"
        )
    _refuse_bad_words(body.get("bad_words"))
    _refuse_length_penalty(body.get("length_penalty"))
    grammar = body.get("structured_outputs")
    if isinstance(grammar, dict) and grammar.get("json_object") is False:
        # vLLM counts it as a grammar that was asked for, and then finds none.
        rewritten["structured_outputs"] = {name: value for name, value in grammar.items() if name != "json_object"}
        if all(value is None for value in rewritten["structured_outputs"].values()):
            del rewritten["structured_outputs"]
    if path == RESPONSES:
        # Nothing is kept for later requests.
        rewritten["store"] = False
    if manifest is not None:
        rewritten["model"] = manifest.id
    system = manifest.prompt.get("system") or "" if manifest is not None else ""
    if path == CHAT and "messages" in body:
        turns = messages_of(body["messages"])
        if system and not any(map(_is_system, turns)):
            turns = [{"role": "system", "content": system}, *turns]
        if guidance:
            turns = _with_guidance(turns, guidance)
        rewritten["messages"] = fit_turns(turns, template)
    elif path == RESPONSES and body.get("input") is not None:
        _fit_responses(rewritten, system, guidance, template)
    if salt:
        rewritten["cache_salt"] = hashlib.sha256(f"{salt} {body.get('cache_salt') or ''}".encode()).hexdigest()[:32]
    return rewritten


def _with_guidance(turns: list[Body], guidance: str) -> list[Body]:
    first = turns[0] if turns and _is_system(turns[0]) else None
    if first is None:
        return [{"role": "system", "content": guidance}, *turns]
    return [{**first, "content": BLANK_LINE.join(filter(None, (text_of(first), guidance)))}, *turns[1:]]


def _fit_responses(rewritten: Body, system: str, guidance: str, template: Template) -> None:
    """Fit a responses request's instructions and input together to the template."""
    given = items_of(rewritten["input"])
    instructions = rewritten.get("instructions")
    if system and not instructions and not (isinstance(given, list) and any(map(_is_system, given))):
        instructions = system
    if guidance:
        instructions = BLANK_LINE.join(filter(None, (instructions, guidance)))
    input_turns = given if isinstance(given, list) else [{"role": "user", "content": given}]
    opening = [{"role": "system", "content": instructions}] if instructions else []
    turns = fit_turns([*opening, *input_turns], template)
    rewritten.pop("instructions", None)
    if opening and turns[:1] == opening:
        rewritten["instructions"] = instructions
        turns = turns[1:]
    rewritten["input"] = given if turns == input_turns else turns


def weight(path: str, body: Body, max_completion_tokens: int, max_model_len: int) -> int:
    """How many answers a request counts as: the sequences that the engine runs, or more where it makes the server hold
    many log-probabilities. Raises ApiError 400 for a number that is not one."""
    n = _n_sequences(path, body)
    top = whole_number(body, "top_logprobs")
    # In chat, `logprobs` switches them on; in completions, it is their number.
    of_answer = (
        whole_number(body, "logprobs") if path == COMPLETIONS else top or (0 if body.get("logprobs") is True else None)
    )
    of_prompt = whole_number(body, "prompt_logprobs")
    if of_prompt is None and body.get("echo") and of_answer is not None:
        of_prompt = of_answer
    held = 0
    if of_prompt is not None:
        sizes = (min(size, max_model_len) for size in _prompt_sizes(path, body))
        held += sum(sizes) * (abs(of_prompt) + 1)
    if of_answer is not None:
        bounds = [value for name in _BOUNDS if (value := whole_number(body, name)) is not None and value >= 0]
        held += n * min([*bounds, max_completion_tokens]) * (abs(of_answer) + 1)
    return max(n, -(-held // _LOGPROBS))


def _n_sequences(path: str, body: Body) -> int:
    times = max(1, whole_number(body, "n") or 1)
    prompt = body.get("prompt") if path == COMPLETIONS else None
    # A list of numbers is one prompt of token ids.
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return times * (len(prompt) if several else 1)  # type: ignore[arg-type]


def _prompt_sizes(path: str, body: Body) -> list[int]:
    """The most tokens that each prompt may have: its token ids, or one per character of its text."""
    prompt = body.get("prompt") if path == COMPLETIONS else None
    if prompt is None:
        return [len(str(body.get("messages") or body.get("input")))]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return [len(part) if isinstance(part, str | list) else 1 for part in prompt]
    return [len(prompt) if isinstance(prompt, str | list) else 1]


def whole_number(body: Body, name: str) -> int | None:
    """A bounded field. vLLM would read "64" as 64, so what is not a number here must not reach it."""
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
        raise ApiError(400, "bad_words must be a list of strings", param="bad_words")
    if len(given) > _MAX_BAD_WORDS or sum(map(len, given)) > _MAX_BAD_WORD_CHARS:
        raise ApiError(
            400,
            f"bad_words may hold at most {_MAX_BAD_WORDS} strings of {_MAX_BAD_WORD_CHARS} characters in all",
            param="bad_words",
        )


def _refuse_length_penalty(given: Any) -> None:
    """Beam search divides by (length ** length_penalty), which is 0 or infinite for large penalties."""
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        return  # not a number: vLLM's schema refuses it
    if not -_MAX_LENGTH_PENALTY <= value <= _MAX_LENGTH_PENALTY:
        bounds = f"from -{_MAX_LENGTH_PENALTY} to {_MAX_LENGTH_PENALTY}"
        raise ApiError(400, f"length_penalty is {given!r:.40}; it must be a number {bounds}", param="length_penalty")


def _is_system(turn: Body) -> bool:
    return turn.get("role") in SYSTEM_ROLES
