"""Replies: the status of an error, and keep-alive comments in a stream."""

import asyncio
import json
from typing import Any

import pytest

from serve.api_errors import ApiError
from serve.reply import COMMENT, Reply

STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
ERROR = b'data: {"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 400}}\n\n'
CREATED = b'event: response.created\ndata: {"type":"response.created"}\n\n'


class Wire:
    """What was sent, as a client sees it."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        (start,) = [m["status"] for m in self.messages if m["type"] == "http.response.start"]
        return start

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.messages if m["type"] == "http.response.body")

    @property
    def ended(self) -> bool:
        return not self.messages[-1].get("more_body", True)


def run(*steps: Any, is_responses: bool = False) -> tuple[Wire, Reply]:
    """Feed steps to a reply: bytes are body parts of a stream, None its end; also messages, errors and "comment"."""

    async def play() -> tuple[Wire, Reply]:
        wire = Wire()
        reply = Reply(wire.send, [(b"x-request-id", b"1")], is_responses)
        for step in steps:
            if isinstance(step, dict):
                await reply.send(step)
            elif isinstance(step, ApiError):
                await reply.send_error(step, [])
            elif step == "comment":
                await reply.comment()
            else:
                await reply.send({"type": "http.response.body", "body": step or b"", "more_body": step is not None})
        return wire, reply

    return asyncio.run(play())


def test_an_error_before_a_streams_first_event_is_an_http_error():
    """vLLM sends it inside a 200; the client gets its status, once, and nothing after it."""
    wire, reply = run(STREAM, ERROR, b"data: [DONE]\n\n", None)
    assert (wire.status, reply.status, wire.ended) == (400, 400, True)
    assert json.loads(wire.body)["error"]["message"] == "no"
    # Also after the events that /v1/responses sends before anything has happened.
    wire, _ = run(STREAM, CREATED, ApiError(400, "no"), is_responses=True)
    assert (wire.status, json.loads(wire.body)["error"]["message"]) == (400, "no")


def test_an_error_within_a_stream_is_counted_as_an_error():
    """The status was already sent; the error's own status is what is counted."""
    wire, reply = run(STREAM, b'data: {"choices":[]}\n\n', ERROR, b"data: [DONE]\n\n", None)
    assert (wire.status, reply.status, reply.code) == (200, 400, "error_in_stream")
    assert wire.body.count(b"[DONE]") == 1
    assert wire.ended
    wire, reply = run(STREAM, CREATED, b"event: response.output_text.delta\ndata: {}\n\n", ApiError(500, "x"),
                      is_responses=True)  # fmt: skip
    assert (wire.status, reply.status) == (200, 500)
    assert wire.body.endswith(b"\n\n")
    assert json.loads(wire.body.rpartition(b"event: error\ndata: ")[2])["message"] == "x"


def test_a_waiting_stream_gets_comments_until_its_first_event():
    """A comment before any event begins the stream; after the first event none is sent."""
    event = b'data: {"choices":[]}\n\n'
    wire, reply = run("comment", "comment", STREAM, event, "comment", None)
    assert (wire.status, wire.body, reply.status) == (200, COMMENT * 2 + event, 200)
    # The events that /v1/responses sent before anything happened go out with it.
    wire, _ = run(STREAM, CREATED, "comment", event, None, is_responses=True)
    assert wire.body == CREATED + COMMENT + event


@pytest.mark.parametrize("how", ["refused", "error in the stream", "another reply"])
def test_after_a_comment_an_error_is_the_streams_last_event(how):
    """The status was already sent, so the error is an event, in the form that OpenAI's clients expect."""
    failed = {"type": "http.response.start", "status": 404, "headers": []}
    steps = {
        "refused": (ApiError(503, "no"),),
        "error in the stream": (STREAM, ERROR, b"data: [DONE]\n\n", None),
        "another reply": (failed, b'{"error": {"mess', b'age": "no", "code": 404}}', None),
    }[how]
    wire, reply = run("comment", *steps)
    assert wire.status == 200
    assert wire.ended
    lines = wire.body.removeprefix(COMMENT).split(b"\n\n")
    assert json.loads(lines[0].removeprefix(b"data: "))["error"]["message"] == "no"
    assert lines[1:] == [b"data: [DONE]", b""]
    assert reply.status >= 400


def test_a_long_error_is_shortened():
    """Some of vLLM's errors quote whole requests."""
    failed = {"type": "http.response.start", "status": 400, "headers": [(b"content-length", b"9")]}
    wire, _ = run(failed, json.dumps({"error": {"message": "x" * 100_000, "code": 400}}).encode(), None)
    assert len(wire.body) < 1000
    assert (b"content-length", str(len(wire.body)).encode()) in wire.messages[0]["headers"]
