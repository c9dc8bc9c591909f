"""Grammars are compiled in a bounded child: what asks for too much is refused, whichever field it comes in."""

import asyncio
import json

import httpx
import pytest

from serve.grammars import Grammars
from tests.tiny import tiny_tokenizer

HUGE = 1_000_000_000
NUMBERS = {"type": "array", "items": {"type": "integer"}}


def fault_of(kind: str, spec: str) -> str:
    tokenizer = tiny_tokenizer()

    async def ask() -> str:
        grammars = Grammars(tokenizer.backend_tokenizer.to_str(), len(tokenizer), tokenizer.eos_token_id)
        try:
            # Twice: what is asked again is answered from memory, and the same.
            first = await grammars.fault(kind, spec)
            assert await grammars.fault(kind, spec) == first
            # Whatever became of the one before, the next is compiled.
            assert await grammars.fault("regex", "[a-z]{3}") == ""
        finally:
            await grammars.close()
        return first

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json", json.dumps({**NUMBERS, "maxItems": 10_000_000})),
        ("json", json.dumps({**NUMBERS, "maxItems": HUGE})),
        ("json", json.dumps({**NUMBERS, "minItems": HUGE})),
        ("json", json.dumps({"type": "object", "properties": {"a": {**NUMBERS, "maxItems": HUGE}}})),
        ("regex", "((((a{99}){99}){99}){99}){99}"),
        ("choice", json.dumps([f"word {n}" for n in range(200_000)])),
        ("choice", json.dumps(["x" * 900_000])),
    ],
)
def test_a_grammar_that_asks_for_too_much_is_refused(kind, spec):
    """The child ends it at its bound of memory or processor time; the caller is told which, and what to do."""
    assert "too large: compiling it takes more than" in fault_of(kind, spec)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json", json.dumps({**NUMBERS, "maxItems": 1000})),
        ("json", json.dumps({"type": "string", "maxLength": 100_000})),
        ("json_object", ""),
        ("regex", "(a|b)*c"),
        ("choice", '["low", "fine"]'),
        ("grammar", 'root ::= "low" | "fine"'),
        ("grammar", 'start: "low" | "fine"'),
    ],
)
def test_what_people_ask_for_compiles(kind, spec):
    """Each kind of grammar in a size of daily use."""
    assert fault_of(kind, spec) == ""


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json", "{"), ("json", '{"type": "nothing"}'), ("json", "[" * 5000 + "]" * 5000), ("regex", "("),
        ("choice", "{"), ("grammar", "root ::= ("), ("grammar", "\ud800"),
        ("structural_tag", '{"triggers": ["<a"], "structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}]}'),
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_said_in_one_line(kind, spec):
    """The compiler's own words, short, and the child goes on."""
    fault = fault_of(kind, spec)
    assert fault.startswith(f"{kind} is no grammar: ")
    assert "\n" not in fault
    assert len(fault) < 400


BOMB = {**NUMBERS, "maxItems": HUGE}
TOOL = {"type": "function", "function": {"name": "count", "parameters": BOMB}}
TAG = {"type": "structural_tag", "structures": [{"begin": "<a>", "schema": BOMB, "end": "</a>"}], "triggers": ["<a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOMB}}
NAMED = {"type": "function", "function": {"name": "count"}}
CHAT, COMPLETIONS, RESPONSES = "chat/completions", "completions", "responses"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"response_format": FORMAT}),
        (CHAT, {"response_format": TAG}),
        (CHAT, {"structured_outputs": {"json": BOMB}}),
        (CHAT, {"structured_outputs": {"json": json.dumps(BOMB)}}),
        (CHAT, {"structured_outputs": {"regex": "((((a{99}){99}){99}){99}){99}"}}),
        (CHAT, {"structured_outputs": {"grammar": f"start: %json {json.dumps(BOMB)}"}}),
        (CHAT, {"structured_outputs": {"structural_tag": json.dumps(TAG)}}),
        (CHAT, {"structured_outputs": {"json": BOMB}, "n": 8}),
        (COMPLETIONS, {"response_format": FORMAT}),
        (COMPLETIONS, {"structured_outputs": {"json": BOMB}}),
        (COMPLETIONS, {"prompt": ["a", "b"], "structured_outputs": {"json": BOMB}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": BOMB}}}),
        (RESPONSES, {"structured_outputs": {"json": BOMB}}),
        (CHAT, {"tools": [TOOL], "tool_choice": NAMED}),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}),
    ],
)
def test_no_field_brings_a_grammar_past_the_bound(server, path, fields, stream):
    """Chat, completions and responses, streamed or not, and what vLLM makes of tools: a 400, and never an answer."""
    prompt = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, COMPLETIONS: {"prompt": "hi"}}
    body = {"model": "calm", "stream": stream, **prompt.get(path, {"input": "hi"}), **fields}
    headers = {"Authorization": f"Bearer {server.user_key}"}
    reply = httpx.post(f"{server.base_url}/{path}", json=body, headers=headers, timeout=600)
    assert reply.status_code == 400, reply.text[:300]
    assert any(word in reply.text for word in ("too large", "not kept to", "tool-call-parser")), reply.text[:300]
