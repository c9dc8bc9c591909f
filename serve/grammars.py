"""Every grammar a request brings is compiled in a bounded child first; what takes too much there is refused.

A schema, regex, choice list, Lark grammar or structural tag of a hundred bytes can ask for gigabytes. vLLM compiles it
on its event loop and again in its engine, without bounds: `guard` puts this check before both, at the one place that
all of them pass, whichever field or tool they came from. Source of what is compiled: vLLM's
v1/structured_output/backend_guidance.py.
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
# The child itself may be held up by a busy machine, or hang.
WAIT_S = 60.0
_REMEMBERED = 1024


class Grammars:
    """What may be compiled. One child, which starts with the first grammar; lives on one event loop."""

    def __init__(self, tokenizer: str | None, vocab_size: int, eos_token_id: int | None) -> None:
        """`tokenizer`: the JSON of a fast tokenizer; None where the base has none: compiled without."""
        self._setting = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eos_token_id": eos_token_id}
        self._child: asyncio.subprocess.Process | None = None
        self._one = asyncio.Lock()
        self._asking: asyncio.Task[str] | None = None
        self._verdicts: OrderedDict[str, str] = OrderedDict()

    async def fault(self, kind: str, spec: str) -> str:
        """What is wrong with a grammar, in one line; "" when it may be compiled. `kind`: vLLM's name, as "json".

        Raises OSError where the machine keeps it from knowing: nothing is held against the grammar.
        """
        digest = hashlib.sha256(f"{kind} {spec}".encode(errors="surrogatepass")).hexdigest()
        if digest not in self._verdicts:
            await self._one.acquire()
            # It goes on where the caller hangs up: to end it would cost everybody the child.
            self._asking = asyncio.create_task(self._settle(digest, kind, spec))
            self._asking.add_done_callback(lambda _: self._one.release())
            return await asyncio.shield(self._asking)
        return self._verdicts[digest]

    async def _settle(self, digest: str, kind: str, spec: str) -> str:
        if digest not in self._verdicts:
            self._verdicts[digest] = await self._ask(kind, spec)
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        return self._verdicts[digest]

    async def _ask(self, kind: str, spec: str) -> str:
        request = json.dumps({"kind": kind, "spec": spec}).encode() + b"\n"
        # Twice: the machine may have ended the child for reasons of its own.
        said = await self._answer(request) or await self._answer(request)
        if not said:
            raise ChildProcessError("the process that compiles grammars died twice")
        answer = json.loads(said)
        if "failed" in answer:
            raise ChildProcessError(answer["failed"])
        return str(answer["fault"])

    async def _answer(self, request: bytes) -> bytes:
        """The child's line about `request`; empty when it died."""
        async with contextlib.AsyncExitStack() as undo:
            # What is given up leaves an answer behind that the next caller must not take for its own.
            undo.push_async_callback(self._end)
            child = await self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            async with asyncio.timeout(WAIT_S):
                with contextlib.suppress(ConnectionError):
                    child.stdin.write(request)
                    await child.stdin.drain()
                said = await child.stdout.readline()
            if not said.endswith(b"\n"):
                return b""
            undo.pop_all()
        return said

    async def _running(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "serve.grammar_child", str(CPU_S), str(MEMORY_MIB)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(self._setting).encode() + b"\n")
        return self._child

    async def close(self) -> None:
        """End the child and what is asked of it; the next grammar starts another."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        await self._end()

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def for_model(engine_client: Any) -> Grammars:
    """The check for what vLLM serves, with its own tokenizer."""
    tokenizer = engine_client.renderer.tokenizer
    vocab_size = max(engine_client.model_config.get_vocab_size(), len(tokenizer))
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return Grammars(fast.to_str() if fast else None, vocab_size, getattr(tokenizer, "eos_token_id", None))


def guard(engine_client: Any, grammars: Grammars) -> None:
    """Let nothing reach the engine whose grammar was not compiled in the child.

    Raises, from the engine client's `add_request`, vLLM's own VLLMValidationError, which its handlers answer with 400,
    or VLLMServerError, with 500.
    """
    from vllm.exceptions import VLLMServerError, VLLMValidationError
    from vllm.v1.structured_output import backend_guidance
    from vllm.v1.structured_output.request import get_structured_output_key

    add_request = engine_client.add_request

    async def checked(request_id: str, prompt: Any, params: Any, *args: Any, **named: Any) -> Any:
        wanted = getattr(params, "structured_outputs", None)
        if wanted is not None and not wanted.all_constraints_none():
            kind, spec = get_structured_output_key(wanted)
            try:
                fault = await grammars.fault(kind.name.lower(), spec)
            except OSError as error:
                log.error("a grammar could not be checked: %r", error)
                raise VLLMServerError("the server could not check the grammar; ask again") from error
            if fault:
                raise VLLMValidationError(fault, parameter="structured_outputs")
        return await add_request(request_id, prompt, params, *args, **named)

    engine_client.add_request = checked
    # On the event loop it would be done once more, for each prompt.
    backend_guidance.validate_guidance_grammar = lambda params, tokenizer=None: None
