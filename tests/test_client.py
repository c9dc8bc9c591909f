"""The one reader of `GET /v1/models`: what servers list, and one line for each way they can fail."""

import asyncio
import http.server
import json
import socket
import threading

import pytest

from counsel.client import API_KEY, list_models, list_models_async, make_async_client, make_client
from counsel.errors import UserError
from tests.json_handler import JsonHandler

OURS = [
    {"id": "tiny", "root": "tiny", "parent": None, "max_model_len": 512},
    {"id": "calm", "root": "calm@3f2a", "parent": "tiny", "max_model_len": 512},
    {"id": "calm@3f2a", "root": "calm@3f2a", "parent": "tiny", "max_model_len": 512},
    {"id": "calm@77b0", "root": "calm@77b0", "parent": "tiny", "max_model_len": 512},
]


class Lists(JsonHandler):
    """Answers every GET with the status, type and body that the test gave the server."""

    def do_GET(self) -> None:
        status, content_type, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Lists)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def listed(server, *cards):
    server.answer = (200, "application/json", json.dumps({"object": "list", "data": cards}).encode())
    with make_client(server.url) as client:
        models = list_models(client)

    async def ask():
        async with make_async_client(server.url) as client:
            return await list_models_async(client)

    assert asyncio.run(ask()) == models
    return models


def test_our_own_server(server):
    """Exact versions are known but are not names; a name means its current version."""
    models = listed(server, *OURS)
    assert (models.base, models.adapters, models.names) == ("tiny", ("calm",), ("tiny", "calm"))
    assert models.max_model_len == 512
    exact = {name: models.exact(name) for name in models.roots}
    assert exact == {"tiny": "tiny", "calm": "calm@3f2a", "calm@3f2a": "calm@3f2a", "calm@77b0": "calm@77b0"}


def test_stock_vllm(server):
    """Its roots are paths, which no request can name."""
    models = listed(server, {"id": "tiny", "root": "/models/tiny"}, {"id": "calm", "root": "/a", "parent": "tiny"})
    assert models.adapters == ("calm",)
    assert [models.exact(name) for name in models.names] == ["tiny", "calm"]


def test_an_adapter_that_stock_vllm_serves_under_its_path_is_a_name(server):
    """`--lora-modules org/calm=org/calm`: its root is its own name, as that of an exact version."""
    base, adapter = {"id": "tiny", "root": "/models/tiny"}, {"id": "org/calm", "root": "org/calm", "parent": "tiny"}
    models = listed(server, base, adapter)
    assert (models.adapters, models.names) == (("org/calm",), ("tiny", "org/calm"))


def test_a_server_that_tells_only_names(server):
    """The first model is the base; the others are models of their own, in the server's order."""
    models = listed(server, {"id": "gpt-b"}, {"id": "gpt-a"})
    assert (models.base, models.adapters, models.names) == ("gpt-b", (), ("gpt-b", "gpt-a"))
    assert models.max_model_len is None
    assert models.exact("gpt-a") == "gpt-a"


@pytest.mark.parametrize(
    ("status", "content_type", "body", "message"),
    [
        (
            200,
            "text/html",
            "<html>hello",
            "is not an OpenAI-compatible API: GET /models answered '<html>hello'; give a url",
        ),
        (200, "application/json", "{}", "is not an OpenAI-compatible API"),
        (200, "application/json", "[]", "is not an OpenAI-compatible API"),
        (200, "application/json", '{"data": ["tiny"]}', "is not an OpenAI-compatible API"),
        (200, "application/json", '{"data": [{"name": "tiny"}]}', "is not an OpenAI-compatible API"),
        (200, "application/json", '{"data": [', "is not an OpenAI-compatible API"),
        (200, "application/json", '{"data": []}', "lists no model; load one there"),
        (200, "application/json", json.dumps({"data": OURS[1:]}), "lists no base model, only the adapters calm, calm@"),
        (
            401,
            "application/json",
            '{"error": {"message": "a key is\\nneeded"}}',
            "answered 401 to GET /models: a key is needed",
        ),
        (404, "text/html", "<html>no such page", f"answered 404 to GET /models: .*; check --url and {API_KEY}"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(server, status, content_type, body, message):
    """With the url, what it answered and what to do."""
    server.answer = (status, content_type, body.encode())
    with make_client(server.url) as client, pytest.raises(UserError, match=message) as caught:
        list_models(client)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_server_at_all_is_one_line():
    """A port that nothing listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with make_client(url) as client, pytest.raises(UserError, match=f"no server answers at {url}; start one"):
            list_models(client)
