"""One streamed chat reply through the official `openai` client, timed chunk by chunk.

The typed iterator (`for chunk in client.chat.completions.create(stream=True)`) builds a model object per chunk, about
0.1 ms of CPU; a load test of a fast server would measure that. `with_streaming_response` is the same call of the same
client without the objects; tests/test_loadtest_stream.py holds it equal to the typed path.
"""

import itertools
import json
import math
import os
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2
import openai

from loadtest.rows import WHOLE, Row
from loadtest.scenario import Scenario
from serve.client import API_KEY, checked_url

# A server may close an idle connection at any moment (vLLM does after 5 s); a request sent just then fails. Dropping
# idle connections earlier than any common server does keeps that race out of the error counts.
_IDLE_S = 2.0
_CONNECT_S = 10.0
_POOLS = 64


class _Pools(httpx2.BaseTransport):
    """One transport over several connection pools, taken in turn.

    A pool looks through all its connections whenever a request begins or ends; with a thousand in flight that alone
    fills a core. Many small pools do the same work on a fraction of the connections.
    """

    def __init__(self) -> None:
        # Without a limit: a request that waits for a connection would look like a slow server.
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        verify = ssl.create_default_context()
        self._pools = [httpx2.HTTPTransport(verify=verify, limits=limits) for _ in range(_POOLS)]
        self._turn = itertools.cycle(self._pools)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return next(self._turn).handle_request(request)

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


def make_client(url: str) -> openai.OpenAI:
    """The process's one client, for all its requests; no retries, which would hide errors and stretch latencies."""
    # Proxies of the environment are for the internet; a load test names its server.
    http = httpx2.Client(transport=_Pools(), trust_env=False)
    key = os.environ.get(API_KEY) or "none"
    return openai.OpenAI(base_url=checked_url(url), api_key=key, max_retries=0, http_client=http)


def rehearse(scenario: Scenario) -> None:
    """Take one canned reply through the whole path, so that the first real request does not pay for lazy imports.

    Without it that request waits 0.2 s for the `openai` package, and so does every greenlet of the process.
    """
    reply = (
        b'data: {"choices": [{"delta": {"content": "w"}, "finish_reason": "stop"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
    )
    canned = httpx2.MockTransport(lambda request: httpx2.Response(200, content=reply))
    with openai.OpenAI(base_url=scenario.url, api_key="none", http_client=httpx2.Client(transport=canned)) as client:
        body = request_body(scenario, "canned", [{"role": "user", "content": "w"}], 1)
        ask(client, body, Row(0, 0, "canned", 0, 0.0), time.monotonic(), Limits(None, 10.0, 10.0))


def request_body(
    scenario: Scenario, model: str, messages: Sequence[Mapping[str, str]], max_tokens: int
) -> dict[str, Any]:
    """The arguments of `chat.completions.create` for one request."""
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": scenario.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if scenario.exact_output:
        body["extra_body"] = {"ignore_eos": True}
    return body


class Limits(NamedTuple):
    """Seconds after sending: when the client hangs up (None: never), longest request, longest silence."""

    cancel_s: float | None
    request_s: float
    silence_s: float


def ask(client: openai.OpenAI, body: Mapping[str, Any], row: Row, start_s: float, limits: Limits) -> str:
    """Send one request, fill in `row` from what comes back, and return the reply's text.

    Never raises for what a server or network does: it becomes the row's outcome. `start_s` is the run's start on
    `time.monotonic`.
    """
    sent = time.monotonic()
    row.sent_s = sent - start_s
    hang_up = sent + limits.cancel_s if limits.cancel_s is not None else math.inf
    stop = min(sent + limits.request_s, hang_up)
    patience_s = max(min(limits.silence_s, stop - sent), 0.001)
    text: list[str] = []
    try:
        with client.chat.completions.with_streaming_response.create(
            **body, timeout=httpx2.Timeout(patience_s, connect=min(_CONNECT_S, patience_s))
        ) as response:
            row.status = response.status_code
            _read(sse_data(_until(stop, response.iter_bytes())), row, text, start_s)
    except openai.APIStatusError as error:
        row.status, row.outcome, row.error = error.status_code, "http_error", _line(error.message)
    except (openai.APITimeoutError, httpx2.TimeoutException) as error:
        row.outcome, row.error = "timeout", _line(error)
    except openai.APIConnectionError as error:
        row.outcome, row.error = "connect_error", _line(error.__cause__ or error)
    except httpx2.RequestError as error:
        row.outcome, row.error = "broken_stream", _line(error)
    except _ReplyError as error:
        row.outcome, row.error = error.outcome, _line(error)
    now = time.monotonic()
    row.end_s = now - start_s
    if row.outcome == "timeout" and now >= hang_up:
        row.outcome, row.error = "cancelled", None
    return "".join(text)


