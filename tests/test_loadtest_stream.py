"""One timed reply over real HTTP: equal to the client's typed path, and every fault a counted outcome."""

import contextlib
import itertools
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from loadtest.records import OUTCOMES, RequestRecord
from loadtest.scenario import Scenario
from loadtest.stream import Limits, ask, make_client, request_body, sse_data
from tests.sse_server import Behaviour, delta, standin
from tests.waiting import until

PATIENT = Limits(None, 600, 600)
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


def asked(url: str, model: str, tokens: int = 10, limits: Limits = PATIENT) -> tuple[RequestRecord, str]:
    """One request through the load test's path."""
    with make_client(url) as client:
        row = RequestRecord(0, 0, model, 0, 0.0)
        body = request_body(Scenario(), model, [{"role": "user", "content": "hi"}], tokens)
        return row, ask(client, body, row, time.monotonic(), limits)


def told(
    monkeypatch: pytest.MonkeyPatch, script: Sequence[tuple[float, dict]], limits: Limits = PATIENT
) -> RequestRecord:
    """The row of a reply whose chunks come after so many seconds each, on a clock that nothing else moves."""
    clock = SimpleNamespace(now_s=100.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr("loadtest.stream.time", clock)

    def chunks() -> Iterator[bytes]:
        for wait_s, document in script:
            clock.now_s += wait_s
            yield b"data: " + json.dumps(document).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    canned = httpx2.MockTransport(lambda request: httpx2.Response(200, content=chunks()))
    with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=httpx2.Client(transport=canned)) as client:
        row = RequestRecord(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 10), row, 99.0, limits)
    return row


ROLE, WORD, END = delta("base", {"content": ""}), delta("base", {"content": "w "}), delta("base", {}, "stop")
USAGE = {**delta("base", {}), "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 10}}


@pytest.mark.parametrize("finish", ["abort", "error", "content_filter", "cancelled"])
def test_a_reply_that_the_server_gave_up_is_no_whole_reply(monkeypatch, finish):
    """Half of the words, usage and a finish reason that says they are not all: it failed, and says why."""
    row = told(monkeypatch, [(0.1, WORD), (0.02, WORD), (0.0, delta("base", {}, finish)), (0.0, USAGE)])

    assert (row.outcome, row.finish) == ("aborted", finish)
    assert finish in row.error


@pytest.mark.parametrize("finish", ["stop", "length", "tool_calls", "function_call"])
def test_a_reply_that_came_to_its_end_is_whole(monkeypatch, finish):
    """Every way in which OpenAI lets a model end its own reply."""
    assert told(monkeypatch, [(0.1, WORD), (0.0, delta("base", {}, finish)), (0.0, USAGE)]).ok


class Ticking:
    """A clock that is a second later at each look: a limit is then a number of looks, however long they take."""

    def __init__(self) -> None:
        self.monotonic = itertools.count(1.0).__next__


def test_the_standin_sends_what_it_says(url):
    """Read without any client of ours: a role, the words, a finish reason, usage, the end; and it counts requests."""
    body = json.dumps({"model": "base", "max_tokens": 3, "stream": True}).encode()
    with urllib.request.urlopen(f"{url}/chat/completions", data=body) as response:
        events = [line[6:] for line in response.read().decode().split("\n\n") if line]

    first, *words, finish, usage = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [word["choices"][0]["delta"]["content"] for word in words] == ["w ", "w ", "w "]
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    with urllib.request.urlopen(url.replace("/v1", "/seen")) as response:
        assert json.load(response)["requests"]["base"] >= 1


def test_the_standin_reads_its_behaviour_from_the_model_name():
    """The words after the first dot, in any order."""
    assert Behaviour.of("a.gap-10.half.first-200") == Behaviour(first_s=0.2, gap_s=0.01, fault="half")
    assert Behaviour.of("a.status-404") == Behaviour(status=404)
    assert Behaviour.of("a.slots-4.dies-30") == Behaviour(slots=4, dies=30)
    assert Behaviour.of("a.together-3.holds-0") == Behaviour(together=3, holds=0)
    assert Behaviour.of("a") == Behaviour()


def test_the_fast_path_equals_the_typed_path(url):
    """The same stream through the typed iterator: same text, finish, usage, and number of chunks with text."""
    with make_client(url) as client:
        stream = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=17, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    usage = chunks[-1].usage

    row, text = asked(url, "base", tokens=17)

    assert text == "".join(pieces)
    assert len(row.gaps_s) == len(pieces) - 1
    assert (row.prompt_tokens, row.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert (row.outcome, row.finish, row.status, row.served) == ("ok", "stop", 200, chunks[0].model)


def test_times_are_those_of_the_stream(monkeypatch):
    """First chunk after 200 ms, then nine gaps of 20 ms, of which the last is longer: these are the row's times."""
    gaps_s = [0.02] * 8 + [0.05]
    row = told(monkeypatch, [(0.2, ROLE), (0.1, WORD), *((gap_s, WORD) for gap_s in gaps_s), (0.0, END), (0.3, USAGE)])

    assert row.ok
    assert (row.sent_s, row.first_s, row.last_s, row.end_s) == pytest.approx((1.0, 1.3, 1.51, 1.81))
    assert (row.ttft_s, row.tpot_s) == pytest.approx((0.3, 0.21 / 9))
    assert row.gaps_s == pytest.approx(gaps_s)


@pytest.mark.parametrize("fault", OUTCOME_OF)
def test_every_fault_is_an_outcome(url, fault, monkeypatch):
    """Each fault is named, keeps its status, ends in time and claims no time it did not see."""
    limits = PATIENT
    if fault == "comment":
        monkeypatch.setattr("loadtest.stream.time", Ticking())
        limits = Limits(None, 60, 600)
    row, _ = asked(url, f"x.gap-1.{fault}", limits=limits)

    assert (row.outcome, row.status) == OUTCOME_OF[fault]
    assert row.outcome in OUTCOMES
    assert not row.ok
    assert row.end_s > row.sent_s
    assert row.first_s is None or row.first_s > row.sent_s


@pytest.mark.parametrize(
    "document",
    ["5", "null", '"text"', '{"choices": 5}', '{"choices": [null]}', '{"choices": [{"delta": "w"}]}',
     '{"choices": [{"delta": {"content": [1]}}]}', '{"choices": [], "usage": 7}'],
)  # fmt: skip
def test_json_that_is_no_chunk_is_a_server_error(document):
    """Whatever a server sends in a 200 stream is counted; none of it may end the load test."""
    canned = httpx2.MockTransport(lambda request: httpx2.Response(200, content=f"data: {document}\n\n".encode()))
    with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=httpx2.Client(transport=canned)) as client:
        row = RequestRecord(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 1), row, time.monotonic(), PATIENT)

    assert (row.outcome, row.status) == ("server_error", 200)


