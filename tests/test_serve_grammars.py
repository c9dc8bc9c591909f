"""Grammars compile in a bounded child, and one that takes too much is refused, whichever field it comes in."""

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMServerError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import backend_guidance

from serve import grammars
from serve.grammars import GrammarChecker
from tests.tiny import tiny_tokenizer
from tests.waiting import HANG_S, is_alive, until

HUGE = 1_000_000_000
NUMBERS = {"type": "array", "items": {"type": "integer"}}


def problem_of(kind: str, spec: str) -> str:
    tokenizer = tiny_tokenizer()

    async def ask() -> str:
        checker = GrammarChecker(tokenizer.backend_tokenizer.to_str(), len(tokenizer), tokenizer.eos_token_id)
        try:
            # Twice: the second answer comes from the cache, and is the same.
            first = await checker.problem(kind, spec)
            assert await checker.problem(kind, spec) == first
            # The next grammar compiles, whatever happened to the first.
            assert await checker.problem("regex", "[a-z]{3}") == ""
        finally:
            await checker.close()
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
def test_a_grammar_that_takes_too_much_is_refused(kind, spec):
    """The child stops at its limit of memory or processor time; the error says which, and what to do."""
    assert "too large: compiling it takes more than" in problem_of(kind, spec)


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
def test_ordinary_grammars_compile(kind, spec):
    """Each kind of grammar, in an ordinary size."""
    assert problem_of(kind, spec) == ""


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json", "{"), ("json", '{"type": "nothing"}'), ("json", "[" * 5000 + "]" * 5000), ("regex", "("),
        ("choice", "{"), ("grammar", "root ::= ("), ("grammar", "\ud800"),
        ("structural_tag", '{"triggers": ["<a"], "structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}]}'),
    ],
)  # fmt: skip
def test_an_invalid_grammar_gets_a_one_line_error(kind, spec):
    """The compiler's own message, shortened, and the child continues."""
    problem = problem_of(kind, spec)
    assert problem.startswith(f"{kind} is not a valid grammar: ")
    assert "\n" not in problem
    assert len(problem) < 400


_FIRST_CALL = """
import os, signal, llguidance
todo, done = {todo!r}, {done!r}
whole = {function}
def watched(*given):
    try:
        os.rename(todo, done)
    except FileNotFoundError:
        return whole(*given)
    with open(done, "w") as file:
        file.write(str(os.getpid()) + "\\n")
    {deed}
    return whole(*given)
{function} = watched
"""


