"""How much at once: sequences running and waiting per key (429 beyond), and on the whole server (503 beyond).

A request counts for as many sequences as it makes the engine run: `n` times the number of prompts. A key's own requests
beyond what it may run wait here, first come first served, so that one caller's burst does not fill the engine's queue.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from serve.api_errors import ApiError


@dataclass
class _Line:
    """What one key has running, and who waits for a turn: sequences and the future that says it has come."""

    running: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)

    @property
    def n_waiting(self) -> int:
        return sum(n_sequences for n_sequences, _ in self.waiting)


class Limits:
    """Counters of what is in flight; `enter` refuses or says when, `leave` gives back. Lives on one event loop."""

    def __init__(self, per_key: int, queued_per_key: int, total: int) -> None:
        self.per_key, self.queued_per_key, self.total = per_key, queued_per_key, total
        self.in_flight = 0
        self.lines: dict[str, _Line] = {}

    def enter(self, key: str, n_sequences: int) -> asyncio.Future[None]:
        """Count a request in; the future is done when it may run. Pair with `leave`, whether or not its turn came.

        Raises ApiError with the seconds after which to try again.
        """
        if n_sequences > self.per_key:
            raise ApiError(
                400, f"the request asks for {n_sequences} answers; at most {self.per_key} are allowed", param="n"
            )
        line = self.lines.get(key, _Line())
        turn = asyncio.get_running_loop().create_future()
        runs = not line.waiting and line.running + n_sequences <= self.per_key
        if not runs and line.n_waiting + n_sequences > self.queued_per_key:
            raise ApiError(
                429,
                f"this key has {line.running} answers running of {self.per_key} "
                f"and {line.n_waiting} waiting of {self.queued_per_key}",
                retry_after_s=1,
            )
        # A quarter is kept for keys that have nothing in, so that a few callers cannot shut out the others.
        room = self.total if key not in self.lines else self.total - self.total // 4
        if self.in_flight + n_sequences > room:
            raise ApiError(503, f"the server is full: {self.in_flight} answers running or waiting", retry_after_s=2)
        self.lines[key] = line
        self.in_flight += n_sequences
        if runs:
            line.running += n_sequences
            turn.set_result(None)
        else:
            line.waiting.append((n_sequences, turn))
        return turn

    def leave(self, key: str, n_sequences: int, turn: asyncio.Future[None]) -> None:
        """Count a request out, and let those run whose turn has come."""
        line = self.lines[key]
        self.in_flight -= n_sequences
        if (n_sequences, turn) in line.waiting:
            line.waiting.remove((n_sequences, turn))
        else:
            line.running -= n_sequences
        while line.waiting and line.running + line.waiting[0][0] <= self.per_key:
            n_next, next_turn = line.waiting.popleft()
            line.running += n_next
            # One that gave up a moment ago still has to leave; it does so as if it had run.
            if not next_turn.done():
                next_turn.set_result(None)
        if not line.running:
            del self.lines[key]