def test_a_last_token_without_text_ends_the_reply(monkeypatch):
    """The end of sequence comes 50 ms after the last text, and counts in usage: so it does in the time."""
    row = told(monkeypatch, [(0.1, WORD), (0.02, WORD), (0.05, END), (0.3, USAGE)])

    assert row.ok
    assert row.gaps_s == pytest.approx([0.02])
    assert row.last_s - row.first_s == pytest.approx(0.07)


def test_a_wall_clock_that_runs_backwards_bends_no_time(url, monkeypatch):
    """Each look at the wall clock is an hour earlier: the row's times are still those of the stream."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    row, _ = asked(url, "timed.first-20.gap-2")

    assert row.ok
    assert 0 < row.sent_s < row.first_s < row.last_s <= row.end_s < 3600
    assert min(row.gaps_s) >= 0


def test_no_server_is_an_outcome():
    """A refused connection is a connect_error."""
    row, text = asked("http://127.0.0.1:9/v1", "base")

    assert (row.outcome, row.status, text) == ("connect_error", None, "")


def test_a_client_hangs_up_before_the_first_chunk(url):
    """The server never answers, and the client's time is up: the row says cancelled, and is no failure."""
    row, _ = asked(url, "x.holds-0", limits=Limits(0.1, 600, 600))

    assert (row.outcome, row.status, row.first_s) == ("cancelled", None, None)
    assert row.end_s - row.sent_s >= 0.1


def test_a_client_hangs_up_in_the_middle_of_a_reply(monkeypatch):
    """Whatever still comes, the row says cancelled, keeps the times it saw, and the connection is closed."""
    monkeypatch.setattr("loadtest.stream.time", Ticking())
    with standin("x.gap-1.comment") as url:
        row, _ = asked(url, "x.gap-1.comment", limits=Limits(60, 600, 600))
        until(lambda: seen(url)["hung_up"] == 1)

    assert (row.outcome, row.status) == ("cancelled", 200)
    assert row.sent_s < row.first_s < row.end_s
    assert row.end_s - row.sent_s >= 60


