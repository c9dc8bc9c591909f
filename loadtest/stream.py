"""One streamed chat reply through the official `openai` client, timed chunk by chunk.

The typed iterator (`for chunk in client.chat.completions.create(stream=True)`) builds a model object per chunk, which
takes about 0.1 ms of CPU; a load test of a fast server would measure that. `with_streaming_response` is the same call
of the same client without the objects; tests/test_loadtest_stream.py checks that both give the same reply.
"""

import collections
import contextlib
import json
import math
import os
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import httpx2
import openai

from counsel.client import API_KEY
from counsel.values import checked_url
from loadtest.records import COMPLETE, RequestRecord
from loadtest.scenario import Scenario

# A server may close an idle connection at any moment (vLLM does after 5 s), and a request sent at that moment fails.
# Closing idle connections earlier than any common server does keeps this race out of the error counts.
_IDLE_S = 2.0
_CONNECT_S = 10.0
# How long to wait for the end of a response after its last event.
_LINGER_S = 1.0
_TOO_LONG = "the reply took longer than the limit"
# The request extension that holds the time of sending.
_SENT = "counsel_sent"
_BOM = b"\xef\xbb\xbf"
# A server with at least this many tokens per chunk is taken to send several tokens at once.
_BUNDLED = 1.5
# Length of a tool call that holds only its index.
_EMPTY_CALL = len(json.dumps({"index": 0, "function": {"arguments": ""}}))


class _Connections(httpx2.BaseTransport):
    """One connection per running request; the most recently used free connection is reused first.

    httpx's own pool scans all connections when a request begins or ends, which fills a core with a thousand in flight.
    Here each connection is a separate pool, and the free ones are on a stack.
    """

    def __init__(self, reuse: bool) -> None:
        self._limits = httpx2.Limits(max_connections=1, max_keepalive_connections=int(reuse), keepalive_expiry=_IDLE_S)
        self._verify = ssl.create_default_context()
        self._free: list[httpx2.HTTPTransport] = []
        self._all: list[httpx2.HTTPTransport] = []
        # The first connection imports what it needs. Open it now, so that no request waits for that.
        self._add()

    def _add(self) -> None:
        self._all.append(httpx2.HTTPTransport(verify=self._verify, limits=self._limits))
        self._free.append(self._all[-1])

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if not self._free:
            self._add()
        connection = self._free.pop()
        # Until here the client was building the request, which is not the server's time.
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
    """The bytes of a response; calls `closed` when it is closed."""

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


def make_stream_client(url: str, reuse: bool = True) -> openai.OpenAI:
    """The client of a process, for all its requests. It does not retry, which would hide errors and add latency.

    `reuse`: send on a connection that an earlier request left open, if there is one.
    """
    # trust_env=False: a proxy of the environment would be measured too.
    http = httpx2.Client(transport=_Connections(reuse), trust_env=False)
    key = os.environ.get(API_KEY) or "none"
    return openai.OpenAI(base_url=checked_url(url), api_key=key, max_retries=0, http_client=http)


def rehearse(scenario: Scenario) -> None:
    """Read one canned reply through the same code, so that the first real request does not pay for lazy imports.

    Without it, that request waits 0.2 s for the `openai` package, and so does every greenlet of the process.
    """
    reply = (
        b'data: {"choices": [{"delta": {"content": "w"}, "finish_reason": "stop"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
    )
    canned = httpx2.MockTransport(lambda request: httpx2.Response(200, content=reply))
    with openai.OpenAI(base_url=scenario.url, api_key="none", http_client=httpx2.Client(transport=canned)) as client:
        body = request_body(scenario, "canned", [{"role": "user", "content": "w"}], 1)
        ask(client, body, RequestRecord(0, 0, "canned", 0, 0.0), time.monotonic(), RequestLimits(None, 10.0, 10.0))


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


class RequestLimits(NamedTuple):
    """Seconds after sending: when the client hangs up (None: never), the longest request, the longest silence."""

    cancel_s: float | None
    request_timeout_s: float
    idle_timeout_s: float


class _TimeUp(BaseException):
    """A limit was reached during a silence. Not an Exception: the client would take it for a broken connection."""


def _no_timer(seconds: float, error: BaseException) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def ask(
    client: openai.OpenAI, body: Mapping[str, Any], record: RequestRecord, start_s: float, limits: RequestLimits,
    timer: Callable[[float, BaseException], contextlib.AbstractContextManager[Any]] = _no_timer,
) -> str:  # fmt: skip
    """Send one request, fill in `record` from the response, and return the text of the reply.

    What a server or network does never raises: it becomes the outcome. `start_s` is the start of the run on
    `time.monotonic`. `timer` raises its error in the block after the given seconds (gevent.Timeout). Without it, limits
    apply at the next chunk and at the end of a silence.
    """
    sent = time.monotonic()
    record.sent_s = sent - start_s
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
            record.status = response.status_code
            record.sent_s = response.http_request.extensions.get(_SENT, sent) - start_s
            pieces = _until(stop, response.iter_bytes())
            _read_reply(sse_data(pieces), record, text, start_s)
            record.end_s = time.monotonic() - start_s
            # A connection can be reused only if its response was read to the end, which comes after the last event.
            with contextlib.suppress(httpx2.RequestError, _ReplyError, _TimeUp), timer(_LINGER_S, _TimeUp()):
                collections.deque(pieces, maxlen=0)
    except openai.APIStatusError as error:
        record.status, record.outcome, record.error = error.status_code, "http_error", _line(error.message)
    except (openai.APITimeoutError, httpx2.TimeoutException) as error:
        record.outcome, record.error = "timeout", _line(error)
    except openai.APIConnectionError as error:
        record.outcome, record.error = "connect_error", _line(error.__cause__ or error)
    except httpx2.RequestError as error:
        record.outcome, record.error = "broken_stream", _line(error)
    except _ReplyError as error:
        record.outcome, record.error = error.outcome, _line(error)
    except _TimeUp:
        record.outcome, record.error = "timeout", _TOO_LONG
    now = time.monotonic()
    record.end_s = now - start_s if record.end_s is None else record.end_s
    if record.outcome == "timeout" and now >= hang_up:
        record.outcome, record.error = "cancelled", None
    return "".join(text)


