"""What is recorded of one reply whose chunks arrive at scripted times: times, tokens, limits and the outcome."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from loadtest.records import RequestRecord
from loadtest.scenario import Scenario
from loadtest.stream import RequestLimits, ask, make_stream_client, request_body
from tests.sse_server import delta, standin

NO_LIMITS = RequestLimits(None, 600, 600)
ROLE, WORD, END = delta("base", {"content": ""}), delta("base", {"content": "w "}), delta("base", {}, "stop")
USAGE = {**delta("base", {}), "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 10}}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of loadtest.stream, which only the test moves; the run started at 99 s."""
    stopped = SimpleNamespace(now_s=100.0, monotonic=lambda: stopped.now_s)
    monkeypatch.setattr("loadtest.stream.time", stopped)
    return stopped


@pytest.fixture
def reply(clock: SimpleNamespace) -> Callable[..., RequestRecord]:
    """The record of a reply: each chunk arrives the given seconds after the one before."""

    def record_of(script: Sequence[tuple[float, dict]], limits: RequestLimits = NO_LIMITS) -> RequestRecord:
        def chunks() -> Iterator[bytes]:
            for wait_s, document in script:
                clock.now_s += wait_s
                yield b"data: " + json.dumps(document).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        canned = httpx2.MockTransport(lambda request: httpx2.Response(200, content=chunks()))
        with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=httpx2.Client(transport=canned)) as client:
            record = RequestRecord(0, 0, "base", 0, 0.0)
            ask(client, request_body(Scenario(), "base", [], 10), record, 99.0, limits)
        return record

    return record_of


@pytest.mark.parametrize("finish", ["abort", "error", "content_filter", "cancelled"])
def test_a_reply_that_the_server_aborts_has_failed(reply, finish):
    """Two words, usage, and a finish reason that says there should be more: the error names the reason."""
    record = reply([(0.1, WORD), (0.02, WORD), (0.0, delta("base", {}, finish)), (0.0, USAGE)])

    assert (record.outcome, record.finish) == ("aborted", finish)
    assert finish in record.error


@pytest.mark.parametrize("finish", ["stop", "length", "tool_calls", "function_call"])
def test_a_reply_that_the_model_ends_is_complete(reply, finish):
    """Every finish reason of OpenAI with which a reply is complete."""
    assert reply([(0.1, WORD), (0.0, delta("base", {}, finish)), (0.0, USAGE)]).ok


def test_times_are_those_of_the_stream(reply):
    """First chunk after 200 ms, then eight gaps of 20 ms and one of 50 ms: exactly these are recorded."""
    gaps_s = [0.02] * 8 + [0.05]
    record = reply([(0.2, ROLE), (0.1, WORD), *((gap_s, WORD) for gap_s in gaps_s), (0.0, END), (0.3, USAGE)])

    assert record.ok
    assert (record.sent_s, record.first_s, record.last_s, record.end_s) == pytest.approx((1.0, 1.3, 1.51, 1.81))
    assert (record.ttft_s, record.tpot_s) == pytest.approx((0.3, 0.21 / 9))
    assert record.gaps_s == pytest.approx(gaps_s)


def test_a_last_token_without_text_ends_the_reply(reply):
    """The end of sequence comes 50 ms after the last text. It counts in usage, so it counts in the time too."""
    record = reply([(0.1, WORD), (0.02, WORD), (0.05, END), (0.3, USAGE)])

    assert record.ok
    assert record.gaps_s == pytest.approx([0.02])
    assert record.last_s - record.first_s == pytest.approx(0.07)


def words(n: int) -> dict:
    return delta("base", {"content": "w " * n})


def usage(n: int) -> dict:
    return {**USAGE, "usage": {"prompt_tokens": 7, "completion_tokens": n}}


