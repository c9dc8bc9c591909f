"""A stand-in server on loopback that streams OpenAI chat chunks: known content, counts and times, faults on request.

    python tests/sse_server.py --models base,gentle,base.first-200.half       prints its port, serves until killed

There is no model: a reply is the word "w " `max_tokens` times, so a test knows what must come back. The first model is
the base, the others are its adapters. A *model name* says how it behaves, in words joined by dots (see `Behavior`).
It is plain asyncio with prepared bytes, because it must be faster than the client that it measures.
GET /counts counts requests: {"requests": {model: n}, "hung_up": n, "connections": n}; only connections with a request.
GET /arrivals says when they arrived, on the monotonic clock that all processes of a machine share: [[seconds, last
message], ...]. GET /release lets the requests of `holds` continue.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Faults halfway through a reply.
MIDWAY = ("half", "reset", "eof", "comment", "garbage", "shape", "midway", "die")


@dataclass
class Behavior:
    """How a model replies.

    `first-200`: the first chunk after 200 ms. `gap-10`: 10 ms between chunks. `burst`: all chunks in one write.
    `slots-4`: at most four replies at once, from the wait for the first chunk to the last chunk; the others queue, so
    the capacity is 4 over the time of one reply. `together-3`: no reply until three requests wait, which are then all
    answered. `holds-10`: ten requests are answered, the others after GET /release. `status-503`: that status, with a
    JSON error. Halfway through the reply, `half` closes the connection for sending, `reset` resets it, `eof` ends the
    body as if it were complete, `comment` sends only keep-alive comments, `garbage` sends a line that is not JSON,
    `shape` JSON that is not a chunk, `midway` an error object, `die` ends the process. `dies-30` ends it at the 30th
    request, once the 29 before are answered. `drop` closes the connection before any response, `nousage`
    leaves out the usage, `nonsense` has words for counts, and `mute` sends a complete reply without text.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    status: int = 200
    slots: int = 0
    together: int = 0
    holds: int | None = None
    dies: int = 0
    fault: str = ""

    @classmethod
    def of(cls, model: str) -> "Behavior":
        behavior = cls()
        for word in model.split(".")[1:]:
            name, _, value = word.partition("-")
            if name == "first":
                behavior.first_s = int(value) / 1000
            elif name == "gap":
                behavior.gap_s = int(value) / 1000
            elif name in ("status", "slots", "together", "holds", "dies"):
                setattr(behavior, name, int(value))
            else:
                behavior.fault = name
        return behavior


def event(document: dict) -> bytes:
    """One server-sent event, as one chunk of an HTTP body."""
    return http_chunk(b"data: " + json.dumps(document).encode() + b"\n\n")


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def delta(model: str, content: dict, finish: str | None = None) -> dict:
    """A chat completion chunk of one choice."""
    return {
        "id": "chatcmpl-standin", "object": "chat.completion.chunk", "created": 1, "model": model,
        "choices": [{"index": 0, "delta": content, "logprobs": None, "finish_reason": finish}],
    }  # fmt: skip


