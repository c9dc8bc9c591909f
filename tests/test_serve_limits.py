"""Who may run, who waits and who is refused."""

import asyncio

import pytest

from serve.api_errors import ApiError
from serve.limits import Limits


def test_a_key_waits_then_gets_429_and_a_full_server_503():
    """Two run and one waits per key; more are refused with a time to retry; one that ends lets the next one run."""

    async def scene() -> None:
        limits = Limits(per_key=2, queued_per_key=1, total=4)
        first = limits.enter("a", 2)
        second = limits.enter("a", 1)
        assert (first.done(), second.done()) == (True, False)
        with pytest.raises(ApiError, match="2 answers running of 2 and 1 waiting of 1") as full:
            limits.enter("a", 1)
        assert (full.value.status, full.value.retry_after_s) == (429, 1)
        third = limits.enter("b", 1)
        assert third.done()
        with pytest.raises(ApiError) as full:
            limits.enter("b", 1)
        assert (full.value.status, full.value.retry_after_s) == (503, 2)
        limits.leave("a", 2, first)
        assert second.done()
        assert limits.in_flight == 2
        limits.leave("a", 1, second)
        limits.leave("b", 1, third)
        assert (limits.in_flight, limits.queues) == (0, {})

    asyncio.run(scene())


def test_turns_come_in_order_and_a_request_that_leaves_blocks_nothing():
    """A small request does not overtake a large one; a waiting one that leaves, or is cancelled, frees its place."""

    async def scene() -> None:
        limits = Limits(per_key=2, queued_per_key=9, total=99)
        running = limits.enter("a", 1)
        large, small, last = (limits.enter("a", n) for n in (2, 1, 1))
        assert not small.done()
        limits.leave("a", 2, large)
        limits.leave("a", 1, running)
        assert small.done()
        assert last.done()
        cancelled = limits.enter("a", 2)
        cancelled.cancel()
        limits.leave("a", 1, small)
        limits.leave("a", 1, last)
        limits.leave("a", 2, cancelled)
        assert (limits.in_flight, limits.queues) == (0, {})

    asyncio.run(scene())


def test_a_few_callers_cannot_lock_out_the_others():
    """Keys with something in flight may fill three quarters; the rest is for those with nothing in flight."""

    async def scene() -> None:
        limits = Limits(per_key=64, queued_per_key=64, total=160)
        for _ in range(120):
            limits.enter("a", 1)
        with pytest.raises(ApiError, match="the server is full: 120 answers"):
            limits.enter("a", 1)
        limits.enter("b", 30)
        with pytest.raises(ApiError, match="the server is full: 150 answers") as full:
            limits.enter("b", 1)
        assert full.value.status == 503
        limits.enter("c", 10)
        with pytest.raises(ApiError, match="the server is full: 160 answers"):
            limits.enter("d", 1)

    asyncio.run(scene())
