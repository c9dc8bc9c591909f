"""However a request ends, it leaves the limits and the count of what is in flight; without an engine."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from serve.api_errors import ApiError
from serve.chat_turns import ACCEPTS_ALL
from serve.gateway import Gateway, RequestLog
from serve.limits import Limits
from serve.reply import Reply

BODY = json.dumps({"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
DISCONNECT = {"type": "http.disconnect"}


class Gauge:
    value = 0

    def inc(self, n: int) -> None:
        self.value += n

    def dec(self, n: int) -> None:
        self.value -= n


@pytest.mark.parametrize(
    ("messages", "runs_before", "in_flight", "error"),
    [
        ([], False, (1, 0), asyncio.CancelledError),
        ([BODY], True, (2, 1), asyncio.CancelledError),
        ([BODY], False, (1, 1), asyncio.CancelledError),
        ([DISCONNECT], False, (0, 0), ApiError),
        ([BODY, DISCONNECT], True, (1, 0), ApiError),
        ([b"{"], False, (0, 0), ApiError),
    ],
    ids=["read", "wait for its turn", "answer", "disconnect in the body", "disconnect in the queue", "no JSON"],
)
def test_a_request_leaves_the_limits_however_it_ends(messages, runs_before, in_flight, error):
    """One answer per key: cancelled while its body is read, while it waits and while it is answered; or refused."""

    async def scene() -> None:
        limits, gauge, left = Limits(per_key=1, queued_per_key=2, total=8), Gauge(), list(messages)
        service = SimpleNamespace(
            draining=False, limits=limits, pool=SimpleNamespace(names=SimpleNamespace(base_name="tiny")),
            config=SimpleNamespace(max_body_kb=64, max_completion_tokens=16, comment_s=60.0), template=ACCEPTS_ALL,
            metrics=SimpleNamespace(in_flight=gauge, answered=lambda *_: None), max_model_len=64, safety=None,
        )  # fmt: skip
        request_log = RequestLog("1", "POST", "/v1/chat/completions", SimpleNamespace(name="key", digest=""))

        async def receive() -> dict:
            if not left:
                await asyncio.Event().wait()
            message = left.pop(0)
            return message if isinstance(message, dict) else {"type": "http.request", "body": message}

        async def answer_never(*_: object) -> None:
            await asyncio.Event().wait()

        before = limits.enter("key", 1) if runs_before else None
        reply = Reply(answer_never, [], is_responses=False)
        request = asyncio.create_task(
            Gateway(answer_never)._generate(service, request_log, {"headers": []}, receive, reply)
        )
        for _ in range(10):
            await asyncio.sleep(0)
        assert (limits.in_flight, gauge.value) == in_flight
        request.cancel()
        with pytest.raises(error):
            await request
        if before is not None:
            limits.leave("key", 1, before)
        assert (limits.in_flight, limits.queues, gauge.value) == (0, {}, 0)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scene())
