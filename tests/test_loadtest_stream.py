"""One request over real HTTP: equal to the client's typed path, with an outcome for every fault of a server."""

import itertools
import json
import time
import urllib.request
from collections.abc import Iterator

import httpx2
import openai
import pytest

from loadtest.records import OUTCOMES, RequestRecord
from loadtest.scenario import Scenario
from loadtest.stream import RequestLimits, ask, make_stream_client, request_body, sse_data
from tests.sse_server import Behavior, counts, delta, standin
from tests.waiting import until

NO_LIMITS = RequestLimits(None, 600, 600)
OUTCOME_OF = {
    "half": ("broken_stream", 200), "reset": ("broken_stream", 200), "eof": ("broken_stream", 200),
    "comment": ("timeout", 200), "garbage": ("server_error", 200),
    "shape": ("server_error", 200), "midway": ("server_error", 200), "drop": ("connect_error", None),
    "nousage": ("no_usage", 200), "nonsense": ("no_usage", 200), "mute": ("empty", 200),
    "status-404": ("http_error", 404), "status-429": ("http_error", 429), "status-503": ("http_error", 503),
}  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    faults = (f"x.gap-1.{fault}" for fault in OUTCOME_OF)
    with standin("base", "timed.first-20.gap-2", "x.holds-0", *faults) as address:
        yield address


def request(url: str, model: str, tokens: int = 10, limits: RequestLimits = NO_LIMITS) -> tuple[RequestRecord, str]:
    """The record and the text of one request."""
    with make_stream_client(url) as client:
        record = RequestRecord(0, 0, model, 0, 0.0)
        body = request_body(Scenario(), model, [{"role": "user", "content": "hi"}], tokens)
        return record, ask(client, body, record, time.monotonic(), limits)


class Ticking:
    """A clock that advances a second each time it is read, so that a limit is a number of reads."""

    def __init__(self) -> None:
        self.monotonic = itertools.count(1.0).__next__


def test_the_standin_sends_what_it_should(url):
    """Read without our client: a role, the words, a finish reason, usage, [DONE]; and the request is counted."""
    body = json.dumps({"model": "base", "max_tokens": 3, "stream": True}).encode()
    with urllib.request.urlopen(f"{url}/chat/completions", data=body) as response:
        events = [line[6:] for line in response.read().decode().split("\n\n") if line]

    first, *words, finish, usage = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [word["choices"][0]["delta"]["content"] for word in words] == ["w ", "w ", "w "]
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    assert counts(url)["requests"]["base"] >= 1


def test_the_standin_reads_its_behavior_from_the_model_name():
    """The words after the first dot, in any order."""
    assert Behavior.of("a.gap-10.half.first-200") == Behavior(first_s=0.2, gap_s=0.01, fault="half")
    assert Behavior.of("a.status-404") == Behavior(status=404)
    assert Behavior.of("a.slots-4.dies-30") == Behavior(slots=4, dies=30)
    assert Behavior.of("a.together-3.holds-0") == Behavior(together=3, holds=0)
    assert Behavior.of("a") == Behavior()


def test_the_fast_path_equals_the_typed_path(url):
    """The typed iterator gives the same text, finish reason, usage and number of chunks with text."""
    with make_stream_client(url) as client:
        stream = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=17, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    usage = chunks[-1].usage

    record, text = request(url, "base", tokens=17)

    assert text == "".join(pieces)
    assert len(record.gaps_s) == len(pieces) - 1
    assert (record.prompt_tokens, record.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert (record.outcome, record.finish, record.status, record.served) == ("ok", "stop", 200, chunks[0].model)


@pytest.mark.parametrize("fault", OUTCOME_OF)
def test_every_fault_has_an_outcome(url, fault, monkeypatch):
    """Each fault has its outcome and status, ends in time, and has no time for what did not happen."""
    limits = NO_LIMITS
    if fault == "comment":
        monkeypatch.setattr("loadtest.stream.time", Ticking())
        limits = RequestLimits(None, 60, 600)
    record, _ = request(url, f"x.gap-1.{fault}", limits=limits)

    assert (record.outcome, record.status) == OUTCOME_OF[fault]
    assert record.outcome in OUTCOMES
    assert not record.ok
    assert record.end_s > record.sent_s
    assert record.first_s is None or record.first_s > record.sent_s


@pytest.mark.parametrize(
    "document",
    ["5", "null", '"text"', '{"choices": 5}', '{"choices": [null]}', '{"choices": [{"delta": "w"}]}',
     '{"choices": [{"delta": {"content": [1]}}]}', '{"choices": [], "usage": 7}'],
)  # fmt: skip
def test_json_that_is_not_a_chunk_is_a_server_error(document):
    """Whatever a server sends in a stream with status 200 is counted; none of it ends the load test."""
    canned = httpx2.MockTransport(lambda _: httpx2.Response(200, content=f"data: {document}\n\n".encode()))
    with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=httpx2.Client(transport=canned)) as client:
        record = RequestRecord(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 1), record, time.monotonic(), NO_LIMITS)

    assert (record.outcome, record.status) == ("server_error", 200)


