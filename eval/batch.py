"""Answer an OpenAI Batch file, several models in one: on any OpenAI-compatible server, or on an engine of its own.

    python -m eval batch requests.jsonl answers.jsonl --url http://127.0.0.1:8000/v1
    python -m eval batch requests.jsonl answers.jsonl --base smollm2-135m --store store
    python -m eval batch requests.jsonl answers.jsonl --base smollm2-135m --shard 1/4     -> answers-1-of-4.jsonl

Input, one request a line, as the Batch API defines it: `custom_id` (its own), `method` (`POST`), `url`
(`/v1/chat/completions` or `/v1/completions`) and `body`. Output, one line each, in the order they finish: `id`,
`custom_id`, `response` {`status_code`, `request_id`, `body`} and `error` (null, or {`code`, `message`}); and of ours,
`request_sha256`, by which an answer to a request that has changed since is known and asked anew. Both ways of answering
give the same rows.

Killed and given again, it goes on: no request is lost or answered twice, and those that failed are sent again. A
request's shard depends on its `custom_id` alone; shards are merged by putting their files one after the other.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from counsel.cli import Result, load_config
from counsel.client import BASE_URL, make_async_client
from counsel.errors import UserError
from counsel.files import read_jsonl, write_jsonl
from eval.config import BatchConfig
from eval.requests import Progress, attempt, run_bounded
from eval.samples import Row, RowLog, read_rows
from serve.config import ServeConfig
from serve.offline import OfflineEngine

URLS = ("/v1/chat/completions", "/v1/completions")
SERVER_CONCURRENCY = 32
# Well above what an engine decodes together: it must never wait for the next request.
ENGINE_CONCURRENCY = 2048


class Reply(NamedTuple):
    """The body that answers one request, or why there is none."""

    body: dict[str, Any] | None
    error: str | None


Ask = Callable[[Row], Awaitable[Reply]]


def batch(config: BatchConfig) -> Result:
    """Answer every request that the output lacks; exit status 1 when some failed."""
    requests = read_requests(Path(config.requests))
    path = Path(config.answers)
    if config.part is not None:
        k, n = config.part
        requests = [request for request in requests if shard_of(request["custom_id"], n) == k]
        path = path.with_name(f"{path.stem}-{k}-of-{n}{path.suffix}")
    if config.base and engine_log(path).resolve() in (path.resolve(), Path(config.requests).resolve()):
        raise UserError(f"the engine would log into {str(engine_log(path))!r}; name requests and answers .jsonl")
    asked = {request["custom_id"]: request_sha256(request) for request in requests}

    def still_holds(row: Row) -> bool:
        # A row of another program's, without a hash, is taken as it is.
        known = row.get("request_sha256")
        return known in (None, asked.get(row.get("custom_id"), known))

    replaced = [row for row in read_rows(path) if not still_holds(row)]
    if replaced:
        aside = path.with_name(f"{path.stem}-replaced{path.suffix}")
        write_jsonl(aside, [*read_rows(aside), *replaced])
        print(f"{len(replaced)} requests have changed and are asked again; old answers: {aside}", file=sys.stderr)
    with RowLog(path, ("custom_id",), keep=still_holds) as log:
        strangers = [key[0] for key in log.done if key[0] not in asked]
        if strangers:
            raise UserError(f"{str(path)!r} answers {strangers[0]!r}, which {config.requests!r} does not ask here")
        if log.done:
            print(f"{len(log.done)} of {len(requests)} are answered already", file=sys.stderr)
        todo = [request for request in requests if (request["custom_id"],) not in log.done]
        if todo:
            progress = Progress(len(requests), len(log.done))
            asyncio.run(_answer_on(config, todo, log, progress))
        failed = sum(row["error"] is not None for row in log.done.values())
    print(f"{len(requests) - failed} answered, {failed} failed: {path}")
    document = {"requests": len(requests), "failed": failed, "answers": str(path)}
    return Result(document, 1 if failed else 0)


def read_requests(path: Path) -> list[Row]:
    """The requests of a Batch file; UserError names the first line that is not one, or repeats a `custom_id`."""
    requests = read_jsonl(path)
    if not requests:
        raise UserError(f"{str(path)!r} holds no requests")
    known: set[str] = set()
    for number, request in enumerate(requests, start=1):
        name = request.get("custom_id")
        if not isinstance(name, str) or name in known:
            raise UserError(f"{str(path)!r} request {number}: custom_id is {name!r}; it must be a text of its own")
        if request.get("method") != "POST" or request.get("url") not in URLS:
            raise UserError(f"{str(path)!r} request {name!r}: needs method POST and a url of {', '.join(URLS)}")
        body = request.get("body")
        if not isinstance(body, dict) or "model" not in body or body.get("stream"):
            raise UserError(f"{str(path)!r} request {name!r}: body needs a model, and must not ask for a stream")
        known.add(name)
    return requests


def request_sha256(request: Row) -> str:
    """Of all that could change the answer: url and body, whatever the order of their keys."""
    return hashlib.sha256(json.dumps([request["url"], request["body"]], sort_keys=True).encode()).hexdigest()


def shard_of(custom_id: str, n: int) -> int:
    """Which of `n` shards, from 1, a request is in: by the hash of its name, whatever else the file holds."""
    return int(hashlib.sha256(custom_id.encode()).hexdigest(), 16) % n + 1


async def answer_all(ask: Ask, requests: Sequence[Row], log: RowLog, progress: Progress, concurrency: int) -> None:
    """Append the answer to each request as it comes, `concurrency` in flight."""

    async def answer(request: Row) -> None:
        log.append(_line(request, await ask(request)))
        progress.step(request["body"]["model"])

    # By model: an adapter then stays loaded, and no batch mixes more of them than it must.
    ordered = sorted(requests, key=lambda request: str(request["body"]["model"]))
    await run_bounded([partial(answer, request) for request in ordered], concurrency)


async def _answer_on(config: BatchConfig, requests: Sequence[Row], log: RowLog, progress: Progress) -> None:
    if config.base:
        answering, concurrency = engine_answers(engine_for(config, requests, log.path)), ENGINE_CONCURRENCY
    else:
        answering, concurrency = _server_answers(config), SERVER_CONCURRENCY
    async with answering as ask:
        await answer_all(ask, requests, log, progress, config.concurrency or concurrency)


@contextlib.asynccontextmanager
async def _server_answers(config: BatchConfig) -> AsyncIterator[Ask]:
    async with make_async_client(config.url or BASE_URL, timeout_s=config.timeout_s) as client:

        async def ask(request: Row) -> Reply:
            # The body is passed on as it is, so fields unknown to the client survive.
            path = request["url"].removeprefix("/v1")
            outcome = await attempt(lambda: client.post(path, body=request["body"], cast_to=object))
            if outcome.error is None and not isinstance(outcome.response, dict):
                return Reply(None, f"the reply is no JSON object: {outcome.response!r:.100}")
            return Reply(outcome.response, outcome.error)

        yield ask


@contextlib.asynccontextmanager
async def engine_answers(engine: OfflineEngine) -> AsyncIterator[Ask]:
    """Start the engine, and ask it instead of a server."""
    async with engine:

        async def ask(request: Row) -> Reply:
            answer = await engine.ask(request["url"], request["body"])
            if answer.status == 200:
                return Reply(answer.body, None)
            return Reply(None, f"{answer.status}: {' '.join(answer.body['error']['message'].split())[:300]}")

        yield ask


def engine_for(config: BatchConfig, requests: Sequence[Row], answers: Path) -> OfflineEngine:
    """An engine for these requests; its log is beside the answers."""
    settings = load_config(ServeConfig, config.engine or None, {"model": config.base, "store": config.store or None})
    # Room for each: the requests of all of them may wait at once.
    models = len({str(request["body"]["model"]) for request in requests})
    settings = dataclasses.replace(settings, max_cpu_loras=max(settings.max_cpu_loras, models))
    return OfflineEngine(settings, engine_log(answers))


def engine_log(answers: Path) -> Path:
    """Where the engine of these answers logs."""
    return answers.with_suffix(".log")


def _line(request: Row, reply: Reply) -> Row:
    """The output line of one request."""
    line: Row = {
        "id": f"batch_req_{request['custom_id']}",
        "custom_id": request["custom_id"],
        "request_sha256": request_sha256(request),
    }
    if reply.body is None:
        return line | {"response": None, "error": {"code": "failed", "message": reply.error}}
    response = {"status_code": 200, "request_id": reply.body.get("id"), "body": reply.body}
    return line | {"response": response, "error": None}
