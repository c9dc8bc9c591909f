"""Answer an OpenAI Batch file, with any number of models: on an OpenAI-compatible server, or on an engine started here.

    python -m eval batch requests.jsonl answers.jsonl --url http://127.0.0.1:8000/v1
    python -m eval batch requests.jsonl answers.jsonl --base smollm2-135m --store store
    python -m eval batch requests.jsonl answers.jsonl --base smollm2-135m --shard 1/4     -> answers-1-of-4.jsonl
    python -m eval batch requests.jsonl answers.jsonl --base smollm2-135m --engine ray --actors 8

Input, one request per line, as in the Batch API: `custom_id` (unique), `method` (`POST`), `url`
(`/v1/chat/completions` or `/v1/completions`) and `body`. Output, one line per request as it completes: `id`,
`custom_id`, `response` {`status_code`, `request_id`, `body`} and `error` (null, or {`code`, `message`}). We add
`request_sha256`: a request that changed after it was answered is sent again. Server, engine and the engines of
a Ray cluster give the same rows, in the order in which they are complete.

After a kill, the same command continues: no request is lost or answered twice, and failed requests are sent again. A
request's shard depends on its `custom_id` alone; to merge shards, concatenate their files.
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
from counsel.client import make_async_client
from counsel.errors import UserError
from counsel.files import read_jsonl, write_jsonl
from counsel.values import BASE_URL
from eval.config import BatchConfig
from eval.ray_engines import RayRequest, answers_on_ray, require_ray
from eval.requests import Progress, attempt, run_bounded
from eval.samples import Row, RowLog, read_rows
from serve.config import ServeConfig
from serve.offline import OfflineAnswer, OfflineEngine

URLS = ("/v1/chat/completions", "/v1/completions")
SERVER_CONCURRENCY = 32
# Well above the engine's batch size: it must never wait for the next request.
ENGINE_CONCURRENCY = 2048
RAY_ACTORS = 2


class BatchReply(NamedTuple):
    """The response body of one request, or the error."""

    body: dict[str, Any] | None
    error: str | None


Ask = Callable[[Row], Awaitable[BatchReply]]


def batch(config: BatchConfig) -> Result:
    """Answer every request that the output lacks; exit status 1 if some failed."""
    requests = read_requests(Path(config.requests))
    path = Path(config.answers)
    if config.part is not None:
        k, n = config.part
        requests = [request for request in requests if shard_of(request["custom_id"], n) == k]
        path = path.with_name(f"{path.stem}-{k}-of-{n}{path.suffix}")
    if config.engine == "ray":
        require_ray()
    elif config.base and engine_log(path).resolve() in (path.resolve(), Path(config.requests).resolve()):
        raise UserError(
            f"the engine would write its log to {str(engine_log(path))!r}; name requests and answers .jsonl"
        )
    asked = {request["custom_id"]: request_sha256(request) for request in requests}

    def still_holds(row: Row) -> bool:
        # A row from another program has no hash and is kept.
        known = row.get("request_sha256")
        return known in (None, asked.get(row.get("custom_id"), known))

    replaced = [row for row in read_rows(path) if not still_holds(row)]
    if replaced:
        aside = path.with_name(f"{path.stem}-replaced{path.suffix}")
        write_jsonl(aside, [*read_rows(aside), *replaced])
        print(
            f"{len(replaced)} requests have changed and are sent again; their old answers are in {aside}",
            file=sys.stderr,
        )
    with RowLog(path, ("custom_id",), keep=still_holds) as log:
        foreign = [key[0] for key in log.done if key[0] not in asked]
        if foreign:
            raise UserError(
                f"{str(path)!r} has an answer to {foreign[0]!r}, which is not a request of {config.requests!r} (or of "
                "this shard); name another file for the answers"
            )
        if log.done:
            print(f"{len(log.done)} of {len(requests)} requests are answered already", file=sys.stderr)
        todo = [request for request in requests if (request["custom_id"],) not in log.done]
        if todo:
            progress = Progress(len(requests), len(log.done))
            if config.engine == "ray":
                _answer_on_ray(config, todo, log, progress)
            else:
                asyncio.run(_answer_on(config, todo, log, progress))
        failed = sum(row["error"] is not None for row in log.done.values())
    print(f"{len(requests) - failed} answered, {failed} failed: {path}")
    document = {"requests": len(requests), "failed": failed, "answers": str(path)}
    return Result(document, 1 if failed else 0)


def read_requests(path: Path) -> list[Row]:
    """The requests of a Batch file; UserError names the first line that is not one, or repeats a `custom_id`."""
    requests = read_jsonl(path)
    if not requests:
        raise UserError(f"{str(path)!r} has no requests; write one JSON object per line (see docs/eval.md)")
    known: set[str] = set()
    for number, request in enumerate(requests, start=1):
        name = request.get("custom_id")
        if not isinstance(name, str) or name in known:
            raise UserError(f"{str(path)!r} request {number}: custom_id is {name!r}; it must be a unique string")
        if request.get("method") != "POST" or request.get("url") not in URLS:
            raise UserError(f"{str(path)!r} request {name!r}: needs method POST and as url one of {', '.join(URLS)}")
        body = request.get("body")
        if not isinstance(body, dict) or "model" not in body or body.get("stream"):
            raise UserError(f"{str(path)!r} request {name!r}: body must be an object with a model and without stream")
        known.add(name)
    return requests


def request_sha256(request: Row) -> str:
    """The hash of everything that could change the answer: url and body, whatever the order of their keys."""
    return hashlib.sha256(json.dumps([request["url"], request["body"]], sort_keys=True).encode()).hexdigest()


def shard_of(custom_id: str, n: int) -> int:
    """Which of `n` shards, from 1, a request belongs to, by the hash of its `custom_id`."""
    return int(hashlib.sha256(custom_id.encode()).hexdigest(), 16) % n + 1


async def answer_all(ask: Ask, requests: Sequence[Row], log: RowLog, progress: Progress, concurrency: int) -> None:
    """Append the answer to each request as it arrives, with `concurrency` requests in flight."""

    async def answer(request: Row) -> None:
        log.append(_line(request, await ask(request)))
        progress.step(request["body"]["model"])

    await run_bounded([partial(answer, request) for request in _by_model(requests)], concurrency)


async def _answer_on(config: BatchConfig, requests: Sequence[Row], log: RowLog, progress: Progress) -> None:
    if config.base:
        answering, concurrency = engine_answers(engine_for(config, requests, log.path)), ENGINE_CONCURRENCY
    else:
        answering, concurrency = _server_answers(config), SERVER_CONCURRENCY
    async with answering as ask:
        await answer_all(ask, requests, log, progress, config.concurrency or concurrency)


def _answer_on_ray(config: BatchConfig, requests: Sequence[Row], log: RowLog, progress: Progress) -> None:
    by_id = {request["custom_id"]: request for request in requests}
    settings = _settings(config, requests)
    # An actor may run in another folder of the same machine.
    model = str(Path(settings.model).absolute()) if Path(settings.model).is_dir() else settings.model
    settings = dataclasses.replace(settings, model=model, store=str(Path(settings.store).absolute()))
    asked = [RayRequest(each["custom_id"], each["url"], each["body"]) for each in _by_model(requests)]
    answers = answers_on_ray(settings, asked, config.actors or RAY_ACTORS, config.concurrency or ENGINE_CONCURRENCY)
    for name, answer in answers:
        log.append(_line(by_id[name], _reply(answer)))
        progress.step(by_id[name]["body"]["model"])


def _by_model(requests: Sequence[Row]) -> list[Row]:
    """Sorted by model, an adapter stays loaded, and a batch mixes as few of them as possible."""
    return sorted(requests, key=lambda request: str(request["body"]["model"]))


@contextlib.asynccontextmanager
async def _server_answers(config: BatchConfig) -> AsyncIterator[Ask]:
    async with make_async_client(config.url or BASE_URL, timeout_s=config.timeout_s) as client:

        async def ask(request: Row) -> BatchReply:
            # The body is sent unchanged, including fields that the client does not know.
            path = request["url"].removeprefix("/v1")
            outcome = await attempt(lambda: client.post(path, body=request["body"], cast_to=object))
            if outcome.error is None and not isinstance(outcome.response, dict):
                return BatchReply(None, f"the reply is not a JSON object: {outcome.response!r:.100}")
            return BatchReply(outcome.response, outcome.error)

        yield ask


@contextlib.asynccontextmanager
async def engine_answers(engine: OfflineEngine) -> AsyncIterator[Ask]:
    """Start the engine and answer with it."""
    async with engine:

        async def ask(request: Row) -> BatchReply:
            return _reply(await engine.ask(request["url"], request["body"]))

        yield ask


def _reply(answer: OfflineAnswer) -> BatchReply:
    if answer.status == 200:
        return BatchReply(answer.body, None)
    return BatchReply(None, f"{answer.status}: {' '.join(answer.body['error']['message'].split())[:300]}")


def engine_for(config: BatchConfig, requests: Sequence[Row], answers: Path) -> OfflineEngine:
    """An engine for these requests; it logs next to the answers."""
    return OfflineEngine(_settings(config, requests), engine_log(answers))


def _settings(config: BatchConfig, requests: Sequence[Row]) -> ServeConfig:
    given = {"model": config.base, "store": config.store or None}
    settings = load_config(ServeConfig, config.engine_config or None, given)
    # Requests of all models may wait at the same time.
    models = len({str(request["body"]["model"]) for request in requests})
    room = max(settings.max_cpu_loras or 0, settings.max_loras or 0, models) or None
    return dataclasses.replace(settings, max_cpu_loras=room)


def engine_log(answers: Path) -> Path:
    """The log file of the engine for these answers."""
    return answers.with_suffix(".log")


def _line(request: Row, reply: BatchReply) -> Row:
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