@pytest.mark.parametrize(
    ("script", "tpot_s"),
    [
        # Five tokens per chunk, also in the first, and a chunk every 100 ms: 20 ms per token.
        ([(0.2, words(5)), (0.1, words(5)), (0.1, words(5)), (0.0, END), (0.0, usage(15))], 0.02),
        # The first chunk has one token.
        ([(0.2, words(1)), (0.1, words(5)), (0.1, words(5)), (0.0, END), (0.0, usage(11))], 0.02),
        # All tokens come at once, which does not show how long one takes.
        ([(0.5, words(16)), (0.0, END), (0.0, usage(16))], None),
        # One chunk per token, and the finish reason a second late.
        ([(0.2, words(1)), *[(0.02, words(1))] * 9, (1.0, END), (0.0, usage(10))], 0.02),
        # The reply ends at its limit, so the finish reason does not mark a token.
        ([(0.2, words(2)), (0.04, words(2)), (1.0, delta("base", {}, "length")), (0.0, usage(4))], 0.02),
        # One of ten tokens has no text; no chunk holds two.
        ([(0.2, words(1)), *[(0.02, words(1))] * 7, (0.04, words(1)), (0.0, END), (0.0, usage(10))], 0.02),
        # The server reports usage in each chunk.
        ([(0.2, {**words(1), "usage": usage(4)["usage"]}), (0.12, words(9)), (0.0, END), (0.0, usage(10))], 0.02),
    ],
    ids=["five", "one-then-five", "at-once", "late-finish", "late-length", "hidden-token", "usage"],
)  # fmt: skip
def test_time_per_token_is_over_the_tokens_after_the_first_chunk(reply, script, tpot_s):
    """However many tokens a chunk holds, and whenever the finish reason comes."""
    assert reply(script).tpot_s == (None if tpot_s is None else pytest.approx(tpot_s))


@pytest.mark.parametrize(
    "output",
    [{"refusal": "no "}, {"function_call": {"name": "f", "arguments": "{"}}, {"reasoning": "t"},
     {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]}],
    ids=["refusal", "function_call", "reasoning", "tool_calls"],
)  # fmt: skip
def test_any_output_of_the_model_can_be_the_first_token(reply, output):
    """A refusal, a call and reasoning count like text."""
    record = reply([(0.1, ROLE), (0.1, delta("base", output)), (0.1, END), (0.0, USAGE)])

    assert (record.outcome, record.ttft_s) == ("ok", pytest.approx(0.2))


LIMITS = pytest.mark.parametrize(
    ("limits", "outcome"), [(RequestLimits(None, 0.4, 600), "timeout"), (RequestLimits(0.4, 600, 600), "cancelled")]
)


@LIMITS
def test_a_limit_applies_while_chunks_keep_coming(reply, limits, outcome):
    """Chunks every 300 ms, and 400 ms for the reply or until the client hangs up: the second chunk is the last."""
    record = reply([(0.3, WORD)] * 10 + [(0.0, END), (0.0, USAGE)], limits)

    assert record.outcome == outcome
    assert (record.first_s, record.last_s, record.end_s) == pytest.approx((1.3, 1.6, 1.6))


@pytest.mark.parametrize("before", ["headers", "chunk"])
@LIMITS
def test_a_limit_applies_while_nothing_comes(clock, limits, outcome, before):
    """A timer that fires during a long silence, before the response or within it, ends the request."""
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

    def respond(request: httpx2.Request) -> httpx2.Response:
        if before == "headers":
            silence()
        return httpx2.Response(200, content=chunks())

    http = httpx2.Client(transport=httpx2.MockTransport(respond))
    with openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=http) as client:
        record = RequestRecord(0, 0, "base", 0, 0.0)
        ask(client, request_body(Scenario(), "base", [], 10), record, 99.0, limits, timer)

    assert (record.outcome, record.end_s) == (outcome, pytest.approx(1.4))


def test_the_clients_own_work_is_not_the_servers_time(clock, monkeypatch):
    """Building the request takes 30 ms here. It is sent after that, so TTFT is 0 and the lag is 30 ms."""
    with standin("base") as url, make_stream_client(url) as client:
        build = client._build_request

        def slowly(*given: Any, **named: Any) -> Any:
            clock.now_s += 0.03
            return build(*given, **named)

        monkeypatch.setattr(client, "_build_request", slowly)
        record = RequestRecord(0, 0, "base", 0, due_s=1.0)
        ask(client, request_body(Scenario(), "base", [], 3), record, 99.0, NO_LIMITS)

    assert (record.outcome, record.sent_s, record.lag_s) == ("ok", pytest.approx(1.03), pytest.approx(0.03))
    assert record.ttft_s == pytest.approx(0.0)