@pytest.mark.parametrize(
    ("limits", "outcome"), [(Limits(None, 0.4, 600), "timeout"), (Limits(0.4, 600, 600), "cancelled")]
)
def test_a_limit_holds_while_chunks_keep_coming(monkeypatch, limits, outcome):
    """Chunks 300 ms apart, and 400 ms for the reply, or until the client hangs up: the second chunk is the last."""
    row = told(monkeypatch, [(0.3, WORD)] * 10 + [(0.0, END), (0.0, USAGE)], limits)

    assert row.outcome == outcome
    assert (row.first_s, row.last_s, row.end_s) == pytest.approx((1.3, 1.6, 1.6))


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
    """Every line end, comments, other fields, several data lines, no end at all; whole or byte by byte."""
    whole = [{"a": 1}, {"b": "é"}]

    for pieces in ([stream], [stream[i : i + 1] for i in range(len(stream))], [b"", stream[:20], b"", stream[20:]]):
        *events, last = sse_data(pieces)
        assert [json.loads(data) for data in events] == whole
        assert last == b"[DONE]"


def test_a_line_that_ends_in_cr_is_whole_before_more_comes():
    """What a server that ends its lines in CR has sent is read at once, not with the next event."""
    came: list[bytes] = []

    def stream() -> Iterator[bytes]:
        yield b"data: 1\r\r"
        assert came == [b"1"]
        yield b"\ndata: 2\r\n\r\n"

    for data in sse_data(stream()):
        came.append(data)
    assert came == [b"1", b"2"]


def words(n: int) -> dict:
    return delta("base", {"content": "w " * n})


def counted(n: int) -> dict:
    return {**USAGE, "usage": {"prompt_tokens": 7, "completion_tokens": n}}


@pytest.mark.parametrize(
    ("script", "tpot_s"),
    [
        # Five tokens a chunk, 100 ms apart, the first chunk too: 20 ms a token.
        ([(0.2, words(5)), (0.1, words(5)), (0.1, words(5)), (0.0, END), (0.0, counted(15))], 0.02),
        # The first chunk has one token.
        ([(0.2, words(1)), (0.1, words(5)), (0.1, words(5)), (0.0, END), (0.0, counted(11))], 0.02),
        # All tokens come at once: nothing says how long one takes.
        ([(0.5, words(16)), (0.0, END), (0.0, counted(16))], None),
        # One chunk a token, and the finish reason a second late.
        ([(0.2, words(1)), *[(0.02, words(1))] * 9, (1.0, END), (0.0, counted(10))], 0.02),
        # The limit ended it: no token without text comes with the finish reason.
        ([(0.2, words(2)), (0.04, words(2)), (1.0, delta("base", {}, "length")), (0.0, counted(4))], 0.02),
        # One of ten tokens has no text of its own: that is no chunk of two.
        ([(0.2, words(1)), *[(0.02, words(1))] * 7, (0.04, words(1)), (0.0, END), (0.0, counted(10))], 0.02),
        # The server counts in each chunk.
        ([(0.2, {**words(1), "usage": counted(4)["usage"]}), (0.12, words(9)), (0.0, END), (0.0, counted(10))], 0.02),
    ],
    ids=["five", "one-then-five", "at-once", "late-finish", "late-length", "hidden-token", "usage"],
)  # fmt: skip
def test_time_per_token_is_over_the_tokens_after_the_first_chunk(monkeypatch, script, tpot_s):
    """However many tokens a chunk holds, and whenever the finish reason comes."""
    assert told(monkeypatch, script).tpot_s == (None if tpot_s is None else pytest.approx(tpot_s))


@pytest.mark.parametrize(
    "output",
    [{"refusal": "no "}, {"function_call": {"name": "f", "arguments": "{"}}, {"reasoning": "t"},
     {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]}],
    ids=["refusal", "function_call", "reasoning", "tool_calls"],
)  # fmt: skip
def test_whatever_a_model_says_is_output(monkeypatch, output):
    """Its refusal and its calls are a first token as its text is."""
    row = told(monkeypatch, [(0.1, ROLE), (0.1, delta("base", output)), (0.1, END), (0.0, USAGE)])

    assert (row.outcome, row.ttft_s) == ("ok", pytest.approx(0.2))


