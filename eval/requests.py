"""Send many requests: bounded concurrency, retries, and a progress line on stderr."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import openai

from counsel.errors import UserError

ATTEMPTS = 4
_RETRIED = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)


class Outcome(NamedTuple):
    """The result of one request after its retries: a response or an error, never both."""

    response: Any
    error: str | None
    attempts: int
    latency_s: float


async def attempt(request: Callable[[], Awaitable[Any]]) -> Outcome:
    """Send a request; retry a lost connection, a timeout, 429 or 5xx up to three times, after 0.5, 1 and 2 s.

    Any other 4xx is final. Raises UserError when the server cannot be reached at all: to continue would only fill the
    log with errors, and the same command continues later.
    """
    for number in range(1, ATTEMPTS + 1):
        started = time.perf_counter()
        try:
            response = await request()
            return Outcome(response, None, number, time.perf_counter() - started)
        except openai.APIError as error:
            latency_s = time.perf_counter() - started
            if number < ATTEMPTS and isinstance(error, _RETRIED):
                await asyncio.sleep(0.5 * 2 ** (number - 1))
                continue
            if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
                raise UserError(
                    f"the server at {error.request.url} stopped answering; start it and run the same command again: "
                    "finished rows are kept"
                ) from error
            return Outcome(None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", number, latency_s)
    raise AssertionError("unreachable: the last attempt returns or raises")


async def run_bounded(jobs: Sequence[Callable[[], Awaitable[None]]], concurrency: int) -> None:
    """Run the jobs in order, `concurrency` at a time; the first exception cancels the rest and is raised."""
    pending = iter(jobs)

    async def worker() -> None:
        for job in pending:
            await job()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(jobs))):
                group.create_task(worker())
    except* UserError as errors:
        raise errors.exceptions[0] from None


async def server_version(client: openai.AsyncOpenAI) -> str | None:
    """The version that vLLM's `GET /version` (next to `/v1`) reports; None if the server has no such route.

    Raises openai.APIConnectionError when the server cannot be reached.
    """
    try:
        reply: Any = await client.get(str(client.base_url.join("/version")), cast_to=object)
    except openai.APIStatusError:
        return None
    return str(reply["version"]) if isinstance(reply, dict) and "version" in reply else None


class Progress:
    """One line on stderr: rows (or other `units`) done, the arm being asked, and the time left at the current pace."""

    def __init__(self, total: int, done: int, units: str = "rows") -> None:
        self.total, self.done, self.units = total, done, units
        self._first, self._started, self._printed = done, time.monotonic(), 0.0
        self._live = sys.stderr.isatty()

    def step(self, arm: str) -> None:
        """Count one unit of `arm`; print at most once per second on a terminal, every ten seconds elsewhere."""
        self.done += 1
        now = time.monotonic()
        if now - self._printed < (1 if self._live else 10) and self.done < self.total:
            return
        self._printed = now
        left_s = (now - self._started) / (self.done - self._first) * (self.total - self.done)
        line = f"{self.done}/{self.total} {self.units}, {left_s:.0f} s left, asking {arm}"
        end = "\n" if self.done == self.total or not self._live else ""
        print(f"\r{line:<70}" if self._live else line, end=end, file=sys.stderr, flush=True)
