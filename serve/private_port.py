"""A second port for the machines inside: `/metrics` and `/v1/adapters` without keys, and nothing else.

A scraper or a fleet then needs no admin key, which could do more. It listens on a loopback or private address only
(serve/config.py).
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class PrivatePort(uvicorn.Server):
    """Serves until its task is cancelled. Signals belong to the server that it runs beside."""

    def __init__(self, host: str, port: int, adapters: Callable[[], list[dict[str, Any]]]) -> None:
        """Take the port. Raises OSError when it is taken."""

        async def metrics(request: Request) -> Response:
            return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

        async def list_adapters(request: Request) -> Response:
            return JSONResponse({"object": "list", "data": adapters()})

        app = Starlette(routes=[Route("/metrics", metrics), Route("/v1/adapters", list_adapters)])
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listening = socket.create_server((host, port), family=family)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def answer(self) -> None:
        """Serve until cancelled."""
        await self.serve([self.listening])