@pytest.mark.parametrize("before", ["headers", "chunk"])
@pytest.mark.parametrize(
    ("limits", "outcome"), [(Limits(None, 0.4, 600), "timeout"), (Limits(0.4, 600, 600), "cancelled")]
)
def test_a_limit_holds_while_nothing_comes(monkeypatch, limits, outcome, before):
    """A timer that goes off in the middle of a silence of an hour, before the answer or within it: that is the end."""
    clock = SimpleNamespace(now_s=100.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr("loadtest.stream.time", clock)
    set_to: list[tuple[float, BaseException]] = []

    def timer(seconds: float, error: BaseException) -> contextlib.nullcontext:
        set_to.append((seconds, error))
        return contextlib.nullcontext()

    def silence() -> None:
        clock.now_s = 100.0 + set_to[0][0]
        raise set_to[0][1]

    def chunks() -> Iterator[bytes]:
        yield b"data: " + json.dumps(WORD).encode() + b"\n\n"
        silence()

    def answer(request: httpx2.Request) -> httpx2.Response:
        if before == "headers":
            silence()
        return httpx2.Response(200, content=chunks())

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=http) as client:
        row = RequestRecord(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 10), row, 99.0, limits, timer)

    assert (row.outcome, row.end_s) == (outcome, pytest.approx(1.4))


def test_a_reply_that_goes_silent_is_a_timeout():
    """The HTTP client is told how long a silence may be; when it gives up after half a reply, its times are kept."""

    def chunks() -> Iterator[bytes]:
        yield b"data: " + json.dumps(WORD).encode() + b"\n\n"
        raise httpx2.ReadTimeout("timed out")

    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.extensions["timeout"]["read"] == 5
        return httpx2.Response(200, content=chunks())

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=http) as client:
        row = RequestRecord(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 10), row, time.monotonic(), Limits(None, 600, 5))

    assert (row.outcome, row.status, row.ok) == ("timeout", 200, False)
    assert row.sent_s < row.first_s <= row.end_s


@pytest.mark.parametrize(("reuse", "connections"), [(True, 1), (False, 6)])
def test_connections_are_used_again_unless_told_not_to(reuse, connections, monkeypatch):
    """Six requests one after the other, failed ones among them: one connection, or each its own."""
    monkeypatch.setattr("loadtest.stream._IDLE_S", 600.0)  # a crowded machine may let a free one lie for long
    with standin("base", "x.status-503") as url:
        with make_client(url, reuse) as client:
            for model in ("base", "x.status-503", "base", "base", "x.status-503", "base"):
                ask(client, request_body(Scenario(), model, [], 3), RequestRecord(0, 0, model, 0, 0.0), 0.0, PATIENT)
        assert seen(url)["connections"] == connections


def test_the_clients_own_work_is_no_time_of_the_server(monkeypatch):
    """Making the request takes 30 ms here: it was sent after them, and they are in the lag after being due."""
    clock = SimpleNamespace(now_s=100.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr("loadtest.stream.time", clock)
    with standin("base") as url, make_client(url) as client:
        made = client._build_request

        def slowly(*given: Any, **named: Any) -> Any:
            clock.now_s += 0.03
            return made(*given, **named)

        monkeypatch.setattr(client, "_build_request", slowly)
        row = RequestRecord(0, 0, "base", 0, due_s=1.0)
        ask(client, request_body(Scenario(), "base", [], 3), row, 99.0, PATIENT)

    assert (row.outcome, row.sent_s, row.lag_s) == ("ok", pytest.approx(1.03), pytest.approx(0.03))
    assert row.ttft_s == pytest.approx(0.0)


def seen(url: str) -> dict:
    """What the stand-in has counted."""
    with urllib.request.urlopen(url.replace("/v1", "/seen")) as response:
        return json.load(response)


def test_requests_are_not_retried(url):
    """One 503 is one request at the server."""
    model = "x.gap-1.status-503"
    before = seen(url)["requests"].get(model, 0)
    asked(url, model)

    assert seen(url)["requests"][model] == before + 1
    assert isinstance(make_client(url), openai.OpenAI)
