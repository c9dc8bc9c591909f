"""How the stack talks to a server: the official `openai` clients, and one streamed reply with its times.

Retries are off: a measurement or a test must see every failure.
"""

import os
import time
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import openai

from counsel.errors import UserError

API_KEY = "COUNSEL_API_KEY"
BASE_URL = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Reply:
    """One reply. Times are seconds from just before the request was sent.

    model: what the server says answered (`name@version` for an adapter). ttft_s: to the first text, None when there
    was none. chunk_s: arrival of each piece of text. Token counts are the server's own.
    """

    model: str
    text: str
    ttft_s: float | None
    duration_s: float
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    chunk_s: tuple[float, ...]


def make_client(base_url: str = BASE_URL, api_key: str = "", timeout_s: float = 600.0) -> openai.OpenAI:
    """A client without retries. `api_key` defaults to $COUNSEL_API_KEY; `timeout_s` bounds the wait for each byte."""
    return openai.OpenAI(
        base_url=checked_url(base_url), api_key=_key(api_key), max_retries=0, timeout=_timeout(timeout_s)
    )


def make_async_client(base_url: str = BASE_URL, api_key: str = "", timeout_s: float = 600.0) -> openai.AsyncOpenAI:
    """`make_client` for asyncio."""
    return openai.AsyncOpenAI(
        base_url=checked_url(base_url), api_key=_key(api_key), max_retries=0, timeout=_timeout(timeout_s)
    )


def checked_url(url: str) -> str:
    """`url`, if it is one that a client can call; raises UserError otherwise."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"url is {url!r}; it must be like {BASE_URL}")
    return url


def timed_reply(client: openai.OpenAI, model: str, messages: Iterable[Any], max_tokens: int, **sampling: Any) -> Reply:
    """Ask for one chat reply as a stream and time it; `sampling` goes to the server (temperature, seed, ...)."""
    clock = _Stopwatch(model)
    for chunk in client.chat.completions.create(**_request(model, messages, max_tokens, sampling)):
        clock.take(chunk)
    return clock.reply()


async def timed_reply_async(
    client: openai.AsyncOpenAI, model: str, messages: Iterable[Any], max_tokens: int, **sampling: Any
) -> Reply:
    """`timed_reply` for asyncio."""
    clock = _Stopwatch(model)
    async for chunk in await client.chat.completions.create(**_request(model, messages, max_tokens, sampling)):
        clock.take(chunk)
    return clock.reply()


def _request(model: str, messages: Iterable[Any], max_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "messages": list(messages),
        "max_completion_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
    }


def _key(api_key: str) -> str:
    # The SDK refuses an empty key; a server without keys ignores it.
    return api_key or os.environ.get(API_KEY) or "none"


def _timeout(timeout_s: float) -> openai.Timeout:
    return openai.Timeout(timeout_s, connect=10.0)


@dataclass
class _Stopwatch:
    """Collects the chunks of one stream and when they came."""

    model: str
    started: float = field(default_factory=time.perf_counter)
    texts: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def take(self, chunk: Any) -> None:
        self.model = chunk.model
        for choice in chunk.choices:
            if choice.delta.content:
                self.times_s.append(time.perf_counter() - self.started)
                self.texts.append(choice.delta.content)
            self.finish_reason = choice.finish_reason or self.finish_reason
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.completion_tokens = chunk.usage.completion_tokens

    def reply(self) -> Reply:
        return Reply(
            model=self.model,
            text="".join(self.texts),
            ttft_s=self.times_s[0] if self.times_s else None,
            duration_s=time.perf_counter() - self.started,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            finish_reason=self.finish_reason,
            chunk_s=tuple(self.times_s),
        )
