"""The routes that take and delete votes."""

import asyncio
from pathlib import Path
from typing import Any

from serve.api_errors import ApiError
from serve.gateway import CALLER, Service
from serve.request_body import parse_body, read_body
from serve.ui.votes import VOTES, VoteFile, parse_vote, vote_row


def attach_votes(app: Any) -> None:
    """Add `POST /v1/votes` and `DELETE /v1/votes/{id}` to vLLM's app."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    def file_of(request: Request) -> tuple[Service, VoteFile]:
        service: Service = request.app.state.counsel
        return service, VoteFile(Path(service.config.votes))

    @app.post(VOTES)
    async def add(request: Request) -> JSONResponse:
        service, file = file_of(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # Another site's page may send other types to a server without keys, and a browser would not ask first.
            raise ApiError(400, "send a vote as application/json")
        caller = request.scope[CALLER]
        # A vote's body takes memory, as a chat's does, so it counts in the same limits.
        with service.limits.admit(caller, 1):
            vote = parse_vote(parse_body(await read_body(request.receive, service.config.max_body_kb << 10)))
            # Masking a long conversation takes a moment, and other callers' streams must go on.
            row = await asyncio.to_thread(vote_row, vote, service.pool.names, caller)
            await asyncio.to_thread(file.add, row)
        return JSONResponse({"id": row["id"], "object": "vote", "models": row["models"]})

    @app.delete(VOTES + "/{vote_id}")
    async def delete(vote_id: str, request: Request) -> JSONResponse:
        _, file = file_of(request)
        await asyncio.to_thread(file.delete, vote_id)
        return JSONResponse({"id": vote_id, "object": "vote", "deleted": True})