class Standin(asyncio.Protocol):
    """One connection: requests in sequence, each answered by a task that is cancelled if the client hangs up."""

    models: tuple[str, ...]
    requests: Counter
    slots: dict[str, asyncio.Semaphore]
    waiting: dict[str, list[asyncio.Future]]
    complete: Counter
    released: asyncio.Event
    hung_up = connections = 0
    arrivals: list[tuple[float, str]]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""
        self.counted = False
        self.reply: asyncio.Task | None = None

    def connection_lost(self, _: Exception | None) -> None:
        if self.reply and not self.reply.done():
            Standin.hung_up += 1
            self.reply.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        line, *headers = head.decode("latin-1").split("\r\n")
        length = next((int(h.split(":")[1]) for h in headers if h.lower().startswith("content-length")), 0)
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        method, path, _ = line.split(" ")
        if method == "GET":
            self.answer(*self.get(path))
            return
        body = json.loads(rest[:length])
        Standin.requests[body["model"]] += 1
        Standin.connections += not self.counted
        self.counted = True
        if body.get("messages"):
            self.arrivals.append((time.monotonic(), body["messages"][-1]["content"]))
        self.reply = asyncio.ensure_future(self.stream(body, Standin.requests[body["model"]]))

    def get(self, path: str) -> tuple[int, dict | str]:
        if path == "/v1/models":
            base, *adapters = self.models
            cards = [{"id": base, "object": "model", "created": 1, "owned_by": "tests", "parent": None}]
            cards += [{**cards[0], "id": name, "parent": base} for name in adapters]
            return 200, {"object": "list", "data": cards}
        if path == "/counts":
            return 200, {"requests": dict(self.requests), "hung_up": self.hung_up, "connections": self.connections}
        if path == "/arrivals":
            return 200, {"arrivals": self.arrivals}
        if path == "/release":
            self.released.set()
            return 200, {}
        if path == "/metrics":
            return 200, (
                'vllm:num_requests_running{engine="0",model_name="base"} 3.0\n'
                'vllm:num_requests_waiting{engine="0",model_name="base"} 1.0\n'
                'vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.25\n'
                f'vllm:num_preemptions_total{{engine="0",model_name="base"}} {float(self.requests.total())}\n'
            )
        return 404, {"error": {"message": f"no {path}"}}

    def answer(self, status: int, document: dict | str) -> None:
        text = document if isinstance(document, str) else json.dumps(document)
        kind = "text/plain" if isinstance(document, str) else "application/json"
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(text.encode())}\r\n\r\n"
        self.transport.write(head.encode() + text.encode())

    async def stream(self, body: dict, number: int) -> None:
        """Answer the request with that number, counted from 1 for each model."""
        model, n = body["model"], body["max_tokens"]
        how = Behavior.of(model)
        if how.dies and number >= how.dies:
            # Many requests may be read at once: the earlier ones are answered first, the later ones never are.
            while number > how.dies or self.complete[model] < how.dies - 1:
                await asyncio.sleep(0.001)
            os._exit(1)
        if how.fault == "drop":
            self.transport.close()
            return
        if how.status != 200:
            self.answer(how.status, {"error": {"message": "as asked", "type": "standin", "code": how.status}})
            return
        if how.together:
            await self.wait_together(model, how.together)
        if how.holds is not None and number > how.holds:
            await self.released.wait()
        if not how.slots:
            await self.reply_to(model, n, how)
            return
        async with self.slots.setdefault(model, asyncio.Semaphore(how.slots)):
            await self.reply_to(model, n, how)

    async def wait_together(self, model: str, n: int) -> None:
        """Return once `n` requests wait here."""
        waiting, turn = self.waiting.setdefault(model, []), asyncio.get_running_loop().create_future()
        waiting.append(turn)
        if len(waiting) == n:
            for each in waiting:
                each.set_result(None)
            waiting.clear()
        await turn

    async def reply_to(self, model: str, n: int, how: Behavior) -> None:
        write = self.transport.write
        if how.first_s:
            await asyncio.sleep(how.first_s)
        write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        write(event(delta(model, {"role": "assistant", "content": ""})))
        word = event(delta(model, {"content": "" if how.fault == "mute" else "w "}))
        if how.fault == "burst":
            write(word * n)
        else:
            for index in range(n):
                if index == n // 2 and how.fault in MIDWAY:
                    await self.fail(how.fault)
                    return
                if index and how.gap_s:
                    await asyncio.sleep(how.gap_s)
                write(word)
        write(event(delta(model, {}, "stop")))
        if how.fault != "nousage":
            usage: dict = {"prompt_tokens": 7, "completion_tokens": n, "total_tokens": n + 7}
            if how.fault == "nonsense":
                usage = dict.fromkeys(usage, "several")
            write(event({**delta(model, {}), "choices": [], "usage": usage}))
        write(http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        while self.transport.get_write_buffer_size():
            await asyncio.sleep(0.001)
        Standin.complete[model] += 1

    async def fail(self, fault: str) -> None:
        if fault == "half":
            self.transport.write_eof()
        elif fault == "reset":
            self.transport.abort()
        elif fault == "comment":
            while True:
                self.transport.write(http_chunk(b": keep-alive\n\n"))
                await asyncio.sleep(0.02)
        elif fault == "shape":
            self.transport.write(http_chunk(b"data: [1]\n\n") + b"0\r\n\r\n")
        elif fault == "eof":
            self.transport.write(b"0\r\n\r\n")
        elif fault == "garbage":
            self.transport.write(http_chunk(b"data: {not json\n\n") + b"0\r\n\r\n")
        elif fault == "midway":
            self.transport.write(event({"error": {"message": "engine died", "code": 500}}) + b"0\r\n\r\n")
        else:
            os._exit(1)


@contextlib.contextmanager
def standin(*models: str) -> Iterator[str]:
    """Run a stand-in for `models` in a separate process; yield its base URL."""
    with subprocess.Popen([sys.executable, __file__, "--models", ",".join(models)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def counts(url: str) -> dict[str, Any]:
    """What the stand-in at `url` has counted (see the module's docstring)."""
    with urllib.request.urlopen(url.replace("/v1", "/counts")) as response:
        return json.load(response)


def arrivals(url: str) -> dict[str, float]:
    """When each message arrived at the stand-in at `url`, by its text."""
    with urllib.request.urlopen(url.replace("/v1", "/arrivals")) as response:
        return {text: at_s for at_s, text in json.load(response)["arrivals"]}


async def serve(port: int) -> None:
    """Listen on loopback and print the port."""
    loop = asyncio.get_running_loop()
    Standin.released = asyncio.Event()
    server = await loop.create_server(Standin, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", default="base,gentle,brief")
    options = parser.parse_args()
    Standin.models, Standin.requests, Standin.complete = tuple(options.models.split(",")), Counter(), Counter()
    Standin.slots, Standin.waiting, Standin.arrivals = {}, {}, []
    import uvloop

    uvloop.run(serve(options.port))