def sse_data(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, however the bytes are cut; events of several data lines are not OpenAI's."""
    tail = b""
    for chunk in chunks:
        lines = (tail + chunk).split(b"\n")
        tail = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _until(stop: float, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks up to `stop` on `time.monotonic`, whatever is in them: it may be keep-alive comments without end."""
    for chunk in chunks:
        yield chunk
        if time.monotonic() >= stop:
            raise _ReplyError("timeout", "the reply took longer than the limit")


class _ReplyError(Exception):
    """A stream that came, but is no whole reply; `outcome` is the row's."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def _read(events: Iterator[bytes], row: Row, text: list[str], start_s: float) -> None:
    """Fill in times, tokens and outcome from a stream."""
    gaps: list[float] = []
    row.gaps_s = gaps
    last: float | None = None
    done = False
    for data in events:
        now = time.monotonic()
        if data == b"[DONE]":
            done = True
            break
        chunk = _chunk(data)
        if row.served is None:
            row.served = chunk.get("model")
        usage = chunk.get("usage")
        if usage:
            _count(usage, row)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            content = delta.get("content")
            if content or delta.get("reasoning") or delta.get("reasoning_content") or delta.get("tool_calls"):
                if last is None:
                    row.first_s = now - start_s
                else:
                    gaps.append(now - last)
                last = now
                row.last_s = now - start_s
                if content:
                    if row.content_s is None:
                        row.content_s = row.last_s
                    text.append(content)
            if choice.get("finish_reason"):
                row.finish = choice["finish_reason"]
                # The end of sequence is a token that `usage` counts and nobody sees: its chunk has no text.
                if last is not None:
                    row.last_s = now - start_s
    if row.finish is None:
        raise _ReplyError("broken_stream", "the stream ended " + ("at [DONE]" if done else "early"))
    if row.finish not in WHOLE:
        row.outcome, row.error = "aborted", f"finish_reason is {_line(row.finish)}"
    elif row.first_s is None:
        row.outcome = "empty"
    elif row.completion_tokens is None:
        row.outcome = "no_usage"
    else:
        row.outcome = "ok"


def _chunk(data: bytes) -> dict[str, Any]:
    """One event's JSON, a chat completion chunk; raises _ReplyError for an error, or for anything else."""
    try:
        chunk = json.loads(data)
    except ValueError:
        raise _ReplyError("server_error", f"not JSON: {data[:80]!r}") from None
    if not _is_chunk(chunk):
        raise _ReplyError("server_error", f"no chat completion chunk: {data[:80]!r}")
    if chunk.get("error"):
        raise _ReplyError("server_error", str(chunk["error"]))
    return chunk


def _is_chunk(chunk: Any) -> bool:
    """Whether the parts that are read have the types they are read as."""
    choices = chunk.get("choices") or [] if isinstance(chunk, dict) else None
    if not isinstance(choices, list) or not isinstance(chunk.get("usage") or {}, dict):
        return False
    deltas = [choice.get("delta") or {} for choice in choices if isinstance(choice, dict)]
    return len(deltas) == len(choices) and all(
        isinstance(delta, dict) and isinstance(delta.get("content") or "", str) for delta in deltas
    )


def _count(usage: Mapping[str, Any], row: Row) -> None:
    row.prompt_tokens = _whole(usage.get("prompt_tokens"))
    row.completion_tokens = _whole(usage.get("completion_tokens"))
    details = usage.get("prompt_tokens_details")
    row.cached_tokens = _whole(details.get("cached_tokens")) if isinstance(details, dict) else None


def _whole(count: Any) -> int | None:
    return count if isinstance(count, int) else None


def _line(error: object) -> str:
    """An error as one short line, with its type when it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