def test_changes_of_the_wall_clock_do_not_matter(url, monkeypatch):
    """The wall clock goes back an hour each time it is read; the recorded times are still those of the stream."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    record, _ = request(url, "timed.first-20.gap-2")

    assert record.ok
    assert 0 < record.sent_s < record.first_s < record.last_s <= record.end_s < 3600
    assert min(record.gaps_s) >= 0


def test_a_refused_connection_is_an_outcome():
    """No server listens there: connect_error, without a status."""
    record, text = request("http://127.0.0.1:9/v1", "base")

    assert (record.outcome, record.status, text) == ("connect_error", None, "")


def test_a_client_hangs_up_before_the_first_chunk(url):
    """The server does not answer before the client hangs up: the outcome is cancelled, which is not a failure."""
    record, _ = request(url, "x.holds-0", limits=RequestLimits(0.1, 600, 600))

    assert (record.outcome, record.status, record.first_s) == ("cancelled", None, None)
    assert record.end_s - record.sent_s >= 0.1


def test_a_client_hangs_up_in_the_middle_of_a_reply(monkeypatch):
    """The outcome is cancelled, the times so far are kept, and the connection is closed."""
    monkeypatch.setattr("loadtest.stream.time", Ticking())
    with standin("x.gap-1.comment") as url:
        record, _ = request(url, "x.gap-1.comment", limits=RequestLimits(60, 600, 600))
        until(lambda: counts(url)["hung_up"] == 1)

    assert (record.outcome, record.status) == ("cancelled", 200)
    assert record.sent_s < record.first_s < record.end_s
    assert record.end_s - record.sent_s >= 60


def test_a_reply_that_goes_silent_is_a_timeout():
    """The HTTP client gets the limit on silence. If it gives up within a reply, the times are kept."""

    def chunks() -> Iterator[bytes]:
        yield b"data: " + json.dumps(delta("base", {"content": "w "})).encode() + b"\n\n"
        raise httpx2.ReadTimeout("timed out")

    def respond(request: httpx2.Request) -> httpx2.Response:
        assert request.extensions["timeout"]["read"] == 5
        return httpx2.Response(200, content=chunks())

    http = httpx2.Client(transport=httpx2.MockTransport(respond))
    with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=http) as client:
        record = RequestRecord(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 10), record, time.monotonic(), RequestLimits(None, 600, 5))

    assert (record.outcome, record.status, record.ok) == ("timeout", 200, False)
    assert record.sent_s < record.first_s <= record.end_s


@pytest.mark.parametrize(("reuse", "connections"), [(True, 1), (False, 6)])
def test_connections_are_reused_unless_told_not_to(reuse, connections, monkeypatch):
    """Six requests in sequence, some of which fail, use one connection, or each its own."""
    monkeypatch.setattr("loadtest.stream._IDLE_S", 600.0)  # a busy machine may leave a free connection idle for long
    with standin("base", "x.status-503") as url:
        with make_stream_client(url, reuse) as client:
            for model in ("base", "x.status-503", "base", "base", "x.status-503", "base"):
                ask(client, request_body(Scenario(), model, [], 3), RequestRecord(0, 0, model, 0, 0.0), 0.0, NO_LIMITS)
        assert counts(url)["connections"] == connections


def test_requests_are_not_retried(url):
    """One 503 is one request at the server."""
    model = "x.gap-1.status-503"
    before = counts(url)["requests"].get(model, 0)
    request(url, model)

    assert counts(url)["requests"][model] == before + 1
    assert isinstance(make_stream_client(url), openai.OpenAI)


@pytest.mark.parametrize(
    "stream",
    [
        b': hi\r\n\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:{"b": "\xc3\xa9"}\n\ndata: [DONE]\n\n',
        b'data: {"a": 1}\r\rdata: {"b": "\xc3\xa9"}\r\rdata: [DONE]\r\r',
        b'\xef\xbb\xbfdata: {"a": 1}\n\ndata: {"b":\ndata:  "\xc3\xa9"}\n\ndata: [DONE]',
        b'data: {"a": 1}\r\n\r\nid: 7\r\ndata: {"b": "\xc3\xa9"}\r\n\r\nretry: 5\r\n\r\ndata: [DONE]\r\n',
    ],
    ids=["mixed", "cr", "lines", "crlf"],
)
def test_events_are_read_however_the_bytes_are_cut(stream):
    """All line ends, comments, other fields, several data lines, a missing end; in one piece and byte by byte."""
    documents = [{"a": 1}, {"b": "é"}]

    for pieces in ([stream], [stream[i : i + 1] for i in range(len(stream))], [b"", stream[:20], b"", stream[20:]]):
        *events, last = sse_data(pieces)
        assert [json.loads(data) for data in events] == documents
        assert last == b"[DONE]"


def test_a_line_that_ends_in_cr_is_read_at_once():
    """A server that ends its lines in CR is not read one event late."""
    events: list[bytes] = []

    def stream() -> Iterator[bytes]:
        yield b"data: 1\r\r"
        assert events == [b"1"]
        yield b"\ndata: 2\r\n\r\n"

    for data in sse_data(stream()):
        events.append(data)
    assert events == [b"1", b"2"]
