"""A gateway with the crisis gate on, in front of an application that answers as vLLM does, with words of the test's."""

import asyncio
import json
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import prometheus_client

from counsel.safety.detector import Assessment
from counsel.safety.labels import LABELS, NONE
from counsel.safety.policy import Policy
from serve.access_log import AccessLog
from serve.chat_turns import ACCEPTS_ALL
from serve.config import ServeConfig
from serve.gateway import Gateway, Service
from serve.keys import KeyRing
from serve.limits import Limits
from serve.safety.counts import SafetyCounts
from serve.safety.gate import SafetyGate

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "base"}


class Metrics:
    """Stands for serve/metrics.py, whose series can be made once per process."""

    def __getattr__(self, name: str) -> Any:
        return Metrics()

    def __call__(self, *given: Any, **named: Any) -> Any:
        return Metrics()


class WordDetector:
    """Finds the risk whose label stands in the newest turn, as in `#imminent`; it can be made to fail."""

    card = {"n": 0, "recall": {}, "false_positives": {}}  # noqa: RUF012

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.fails: Callable[[], None] = lambda: None

    def assess(self, user_turns: Sequence[str]) -> Assessment:
        self.fails()
        self.seen.append(tuple(user_turns))
        label = next((name for name in LABELS if f"#{name}" in user_turns[-1]), NONE)
        return Assessment(label, 1.0, dict.fromkeys(LABELS, 0.0) | {label: 0.9}, None)