def sse_data(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, however the bytes are cut; also of a last one that is not terminated.

    As in the standard, lines end in LF, CRLF or CR, and several data lines of one event are joined.
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
            # The LF of a CRLF may come later; the line before it is already complete.
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
    """The chunks until `stop` on `time.monotonic`, even if they are keep-alive comments that never end."""
    for chunk in chunks:
        yield chunk
        if time.monotonic() >= stop:
            raise _ReplyError("timeout", _TOO_LONG)


class _ReplyError(Exception):
    """A stream that is not a complete reply; `outcome` is the outcome of the request."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def _read_reply(events: Iterator[bytes], record: RequestRecord, text: list[str], start_s: float) -> None:
    """Fill in times, tokens and outcome from the events of a stream."""
    gaps: list[float] = []
    record.gaps_s = gaps
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
        if record.served is None:
            record.served = chunk.get("model")
        usage = chunk.get("usage")
        if usage:
            _count_tokens(usage, record)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if length := _output(delta):
                if last is None:
                    record.first_s = now - start_s
                    # Servers that report usage in every chunk say how many tokens the first one holds.
                    record.first_tokens = record.completion_tokens
                else:
                    gaps.append(now - last)
                last = now
                lengths.append(length)
                record.last_s = now - start_s
                if content := delta.get("content"):
                    if record.content_s is None:
                        record.content_s = record.last_s
                    text.append(content)
            if choice.get("finish_reason"):
                record.finish, ended_s = choice["finish_reason"], now - start_s
    if record.finish is None:
        raise _ReplyError("broken_stream", "the stream ended " + ("at [DONE]" if done else "early"))
    if record.completion_tokens is not None and lengths:
        record.first_tokens = record.first_tokens or _first_tokens(record.completion_tokens, lengths)
        # The end of sequence is a token that `usage` counts and that has no text. If the reply ended at its limit, or
        # had a chunk for each token, the finish reason does not mark a token, and its time does not matter.
        if record.finish != "length" and len(lengths) < record.completion_tokens:
            record.last_s = ended_s
    if record.finish not in COMPLETE:
        record.outcome, record.error = "aborted", f"finish_reason is {_line(record.finish)}"
    elif record.first_s is None:
        record.outcome = "empty"
    elif record.completion_tokens is None:
        record.outcome = "no_usage"
    else:
        record.outcome = "ok"


def _output(delta: Mapping[str, Any]) -> int:
    """The amount of output in a delta, in characters; 0 if there is none. A tool call starts with a name, not text."""
    texts = [delta.get(key) for key in ("content", "reasoning", "reasoning_content", "refusal")]
    characters = sum(len(text) for text in texts if isinstance(text, str))
    calls = [*_list(delta.get("tool_calls")), *_list(delta.get("function_call"))]
    return characters + sum(max(len(json.dumps(call)) - _EMPTY_CALL, 1) for call in calls)


def _first_tokens(tokens: int, lengths: Sequence[int]) -> int:
    """How many tokens the first chunk of a reply held, by its share of the text; 1 if chunks are tokens.

    Slightly fewer chunks than tokens do not count as bundled: a token may have no text, or half a character.
    """
    if tokens < _BUNDLED * len(lengths):
        return 1
    return min(max(round(tokens * lengths[0] / sum(lengths)), 1), tokens)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _chunk(data: bytes) -> dict[str, Any]:
    """The chat completion chunk of one event; raises _ReplyError for an error object or anything else."""
    try:
        chunk = json.loads(data)
    except ValueError:
        raise _ReplyError("server_error", f"not JSON: {data[:80]!r}") from None
    if not _is_chunk(chunk):
        raise _ReplyError("server_error", f"not a chat completion chunk: {data[:80]!r}")
    if chunk.get("error"):
        raise _ReplyError("server_error", str(chunk["error"]))
    return cast(dict[str, Any], chunk)


def _is_chunk(chunk: Any) -> bool:
    """Whether the parts that are read have the expected types."""
    choices = chunk.get("choices") or [] if isinstance(chunk, dict) else None
    if not isinstance(choices, list) or not isinstance(chunk.get("usage") or {}, dict):
        return False
    deltas = [choice.get("delta") or {} for choice in choices if isinstance(choice, dict)]
    return len(deltas) == len(choices) and all(
        isinstance(delta, dict) and isinstance(delta.get("content") or "", str) for delta in deltas
    )


def _count_tokens(usage: Mapping[str, Any], record: RequestRecord) -> None:
    record.prompt_tokens = _int_or_none(usage.get("prompt_tokens"))
    record.completion_tokens = _int_or_none(usage.get("completion_tokens"))
    details = usage.get("prompt_tokens_details")
    record.cached_tokens = _int_or_none(details.get("cached_tokens")) if isinstance(details, dict) else None


def _int_or_none(count: Any) -> int | None:
    return count if isinstance(count, int) else None


def _line(error: object) -> str:
    """An error as one short line; its type if it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
