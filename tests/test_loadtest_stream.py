"""One timed reply over real HTTP: equal to the client's typed path, and every fault a counted outcome."""

import itertools
import json
import time
import urllib.request
from collections.abc import Iterator

import httpx2
import openai
import pytest

from loadtest.rows import OUTCOMES, Row
from loadtest.scenario import Scenario
from loadtest.stream import Limits, ask, make_client, request_body, sse_data
from tests.sse_server import Behaviour, standin

PATIENT = Limits(None, 5, 0.5)
OUTCOME_OF = {
    "half": ("broken_stream", 200), "reset": ("broken_stream", 200), "eof": ("broken_stream", 200),
    "hang": ("timeout", 200), "comment": ("timeout", 200), "garbage": ("server_error", 200),
    "shape": ("server_error", 200), "midway": ("server_error", 200), "drop": ("connect_error", None),
    "nousage": ("no_usage", 200), "nonsense": ("no_usage", 200), "mute": ("empty", 200),
    "status-404": ("http_error", 404), "status-429": ("http_error", 429), "status-503": ("http_error", 503),
}  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with standin("base", "timed.first-200.gap-20", *(f"x.gap-1.{fault}" for fault in OUTCOME_OF)) as address:
        yield address


def asked(url: str, model: str, tokens: int = 10, limits: Limits = PATIENT) -> tuple[Row, str]:
    """One request through the load test's path."""
    with make_client(url) as client:
        row = Row(0, 0, model, 0, 0.0)
        body = request_body(Scenario(), model, [{"role": "user", "content": "hi"}], tokens)
        return row, ask(client, body, row, time.monotonic(), limits)


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


def test_times_are_those_of_the_stream(url):
    """First chunk after 200 ms, then nine gaps of 20 ms: times are of that size, and in the order of the stream."""
    row, _ = asked(url, "timed.first-200.gap-20")

    assert row.ttft_s >= 0.2
    # A first chunk that is read late shortens the gaps after it.
    assert row.tpot_s >= 0.01
    assert len(row.gaps_s) == 9
    assert row.sent_s < row.first_s < row.last_s <= row.end_s
    assert 0.09 < sum(row.gaps_s) <= row.last_s - row.first_s + 1e-6


@pytest.mark.parametrize("fault", OUTCOME_OF)
def test_every_fault_is_an_outcome(url, fault):
    """Each fault is named, keeps its status, ends in time and claims no time it did not see."""
    row, _ = asked(url, f"x.gap-1.{fault}", limits=Limits(None, 2, 0.5))

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
        row = Row(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 1), row, time.monotonic(), PATIENT)

    assert (row.outcome, row.status) == ("server_error", 200)


def test_a_last_token_without_text_ends_the_reply(url):
    """The end of sequence comes 50 ms after the last text, and counts in usage: so it does in the time."""
    row, _ = asked(url, "x.gap-1.eos")

    assert row.ok
    assert row.last_s - row.first_s >= sum(row.gaps_s) + 0.045


def test_a_wall_clock_that_runs_backwards_bends_no_time(url, monkeypatch):
    """Each look at the wall clock is an hour earlier: the row's times are still those of the stream."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    row, _ = asked(url, "timed.first-200.gap-20")

    assert row.ok
    assert 0 < row.sent_s < row.first_s < row.last_s <= row.end_s < 60
    assert min(row.gaps_s) >= 0


def test_no_server_is_an_outcome():
    """A refused connection is a connect_error."""
    row, text = asked("http://127.0.0.1:9/v1", "base")

    assert (row.outcome, row.status, text) == ("connect_error", None, "")


@pytest.mark.parametrize("cancel_s", [0.1, 0.3])
def test_a_client_that_hangs_up_is_no_failure(url, cancel_s):
    """Before the first chunk or in the middle of the reply: the row says cancelled, and the connection is closed."""
    row, _ = asked(url, "timed.first-200.gap-20", tokens=50, limits=Limits(cancel_s, 5, 5))

    assert row.outcome == "cancelled"
    assert row.end_s - row.sent_s >= cancel_s


def test_a_reply_that_takes_too_long_is_a_timeout(url):
    """The limit holds even while chunks keep coming."""
    row, _ = asked(url, "timed.first-200.gap-20", tokens=50, limits=Limits(None, 0.4, 5))

    assert row.outcome == "timeout"


def test_events_are_read_however_the_bytes_are_cut():
    """Cut after every byte, with CRLF, comments and other fields: the same data."""
    stream = b': hi\r\n\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:{"b": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
    whole = [b'{"a": 1}', '{"b": "é"}'.encode(), b"[DONE]"]

    assert list(sse_data([stream])) == whole
    assert list(sse_data(stream[i : i + 1] for i in range(len(stream)))) == whole


def test_requests_are_not_retried(url):
    """One 503 is one request at the server."""

    def seen() -> int:
        with urllib.request.urlopen(url.replace("/v1", "/seen")) as response:
            return json.load(response)["requests"].get("x.gap-1.status-503", 0)

    before = seen()
    asked(url, "x.gap-1.status-503")

    assert seen() == before + 1
    assert isinstance(make_client(url), openai.OpenAI)
