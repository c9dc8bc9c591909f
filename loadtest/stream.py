"""One streamed chat reply through the official `openai` client, timed chunk by chunk.

The typed iterator (`for chunk in client.chat.completions.create(stream=True)`) builds a model object per chunk, about
0.1 ms of CPU; a load test of a fast server would measure that. `with_streaming_response` is the same call of the same
client without the objects; tests/test_loadtest_stream.py holds it equal to the typed path.
"""

import collections
import contextlib
import json
import math
import os
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2
import openai

from counsel.client import API_KEY, checked_url
from loadtest.records import WHOLE, Row
from loadtest.scenario import Scenario

# A server may close an idle connection at any moment (vLLM does after 5 s); a request sent just then fails. Dropping
# idle connections earlier than any common server does keeps that race out of the error counts.
_IDLE_S = 2.0
_CONNECT_S = 10.0
# How long to wait for the end of a reply whose last event has come.
_LINGER_S = 1.0
_TOO_LONG = "the reply took longer than the limit"
# Where a request's own sending time lies, for whoever reads the response.
_SENT = "counsel_sent"
_BOM = b"\xef\xbb\xbf"
# From this many tokens a chunk on, a server is taken to send several at once.
_BUNDLED = 1.5
# Characters of a call that brings nothing but its place in the list.
_EMPTY_CALL = len(json.dumps({"index": 0, "function": {"arguments": ""}}))


class _Connections(httpx2.BaseTransport):
    """One connection for each request that runs; the one that was used last is used again.

    A common pool looks through all its connections whenever a request begins or ends; with a thousand in flight that
    alone fills a core. Here each connection is a pool of its own, and the free ones lie on a stack.
    """

    def __init__(self, reuse: bool) -> None:
        self._limits = httpx2.Limits(max_connections=1, max_keepalive_connections=int(reuse), keepalive_expiry=_IDLE_S)
        self._verify = ssl.create_default_context()
        self._free: list[httpx2.HTTPTransport] = []
        self._all: list[httpx2.HTTPTransport] = []
        # ProcessState, because the first one imports what it needs, and no request should wait for that.
        self._add()

    def _add(self) -> None:
        self._all.append(httpx2.HTTPTransport(verify=self._verify, limits=self._limits))
        self._free.append(self._all[-1])

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if not self._free:
            self._add()
        connection = self._free.pop()
        # What the client did until here, to make a request of its arguments, is no time of the server.
        request.extensions[_SENT] = time.monotonic()
        try:
            response = connection.handle_request(request)
        except BaseException:
            self._free.append(connection)
            raise
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Reply(response.stream, lambda: self._free.append(connection))
        return response

    def close(self) -> None:
        for connection in self._all:
            connection.close()


class _Reply(httpx2.SyncByteStream):
    """A reply's bytes; once they are closed, `closed` is called."""

    def __init__(self, stream: httpx2.SyncByteStream, closed: Callable[[], None]) -> None:
        self._stream = stream
        self._closed: Callable[[], None] | None = closed

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        closed, self._closed = self._closed, None
        try:
            self._stream.close()
        finally:
            if closed:
                closed()


def make_client(url: str, reuse: bool = True) -> openai.OpenAI:
    """The process's one client, for all its requests; no retries, which would hide errors and stretch latencies.

    `reuse`: send on a connection that an earlier request has left open, where there is one.
    """
    # Proxies of the environment are for the internet; a load test names its server.
    http = httpx2.Client(transport=_Connections(reuse), trust_env=False)
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
    if scenario.ignore_eos:
        body["extra_body"] = {"ignore_eos": True}
    return body


class Limits(NamedTuple):
    """Seconds after sending: when the client hangs up (None: never), longest request, longest silence."""

    cancel_s: float | None
    request_timeout_s: float
    idle_timeout_s: float


class _TimeUp(BaseException):
    """A limit was reached while nothing came. No Exception: the client would take it for a broken connection."""