def sse(data: Any, kind: str = "") -> bytes:
    return (f"event: {kind}\n" if kind else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


def chat_events(pieces: Sequence[str], n: int = 1, usage: bool = False, logprobs: bool = False) -> list[bytes]:
    """A chat stream as vLLM sends it: a role per answer, pieces in turn, the last with its end, usage, [DONE]."""

    def one(index: int, delta: Any, finish: str | None = None) -> bytes:
        words = (
            {"content": [{"token": delta["content"], "logprob": -0.5}]} if logprobs and delta.get("content") else None
        )
        return sse({**HEAD, "choices": [{"index": index, "delta": delta, "logprobs": words, "finish_reason": finish}]})

    events = [one(index, {"role": "assistant", "content": ""}) for index in range(n)]
    for number, piece in enumerate(pieces, start=1):
        events += [one(index, {"content": piece}, "stop" if number == len(pieces) else None) for index in range(n)]
    if usage:
        events.append(sse({**HEAD, "choices": [], "usage": {"completion_tokens": len(pieces)}}))
    return [*events, b"data: [DONE]\n\n"]


def completion_events(pieces: Sequence[str], n: int = 1) -> list[bytes]:
    """A completions stream as vLLM sends it."""
    head = {**HEAD, "object": "text_completion"}
    events = [
        sse({**head, "choices": [{"index": i, "text": piece, "logprobs": None,
                                  "finish_reason": "stop" if number == len(pieces) else None}]})
        for number, piece in enumerate(pieces, start=1) for i in range(n)
    ]  # fmt: skip
    return [*events, b"data: [DONE]\n\n"]


def response_events(pieces: Sequence[str]) -> list[bytes]:
    """A responses stream as vLLM sends it, with one message."""
    text, place = "".join(pieces), {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "base", "output": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": response},
        {"type": "response.in_progress", "response": response},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
        *({"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []} for piece in pieces),
        {"type": "response.output_text.done", **place, "text": text},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {**response, "status": "completed", "output": [item]}},
    ]
    return [sse({**e, "sequence_number": n}, e["type"]) for n, e in enumerate(events)]


def body_of(path: str, text: str, n: int = 1) -> dict[str, Any]:
    """The whole reply, as vLLM sends it."""
    if path == RESPONSES:
        part = {"type": "output_text", "text": text, "annotations": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        return {"id": "resp_1", "object": "response", "created_at": 1, "model": "base", "output": [item]}
    said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if path == CHAT else {"text": text}
    choices = [{"index": i, **said, "logprobs": None, "finish_reason": "stop"} for i in range(n)]
    return {**HEAD, "object": "chat.completion" if path == CHAT else "text_completion", "choices": choices}


class Reply:
    """What the client got."""

    def __init__(self, messages: list[Any]) -> None:
        self.status = next(m["status"] for m in messages if m["type"] == "http.response.start")
        self.headers = dict(next(m["headers"] for m in messages if m["type"] == "http.response.start"))
        self.raw = b"".join(m["body"] for m in messages if m["type"] == "http.response.body")
        self.ended = not messages[-1].get("more_body", False)

    @property
    def events(self) -> list[Any]:
        lines = [line for line in self.raw.split(b"\n") if line.startswith(b"data: ") and b"[DONE]" not in line]
        return [json.loads(line[6:]) for line in lines]

    def said(self, index: int = 0) -> str:
        """The text that the client shows, of a stream or of a whole reply."""
        if not self.raw.startswith((b"data", b"event")):
            document = json.loads(self.raw)
            if "output" in document:
                return "".join(part["text"] for item in document["output"] for part in item["content"])
            choice = document["choices"][index]
            return str(choice["message"]["content"] if "message" in choice else choice["text"])
        if "type" in self.events[0]:
            return "".join(e["delta"] for e in self.events if e["type"] == "response.output_text.delta")
        choices = [c for e in self.events for c in e.get("choices", ()) if c["index"] == index]
        return "".join((c["delta"].get("content") or "") if "delta" in c else c["text"] for c in choices)

    def finishes(self, index: int = 0) -> list[str]:
        choices = [c for e in self.events for c in e.get("choices", ()) if c["index"] == index]
        return [c["finish_reason"] for c in choices if c["finish_reason"]]


class Gated:
    """`ask` sends a request through the gateway; `asked` are the bodies that reached the model."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        self.detector = WordDetector()
        self.registry = prometheus_client.CollectorRegistry()
        self.folder = folder
        self.asked: list[dict[str, Any]] = []
        self.access_log = AccessLog(folder)
        weakref.finalize(self, self.access_log.close)
        # What was sent of the last reply.
        self.messages: list[Any] = []
        self.policy = Policy(**policy)
        self.gate: SafetyGate | None = SafetyGate(
            self.policy, self.detector, SafetyCounts(folder, self.registry), lambda ids: "".join(map(chr, ids))
        )

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"counsel_safety_{name}_total", labels) or 0.0

    def ask(
        self,
        path: str,
        answer: Sequence[bytes] | dict[str, Any],
        headers: Sequence[tuple[bytes, bytes]] = (),
        **body: Any,
    ) -> Reply:
        return asyncio.run(self.ask_async(path, answer, headers, **body))

    async def ask_async(
        self,
        path: str,
        answer: Sequence[bytes] | dict[str, Any],
        headers: Sequence[tuple[bytes, bytes]] = (),
        **body: Any,
    ) -> Reply:
        async def model(scope: Any, receive: Any, send: Any) -> None:
            self.asked.append(json.loads((await receive())["body"]))
            whole = isinstance(answer, dict)
            kind = b"application/json" if whole else b"text/event-stream; charset=utf-8"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            for part in [json.dumps(answer).encode()] if whole else answer:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        service = Service(
            config=ServeConfig(),
            pool=types.SimpleNamespace(names=types.SimpleNamespace(base_name="base")),  # type: ignore[arg-type]
            watcher=types.SimpleNamespace(),  # type: ignore[arg-type]
            keys=KeyRing(None, {}),
            limits=Limits(64, 4, 64),
            metrics=Metrics(),  # type: ignore[arg-type]
            access_log=self.access_log,
            template=ACCEPTS_ALL,
            max_model_len=512,
            safety=self.gate,
        )
        messages = self.messages = []

        async def send(message: Any) -> None:
            messages.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        scope = {
            "type": "http", "method": "POST", "path": path, "headers": [(b"host", b"localhost"), *headers],
            "app": types.SimpleNamespace(state=types.SimpleNamespace(counsel=service)),
        }  # fmt: skip
        await Gateway(model)(scope, receive, send)
        # Until what the gate counts is on disk.
        if self.gate is not None and self.gate.counts._write is not None:
            await self.gate.counts._write
        return Reply(messages)
