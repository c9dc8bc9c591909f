"""How the project talks to a server: the official `openai` clients, and the one reader of `GET /v1/models`.

Retries are off: a measurement or a test must see every failure.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import openai

from counsel.errors import UserError
from counsel.values import BASE_URL, checked_url

API_KEY = "COUNSEL_API_KEY"

# A server that takes longer than this for its list of models is not ready.
_LIST_TIMEOUT_S = 10.0


class ServerModels(NamedTuple):
    """What a server serves, as `GET /v1/models` lists it.

    names: every model but the exact versions of adapters (`name@version`), in the server's order. adapters: those of
    them that are adapters. roots: for every listed name, exact versions too, what it means: `name@version` for an
    adapter of this project's server, a path for stock vLLM, empty if the server does not report it.
    max_model_len: most tokens of prompt and answer together; None if the server does not report it.
    """

    base: str
    adapters: tuple[str, ...]
    names: tuple[str, ...]
    roots: dict[str, str]
    max_model_len: int | None

    def exact(self, name: str) -> str:
        """The exact version that `name` means now, or `name` itself where the server lists no such version.

        A request by exact version is never answered by a version that is published later.
        """
        root = self.roots[name]
        return root if root in self.roots else name


def make_client(base_url: str = BASE_URL, api_key: str = "", timeout_s: float = 600.0) -> openai.OpenAI:
    """A client without retries. `api_key` defaults to $COUNSEL_API_KEY; `timeout_s` limits the wait for each byte."""
    return openai.OpenAI(
        base_url=checked_url(base_url), api_key=_key(api_key), max_retries=0, timeout=_timeout(timeout_s)
    )


def make_async_client(base_url: str = BASE_URL, api_key: str = "", timeout_s: float = 600.0) -> openai.AsyncOpenAI:
    """`make_client` for asyncio."""
    return openai.AsyncOpenAI(
        base_url=checked_url(base_url), api_key=_key(api_key), max_retries=0, timeout=_timeout(timeout_s)
    )


def list_models(client: openai.OpenAI) -> ServerModels:
    """The models that the server lists.

    Raises UserError if no server answers, if it refuses, if it is not an OpenAI-compatible server, or if it lists no
    base model.
    """
    with _one_line_errors(client):
        reply = client.models.with_raw_response.list(timeout=_LIST_TIMEOUT_S)
    return _read_models(reply.http_response.content, _url(client))


async def list_models_async(client: openai.AsyncOpenAI) -> ServerModels:
    """`list_models` for asyncio."""
    with _one_line_errors(client):
        reply = await client.models.with_raw_response.list(timeout=_LIST_TIMEOUT_S)
    return _read_models(reply.http_response.content, _url(client))


def error_message(error: openai.APIError) -> str:
    """The server's message in an error of the SDK, as one line."""
    body = error.body
    message = str(body["message"] if isinstance(body, dict) and "message" in body else error)
    return " ".join(message.split())


def _read_models(body: bytes, url: str) -> ServerModels:
    try:
        cards = {str(card["id"]): card for card in json.loads(body)["data"]}
        roots = {name: str(card.get("root") or "") for name, card in cards.items()}
        # vLLM's cards name the base of an adapter as its parent; the card of a base has none.
        adapters = [name for name, card in cards.items() if card.get("parent")]
        lengths = {name: card.get("max_model_len") for name, card in cards.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        start = body[:60].decode("utf-8", "replace")
        raise UserError(
            f"{url} is not an OpenAI-compatible API: GET /models answered {start!r}; give a url like {BASE_URL}"
        ) from error
    if not cards:
        raise UserError(f"the server at {url} lists no model; load one there, or give --url of another server")
    bases = [name for name in cards if name not in adapters]
    if not bases:
        raise UserError(f"the server at {url} lists no base model, only the adapters {', '.join(adapters)}")
    # An exact version is its own root. So is an adapter of stock vLLM that is named like its path.
    names = [name for name in cards if name in bases or "@" not in name or roots[name] != name]
    return ServerModels(
        bases[0], tuple(name for name in names if name in adapters), tuple(names), roots, lengths[bases[0]]
    )


@contextlib.contextmanager
def _one_line_errors(client: openai.OpenAI | openai.AsyncOpenAI) -> Iterator[None]:
    url = _url(client)
    try:
        yield
    except openai.APIConnectionError as error:
        raise UserError(f"no server answers at {url}; start one with python -m serve, or give --url") from error
    except openai.APIStatusError as error:
        raise UserError(
            f"{url} answered {error.status_code} to GET /models: {error_message(error)}; check --url and {API_KEY}"
        ) from error


def _url(client: openai.OpenAI | openai.AsyncOpenAI) -> str:
    return str(client.base_url).rstrip("/")


def _key(api_key: str) -> str:
    # The SDK rejects an empty key; a server without keys ignores it.
    return api_key or os.environ.get(API_KEY) or "none"


def _timeout(timeout_s: float) -> openai.Timeout:
    return openai.Timeout(timeout_s, connect=10.0)
