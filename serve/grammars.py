"""Compiles every request's grammar in a bounded child process first, and refuses what takes too much there.

A schema, regex, choice list, Lark grammar or structural tag of a hundred bytes can need gigabytes. vLLM compiles it on
its event loop and again in its engine, without bounds. `guard` puts this check before both, in the one method that
every grammar passes, whichever field or tool it came from. The child compiles what vLLM's
v1/structured_output/backend_guidance.py would.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
from collections import OrderedDict
from typing import Any

log = logging.getLogger("vllm.counsel")

CPU_S = 0.5
MEMORY_MIB = 32
# For the answer of the child, which may hang or run on a busy machine.
WAIT_S = 60.0
_CACHE_SIZE = 1024


class GrammarChecker:
    """Checks grammars in one child, which starts with the first of them. Belongs to one event loop."""

    def __init__(self, tokenizer: str | None, vocab_size: int, eos_token_id: int | None) -> None:
        """`tokenizer`: the JSON of a fast tokenizer, or None to compile without one."""
        self._setup = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eos_token_id": eos_token_id}
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._check: asyncio.Task[str] | None = None
        self._problems: OrderedDict[str, str] = OrderedDict()

    async def problem(self, kind: str, spec: str) -> str:
        """What is wrong with a grammar, in one line; "" if vLLM may compile it. `kind`: vLLM's name, such as "json".

        Raises OSError if the machine, and not the grammar, made the check fail.
        """
        digest = hashlib.sha256(f"{kind} {spec}".encode(errors="surrogatepass")).hexdigest()
        if digest not in self._problems:
            await self._lock.acquire()
            # It continues if the caller hangs up: canceling it would kill the child that others wait for.
            self._check = asyncio.create_task(self._check_once(digest, kind, spec))
            self._check.add_done_callback(lambda _: self._lock.release())
            return await asyncio.shield(self._check)
        return self._problems[digest]

    async def _check_once(self, digest: str, kind: str, spec: str) -> str:
        if digest not in self._problems:
            self._problems[digest] = await self._ask_child(kind, spec)
            if len(self._problems) > _CACHE_SIZE:
                self._problems.popitem(last=False)
        return self._problems[digest]

    async def _ask_child(self, kind: str, spec: str) -> str:
        request = json.dumps({"kind": kind, "spec": spec}).encode() + b"\n"
        # Twice, because the machine may have killed the child for other reasons.
        line = await self._exchange(request) or await self._exchange(request)
        if not line:
            raise ChildProcessError("the process that compiles grammars died twice")
        answer = json.loads(line)
        if "failed" in answer:
            raise ChildProcessError(answer["failed"])
        return str(answer["problem"])

    async def _exchange(self, request: bytes) -> bytes:
        """The child's line about `request`; empty if the child died."""
        async with contextlib.AsyncExitStack() as undo:
            # A request given up leaves an answer in the pipe, which the next caller must not read.
            undo.push_async_callback(self._kill)
            child = await self._running_child()
            assert child.stdin is not None
            assert child.stdout is not None
            async with asyncio.timeout(WAIT_S):
                with contextlib.suppress(ConnectionError):
                    child.stdin.write(request)
                    await child.stdin.drain()
                line = await child.stdout.readline()
            if not line.endswith(b"\n"):
                return b""
            undo.pop_all()
        return line

    async def _running_child(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "serve.grammar_child", str(CPU_S), str(MEMORY_MIB)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(self._setup).encode() + b"\n")
        return self._child

    async def close(self) -> None:
        """Kill the child and cancel its check. The next grammar starts another child."""
        if self._check is not None:
            self._check.cancel()
            await asyncio.wait([self._check])
        await self._kill()

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def for_model(engine_client: Any) -> GrammarChecker:
    """The checker for the model that vLLM serves, with vLLM's tokenizer."""
    tokenizer = engine_client.renderer.tokenizer
    vocab_size = max(engine_client.model_config.get_vocab_size(), len(tokenizer))
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return GrammarChecker(fast.to_str() if fast else None, vocab_size, getattr(tokenizer, "eos_token_id", None))


def guard(engine_client: Any, checker: GrammarChecker) -> None:
    """Let only grammars that compiled in the child reach the engine.

    The engine client's `add_request` then raises vLLM's own VLLMValidationError, which vLLM answers with 400, or
    VLLMServerError, which it answers with 500.
    """
    from vllm.exceptions import VLLMServerError, VLLMValidationError
    from vllm.v1.structured_output import backend_guidance
    from vllm.v1.structured_output.request import get_structured_output_key

    add_request = engine_client.add_request

    async def checked(request_id: str, prompt: Any, params: Any, *args: Any, **named: Any) -> Any:
        constraints = getattr(params, "structured_outputs", None)
        if constraints is not None and not constraints.all_constraints_none():
            kind, spec = get_structured_output_key(constraints)
            try:
                problem = await checker.problem(kind.name.lower(), spec)
            except OSError as error:
                log.error("could not check a grammar: %r", error)
                raise VLLMServerError("the server could not check the grammar; try again") from error
            if problem:
                raise VLLMValidationError(problem, parameter="structured_outputs")
        return await add_request(request_id, prompt, params, *args, **named)

    engine_client.add_request = checked
    # vLLM would compile it again on the event loop, once per prompt.
    backend_guidance.validate_guidance_grammar = lambda params, tokenizer=None: None
