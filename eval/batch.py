"""Answer an OpenAI Batch file on any OpenAI-compatible server: several models in one file, results as they come.

    python -m eval batch requests.jsonl answers.jsonl --url http://127.0.0.1:8000/v1

Input, one request a line, as the Batch API defines it: `custom_id` (its own), `method` (`POST`), `url`
(`/v1/chat/completions` or `/v1/completions`) and `body`. Output, one line each, in the order they finish: `id`,
`custom_id`, `response` {`status_code`, `request_id`, `body`} and `error` (null, or {`code`, `message`}).

Killed and given again, it goes on: no request is lost or answered twice, and those that failed are sent again.
"""

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any

import openai

from eval.config import BatchConfig
from eval.online import Progress, attempt, run_bounded
from eval.samples import Row, RowLog
from serve.client import make_async_client
from train.command import Result
from train.errors import UserError
from train.files import read_jsonl

URLS = ("/v1/chat/completions", "/v1/completions")


def batch(config: BatchConfig) -> Result:
    """Answer every request that the output lacks; exit status 1 when some failed."""
    requests = read_requests(Path(config.requests))
    with RowLog(Path(config.answers), ("custom_id",)) as log:
        ids = {request["custom_id"] for request in requests}
        strangers = [key[0] for key in log.done if key[0] not in ids]
        if strangers:
            raise UserError(f"{config.answers!r} answers {strangers[0]!r}, which {config.requests!r} does not ask")
        if log.done:
            print(f"{len(log.done)} of {len(requests)} are answered already", file=sys.stderr)
        progress = Progress(len(requests), len(log.done))
        asyncio.run(_answer(config, [r for r in requests if (r["custom_id"],) not in log.done], log, progress))
        failed = sum(row["error"] is not None for row in log.done.values())
    print(f"{len(requests) - failed} answered, {failed} failed: {config.answers}")
    document = {"requests": len(requests), "failed": failed, "answers": config.answers}
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


async def _answer(config: BatchConfig, requests: list[Row], log: RowLog, progress: Progress) -> None:
    async with make_async_client(config.url, timeout_s=config.timeout_s) as client:

        async def answer(request: Row) -> None:
            log.append(await _reply(client, request))
            progress.step(request["body"]["model"])

        # By model: an adapter then stays loaded, and no batch mixes more of them than it must.
        ordered = sorted(requests, key=lambda request: str(request["body"]["model"]))
        await run_bounded([partial(answer, request) for request in ordered], config.concurrency)


async def _reply(client: openai.AsyncOpenAI, request: Row) -> Row:
    """The output line of one request. The body is passed on as it is, so fields unknown to the client survive."""
    path = request["url"].removeprefix("/v1")
    outcome = await attempt(lambda: client.post(path, body=request["body"], cast_to=object))
    line: dict[str, Any] = {"id": f"batch_req_{request['custom_id']}", "custom_id": request["custom_id"]}
    if outcome.error is not None:
        return line | {"response": None, "error": {"code": "failed", "message": outcome.error}}
    body: Any = outcome.response
    return line | {"response": {"status_code": 200, "request_id": body.get("id"), "body": body}, "error": None}