def _no_timer(seconds: float, error: BaseException) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def ask(
    client: openai.OpenAI, body: Mapping[str, Any], row: Row, start_s: float, limits: Limits,
    timer: Callable[[float, BaseException], contextlib.AbstractContextManager[Any]] = _no_timer,
) -> str:  # fmt: skip
    """Send one request, fill in `row` from what comes back, and return the reply's text.

    Never raises for what a server or network does: it becomes the row's outcome. `start_s` is the run's start on
    `time.monotonic`. `timer` raises its error in the block after so many seconds (gevent.Timeout): without it, limits
    hold at the next chunk, and at the end of a silence.
    """
    sent = time.monotonic()
    row.sent_s = sent - start_s
    hang_up = sent + limits.cancel_s if limits.cancel_s is not None else math.inf
    stop = min(sent + limits.request_timeout_s, hang_up)
    patience_s = max(min(limits.idle_timeout_s, stop - sent), 0.001)
    text: list[str] = []
    try:
        with (
            timer(stop - sent, _TimeUp()),
            client.chat.completions.with_streaming_response.create(
                **body, timeout=httpx2.Timeout(patience_s, connect=min(_CONNECT_S, patience_s))
            ) as response,
        ):
            row.status = response.status_code
            row.sent_s = response.http_request.extensions.get(_SENT, sent) - start_s
            pieces = _until(stop, response.iter_bytes())
            _read(sse_data(pieces), row, text, start_s)
            row.end_s = time.monotonic() - start_s
            # A connection can be used again only once its reply was read to the end, which comes after the last event.
            with contextlib.suppress(httpx2.RequestError, _ReplyError, _TimeUp), timer(_LINGER_S, _TimeUp()):
                collections.deque(pieces, maxlen=0)
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
    except _TimeUp:
        row.outcome, row.error = "timeout", _TOO_LONG
    now = time.monotonic()
    row.end_s = now - start_s if row.end_s is None else row.end_s
    if row.outcome == "timeout" and now >= hang_up:
        row.outcome, row.error = "cancelled", None
    return "".join(text)


def sse_data(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, however the bytes are cut; also of a last one that nothing ends.

    Lines end as the standard lets them: in LF, CRLF or CR; an event of several data lines is those lines together.
    """
    tail, data = b"", []
    begun = after_cr = False
    for chunk in chunks:
        if after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
        text = tail + chunk
        if not begun and len(text) >= len(_BOM):
            begun, text = True, text.removeprefix(_BOM)
        if chunk:
            # The other half of a CRLF may come later; what stands before it is a whole line now.
            after_cr = chunk.endswith(b"\r")
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = text.split(b"\n")
        tail = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if tail.startswith(b"data:"):
        data.append(tail[5:].strip())
    if data:
        yield b"\n".join(data)


def _until(stop: float, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks up to `stop` on `time.monotonic`, whatever is in them: it may be keep-alive comments without end."""
    for chunk in chunks:
        yield chunk
        if time.monotonic() >= stop:
            raise _ReplyError("timeout", _TOO_LONG)


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
    ended_s: float | None = None
    lengths: list[int] = []
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
            if length := _output(delta):
                if last is None:
                    row.first_s = now - start_s
                    # Servers that count in every chunk say how many tokens the first one brings.
                    row.first_tokens = row.completion_tokens
                else:
                    gaps.append(now - last)
                last = now
                lengths.append(length)
                row.last_s = now - start_s
                if content := delta.get("content"):
                    if row.content_s is None:
                        row.content_s = row.last_s
                    text.append(content)
            if choice.get("finish_reason"):
                row.finish, ended_s = choice["finish_reason"], now - start_s
    if row.finish is None:
        raise _ReplyError("broken_stream", "the stream ended " + ("at [DONE]" if done else "early"))
    if row.completion_tokens is not None and lengths:
        row.first_tokens = row.first_tokens or _first_tokens(row.completion_tokens, lengths)
        # The end of sequence is a token that `usage` counts and nobody sees: its chunk has no text. Where the limit
        # ended the reply, or each token was seen, the finish reason comes alone, and whenever it comes.
        if row.finish != "length" and len(lengths) < row.completion_tokens:
            row.last_s = ended_s
    if row.finish not in WHOLE:
        row.outcome, row.error = "aborted", f"finish_reason is {_line(row.finish)}"
    elif row.first_s is None:
        row.outcome = "empty"
    elif row.completion_tokens is None:
        row.outcome = "no_usage"
    else:
        row.outcome = "ok"


def _output(delta: Mapping[str, Any]) -> int:
    """How much output a delta holds, in characters; 0 where there is none. A call begins with a name, not a text."""
    texts = [delta.get(key) for key in ("content", "reasoning", "reasoning_content", "refusal")]
    found = sum(len(text) for text in texts if isinstance(text, str))
    calls = [*_list(delta.get("tool_calls")), *_list(delta.get("function_call"))]
    return found + sum(max(len(json.dumps(call)) - _EMPTY_CALL, 1) for call in calls)


def _first_tokens(tokens: int, lengths: Sequence[int]) -> int:
    """How many of a reply's tokens its first chunk held, by its share of the text; 1 where chunks are tokens.

    A few chunks fewer than tokens are no sign of more: a token may have no text, or half a character.
    """
    if tokens < _BUNDLED * len(lengths):
        return 1
    return min(max(round(tokens * lengths[0] / sum(lengths)), 1), tokens)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


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
