"""Bounds on the sequences that run and wait: per key (429 above), and on the whole server (503 above).

A request counts as the sequences that it makes the engine run: `n` times the number of prompts. Requests beyond a key's
share wait here, first come, first served, so that one caller's burst does not fill the engine's queue.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve.api_errors import ApiError


@dataclass
class _KeyQueue:
    """What runs for one key, and what waits: a number of sequences, and the future that is done on their turn."""

    running: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)

    @property
    def n_waiting(self) -> int:
        return sum(n_sequences for n_sequences, _ in self.waiting)


class Limits:
    """Counts what is in flight. `enter` refuses or gives a turn, `leave` ends it. Lives on one event loop."""

    def __init__(self, per_key: int, queued_per_key: int, total: int) -> None:
        self.per_key, self.queued_per_key, self.total = per_key, queued_per_key, total
        self.in_flight = 0
        self.queues: dict[str, _KeyQueue] = {}

    @contextlib.contextmanager
    def admit(self, key: str, n_sequences: int) -> Iterator[asyncio.Future[None]]:
        """`enter`, and `leave` at the end."""
        turn = self.enter(key, n_sequences)
        try:
            yield turn
        finally:
            self.leave(key, n_sequences, turn)

    def enter(self, key: str, n_sequences: int) -> asyncio.Future[None]:
        """Count a request in; the future is done when it may run. Pair with `leave`, whether or not its turn came.

        Raises ApiError with the seconds after which to try again.
        """
        if n_sequences > self.per_key:
            raise ApiError(
                400, f"the request asks for {n_sequences} answers; at most {self.per_key} are allowed", param="n"
            )
        queue = self.queues.get(key, _KeyQueue())
        turn = asyncio.get_running_loop().create_future()
        runs = not queue.waiting and queue.running + n_sequences <= self.per_key
        if not runs and queue.n_waiting + n_sequences > self.queued_per_key:
            raise ApiError(
                429,
                f"this key has {queue.running} answers running of {self.per_key} "
                f"and {queue.n_waiting} waiting of {self.queued_per_key}",
                retry_after_s=1,
            )
        # A quarter is kept for keys with nothing in flight, so that a few callers cannot lock out the others.
        room = self.total if key not in self.queues else self.total - self.total // 4
        if self.in_flight + n_sequences > room:
            raise ApiError(503, f"the server is full: {self.in_flight} answers running or waiting", retry_after_s=2)
        self.queues[key] = queue
        self.in_flight += n_sequences
        if runs:
            queue.running += n_sequences
            turn.set_result(None)
        else:
            queue.waiting.append((n_sequences, turn))
        return turn

    def leave(self, key: str, n_sequences: int, turn: asyncio.Future[None]) -> None:
        """Count a request out, and let the next ones run."""
        queue = self.queues[key]
        self.in_flight -= n_sequences
        if (n_sequences, turn) in queue.waiting:
            queue.waiting.remove((n_sequences, turn))
        else:
            queue.running -= n_sequences
        while queue.waiting and queue.running + queue.waiting[0][0] <= self.per_key:
            n_next, next_turn = queue.waiting.popleft()
            queue.running += n_next
            # A cancelled request still has to leave; it counts as running until it does.
            if not next_turn.done():
                next_turn.set_result(None)
        if not queue.running:
            del self.queues[key]