@pytest.fixture
def at_first_call(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Makes the child, or its fork, do something before the first call of a function; by default, compiling a regex.

    Returns a file that exists once it began. Its text, once it ends with a newline, is the id of that process.
    """

    def arrange(deed: str, function: str = "llguidance.grammar_from") -> Path:
        todo, done = tmp_path / "todo", tmp_path / "done"
        todo.touch()
        code = _FIRST_CALL.format(todo=str(todo), done=str(done), deed=deed, function=function)
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        return done

    return arrange


def with_checker(ask: Callable[[GrammarChecker], Coroutine[Any, Any, None]]) -> None:
    """Run `ask` with a separate child, without a tokenizer, so that the child starts quickly."""

    async def run() -> None:
        checker = GrammarChecker(None, 0, None)
        try:
            async with asyncio.timeout(HANG_S):
                await ask(checker)
        finally:
            await checker.close()

    asyncio.run(run())


STOP = "os.kill(os.getpid(), signal.SIGSTOP)"


async def fork_that_stopped(done: Path) -> psutil.Process:
    """The fork that ran `STOP`, once it is stopped."""
    await asyncio.to_thread(until, lambda: done.exists() and done.read_text().endswith("\n"))
    fork = psutil.Process(int(done.read_text()))
    await asyncio.to_thread(until, lambda: fork.status() == psutil.STATUS_STOPPED)
    return fork


def test_a_compile_that_hangs_does_not_block_the_next(at_first_call, monkeypatch):
    """After a while its child is killed, and the next grammar compiles."""
    done = at_first_call(STOP)

    async def ask(checker: GrammarChecker) -> None:
        monkeypatch.setattr(grammars, "WAIT_S", 1.0)
        # Until a compile has begun: a child may need longer to start.
        for n in itertools.count(1):
            with pytest.raises(TimeoutError):
                await checker.problem("regex", "a" * n)
            if done.exists():
                break
        monkeypatch.setattr(grammars, "WAIT_S", HANG_S)
        assert await checker.problem("regex", "b") == ""

    with_checker(ask)


def test_a_compile_that_hangs_ends_with_the_child(at_first_call):
    """No process is left, running or stopped, when the server ends or its child is killed."""
    done = at_first_call(STOP)

    async def ask(checker: GrammarChecker) -> None:
        asking = asyncio.create_task(checker.problem("regex", "a"))
        fork = await fork_that_stopped(done)
        asking.cancel()
        await asyncio.wait([asking])
        await checker.close()
        await asyncio.to_thread(until, lambda: not is_alive(fork))

    with_checker(ask)


KILL_THE_CHILD = "os.kill(os.getppid(), signal.SIGKILL); signal.pause()"


def test_a_child_that_dies_is_replaced(at_first_call):
    """The machine may kill it, during a compile or between two."""
    at_first_call(KILL_THE_CHILD)

    async def ask(checker: GrammarChecker) -> None:
        assert await checker.problem("regex", "a") == ""
        (child,) = (one for one in psutil.Process().children() if "serve.grammar_child" in one.cmdline())
        child.kill()
        assert await checker.problem("regex", "b") == ""

    with_checker(ask)


def test_a_caller_that_hangs_up_leaves_the_child_to_the_others(at_first_call):
    """The compile continues, so that the waiting callers keep the child, and its result is cached."""
    done = at_first_call(STOP)

    async def ask(checker: GrammarChecker) -> None:
        impatient = asyncio.create_task(checker.problem("regex", "a"))
        fork = await fork_that_stopped(done)
        child = fork.parent()
        patient = asyncio.create_task(checker.problem("regex", "b"))
        impatient.cancel()
        await asyncio.wait([impatient])
        assert impatient.cancelled()
        fork.resume()
        assert await patient == ""
        assert is_alive(child)
        assert child.ppid() == os.getpid()
        # Only a cached result can arrive from a suspended child.
        child.suspend()
        assert await checker.problem("regex", "a") == ""

    with_checker(ask)


@pytest.mark.parametrize(
    ("deed", "function"),
    [
        (KILL_THE_CHILD, "llguidance.grammar_from"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "llguidance.grammar_from"),
        ("raise BlockingIOError(11, 'Resource temporarily unavailable')", "os.fork"),
    ],
    ids=["each child dies", "the compile is killed", "no fork"],
)
def test_an_error_of_the_machine_does_not_count_against_the_grammar(at_first_call, monkeypatch, deed, function):
    """The caller gets status 500. When the request is sent again, the grammar passes."""
    # Every call fails until the file is removed, not only the first.
    done = at_first_call(f"os.rename(done, todo); {deed}", function)
    monkeypatch.setattr(backend_guidance, "validate_guidance_grammar", backend_guidance.validate_guidance_grammar)
    passed = []

    async def add_request(request_id: str, prompt: str, params: SamplingParams) -> None:
        passed.append(request_id)

    async def ask(checker: GrammarChecker) -> None:
        engine_client = SimpleNamespace(add_request=add_request)
        grammars.guard(engine_client, checker)
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        with pytest.raises(VLLMServerError) as caught:
            await engine_client.add_request("first", "", params)
        assert create_error_response(caught.value).error.code == 500
        done.with_name("todo").unlink()
        await engine_client.add_request("second", "", params)
        assert passed == ["second"]

    with_checker(ask)


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
def test_no_field_gets_a_grammar_past_the_limit(server, path, fields, stream):
    """Chat, completions and responses, streamed or not, and vLLM's grammars for tools get a 400, never an answer."""
    prompt = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, COMPLETIONS: {"prompt": "hi"}}
    body = {"model": "calm", "stream": stream, **prompt.get(path, {"input": "hi"}), **fields}
    headers = {"Authorization": f"Bearer {server.user_key}"}
    reply = httpx.post(f"{server.base_url}/{path}", json=body, headers=headers, timeout=600)
    assert reply.status_code == 400, reply.text[:300]
    assert any(word in reply.text for word in ("too large", "not enforced", "tool-call-parser")), reply.text[:300]
