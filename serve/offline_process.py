"""The child process of serve/offline.py: a server's engine and request handlers, without HTTP.

It reads one JSON object per line: `number`, `path`, `body`. It writes one per answer, in the order they finish:
`number`, `status`, `body`, as a server replies. Number 0 means that the engine is ready. It exits when stdin closes.
"""

import asyncio
import json
import os
import signal
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import IO, Any

from serve.adapter_pool import AdapterPool
from serve.api_errors import ApiError
from serve.chat_turns import Template, template_in
from serve.config import from_environment
from serve.engine import VllmEngine
from serve.int8_base import source_fingerprint
from serve.name_table import NameTable
from serve.request_rewrite import CHAT, COMPLETIONS, Body, rewrite
from serve.server_registry import ServerRecord
from serve.store_watcher import StoreWatcher

LINGER_S = 10.0
READY = {"number": 0}


def main() -> None:
    """Parse vLLM's flags from the command line and answer requests until the input ends."""
    _go_on_in_a_child()
    answers = own_stdout()

    import uvloop
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serve.vllm_api import cli_env_setup, make_arg_parser, validate_parsed_serve_args

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    uvloop.run(_run(args, answers))


async def _run(args: Namespace, answers: IO[str]) -> None:
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext

    inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
    threading.Thread(target=_read, args=(asyncio.get_running_loop(), inbox), daemon=True).start()
    # As vLLM's LLM class does, so that on a GPU vLLM sizes its batches for throughput.
    async with build_async_engine_client(args, usage_context=UsageContext.LLM_CLASS) as engine:
        handler = await OfflineHandler.open(engine, args)
        _write(answers, READY)
        tasks: set[asyncio.Task[None]] = set()
        while (line := await inbox.get()) is not None:
            task = asyncio.create_task(_answer(handler, json.loads(line), answers, inbox))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()
        if engine.errored:
            raise engine.dead_error


async def _answer(
    handler: "OfflineHandler", message: dict[str, Any], answers: IO[str], inbox: asyncio.Queue[bytes | None]
) -> None:
    status, body = await handler.answer(message["path"], message["body"])
    if handler.engine.errored:
        # Every request would now fail in the same way. Stop, so that the parent reports why.
        inbox.put_nowait(None)
        return
    try:
        _write(answers, {"number": message["number"], "status": status, "body": body})
    except ValueError as error:
        api_error = ApiError(500, f"the answer is not valid JSON: {error}")
        _write(answers, {"number": message["number"], "status": 500, "body": json.loads(api_error.body())})


class OfflineHandler:
    """Answers one request as a server does: vLLM's own handlers, behind the adapter pool and the request rewrite."""

    def __init__(self, engine: Any, state: Any, watcher: StoreWatcher, template: Template) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        self.engine, self.watcher, self.template = engine, watcher, template
        self.max_completion_tokens = from_environment().max_completion_tokens
        self.handlers: dict[str, tuple[Any, Any]] = {
            CHAT: (ChatCompletionRequest, state.openai_serving_chat.create_chat_completion),
            COMPLETIONS: (CompletionRequest, state.openai_serving_completion.create_completion),
        }

    @classmethod
    async def open(cls, engine: Any, args: Namespace) -> "OfflineHandler":
        """Set up the handlers and read the store once, so that a name means the same version for the whole run."""
        from starlette.datastructures import State
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state

        config, state = from_environment(), State()
        await init_app_state(engine, state, args, await engine.get_supported_tasks())
        base_name = state.openai_serving_models.base_model_paths[0].name
        names = NameTable(base_name, ServerRecord("", source_fingerprint(Path(args.model)), args.max_lora_rank))
        pool = AdapterPool(
            engine=VllmEngine(engine, state.openai_serving_models, args.data_parallel_size),
            store=Path(config.store),
            names=names,
            capacity=args.max_cpu_loras,
            on_event=lambda event, manifest, seconds: None,
        )
        watcher = StoreWatcher(pool)
        await watcher.refresh(swap=False)
        return cls(engine, state, watcher, template_in(Path(args.model), args.chat_template))

    async def answer(self, path: str, body: Body) -> tuple[int, Body]:
        """The status and body of the reply. Refuses what a server refuses, and fields that vLLM would ignore."""
        from vllm.entrypoints.serve import create_error_response
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        try:
            reply = await self._generate(path, body)
        except ApiError as error:
            return error.status, json.loads(error.body())
        except Exception as error:  # as vLLM's own handlers do: each kind has its own status
            reply = create_error_response(error)
        return (reply.error.code if isinstance(reply, ErrorResponse) else 200), reply.model_dump()

    async def _generate(self, path: str, body: Body) -> Any:
        schema, create = self.handlers[path]
        ignored = sorted(body.keys() - schema.model_fields.keys())
        if ignored:
            raise ApiError(400, f"field {ignored[0]!r} is unknown here; leave it out", param=ignored[0])
        model = body.get("model")
        manifest = None
        if isinstance(model, str) and model not in ("", self.watcher.names.base_name):
            manifest = await self.watcher.resolve(model)
        limit = self.max_completion_tokens
        ready = rewrite(path, body, manifest, max_completion_tokens=limit, template=self.template)
        request = schema.model_validate(ready)
        if manifest is None:
            return await create(request)
        loaded = await self.watcher.pool.acquire(manifest)
        try:
            return await create(request)
        finally:
            self.watcher.pool.release(loaded)


def _go_on_in_a_child() -> None:
    """Return in a child, and exit as it does.

    Ray kills the children of an actor with it. Killed so, this process could not end its engine, which would stay. Its
    child is not killed: its input ends, and it ends in order.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(abs(os.waitstatus_to_exitcode(status)))


def own_stdout() -> IO[str]:
    """Keep standard output for answers; everything else that is printed, here or in the engine, goes to the log."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _write(answers: IO[str], line: dict[str, Any]) -> None:
    answers.write(json.dumps(line, allow_nan=False) + "\n")
    answers.flush()


def _read(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[bytes | None]) -> None:
    # Not sys.stdin: this thread would hold its lock, and the interpreter would abort at exit.
    with open(0, "rb", closefd=False) as lines:
        for line in lines:
            loop.call_soon_threadsafe(inbox.put_nowait, line)
    loop.call_soon_threadsafe(inbox.put_nowait, None)
    time.sleep(LINGER_S)
    # If vLLM is interrupted during its start, it and its engine can wait for each other forever.
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
