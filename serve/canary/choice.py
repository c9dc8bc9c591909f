"""What a canary calls one conversation: the first thing that its person wrote."""

import json
from typing import Any

from serve.request_rewrite import CHAT, COMPLETIONS


def opening_of(path: str, body: dict[str, Any]) -> str:
    """The first user turn of a request's body, as JSON; it stays the same as the conversation goes on.

    A completion's prompt, which has no turns, counts as a whole. Bodies that vLLM will refuse have an opening too.
    """
    if path == COMPLETIONS:
        return json.dumps(body.get("prompt"))
    turns = body.get("messages" if path == CHAT else "input")
    if not isinstance(turns, list):
        return json.dumps(turns)
    asked = (turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
    return json.dumps(next(asked, None))
