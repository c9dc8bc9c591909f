"""Sends a plan from inside one Locust process: each request when it is due, whether or not earlier ones have ended.

Locust's own wait times start after a task ends, so a slow server would reduce its own load. Here a Locust user is a
*source of arrivals*: it starts each request in a separate greenlet at the planned moment and does not wait for it. With
one source per process, all sources together send exactly the plan. A user added beyond that (on the web page, by a load
shape) repeats a share, shifted in time, and so adds its part of the rate.
"""

import time
import traceback
from collections.abc import Callable, Sequence

import gevent
from gevent import Timeout
from gevent.pool import Pool

import openai

from counsel.chat import prompt_messages
from loadtest.records import RequestRecord
from loadtest.scenario import Scenario
from loadtest.stream import RequestLimits, ask, request_body
from loadtest.workload import Arrival

# How far a repeated share is shifted, as a fraction of the run: the golden ratio spreads any number of repeats.
_SHIFT = 0.6180339887
# A source that starts later than this skips what was due before. Catching up would flood the server.
_MAX_CATCH_UP_S = 1.0


class Dispatcher:
    """Sends requests for the users of one process and passes finished records to `sink`."""

    def __init__(self, scenario: Scenario, plan: Sequence[Arrival], prompts: Sequence[str], client: openai.OpenAI,
                 worker: int, sink: Callable[[RequestRecord], None]) -> None:  # fmt: skip
        self.scenario = scenario
        self.worker = worker
        self.pool = Pool()
        self.tracebacks: list[str] = []
        self.due_so_far = 0
        self._plan = plan
        self._prompts = prompts
        self._client = client
        self._max_in_flight = -(-scenario.max_in_flight // scenario.workers)
        self._sink = sink
        self._next_closed = worker
        self._running: dict[int, RequestRecord] = {}
        self.start_s = time.monotonic()

    def now_s(self) -> float:
        """Seconds after the start of the run."""
        return time.monotonic() - self.start_s

    @property
    def in_flight(self) -> int:
        return len(self.pool)

    def run_open(self, user: int, stopping: Callable[[], bool]) -> None:
        """Start every arrival of this user's share when it is due; return after the last one, or when `stopping`."""
        sources = self.scenario.sources
        share = self._plan[user % sources :: sources]
        lap = user // sources
        shift_s = lap * _SHIFT * self.scenario.duration_s
        dues = sorted(((arrival.due_s + shift_s) % self.scenario.duration_s if lap else arrival.due_s, index)
                      for index, arrival in enumerate(share))  # fmt: skip
        started_s = self.now_s()
        for due_s, index in dues:
            if due_s < started_s - _MAX_CATCH_UP_S:
                continue
            # Sleep briefly, so that a user that must stop does so within half a second.
            while (left_s := due_s - self.now_s()) > 0:
                gevent.sleep(min(left_s, 0.5))
                if stopping():
                    return
            self.due_so_far += 1
            arrival = share[index]
            if lap:
                arrival = arrival._replace(id=arrival.id + lap * len(self._plan), due_s=due_s)
            if self.in_flight >= self._max_in_flight:
                self._sink(RequestRecord(
                    arrival.id, 0, arrival.model, self.worker, due_s, arrival.tags, end_s=self.now_s(),
                    outcome="dropped", error=f"{self._max_in_flight} requests in flight"))  # fmt: skip
            else:
                self._start(arrival, due_s, lap)

    def run_closed(self, stopping: Callable[[], bool]) -> None:
        """Ask, wait for the reply, ask again, until the time is up, `requests` are sent, or `stopping`."""
        while self.now_s() < self.scenario.duration_s and not stopping():
            number, self._next_closed = self._next_closed, self._next_closed + self.scenario.workers
            lap, index = divmod(number, len(self._plan))
            if lap and self.scenario.requests:
                return
            self.due_so_far += 1
            self._start(self._plan[index]._replace(id=number), None, lap).join()

    def drain(self) -> None:
        """Wait for running requests for at most `drain_s`; the rest are recorded as `unfinished`."""
        self.pool.join(timeout=self.scenario.drain_s)
        self.pool.kill(block=True)
        for record in list(self._running.values()):
            record.end_s, record.outcome = self.now_s(), "unfinished"
            self._sink(record)
        self._running.clear()

    def _start(self, arrival: Arrival, due_s: float | None, lap: int) -> gevent.Greenlet:
        greenlet = self.pool.spawn(self._run_conversation, arrival, due_s, lap)
        # What a server does is an outcome. An exception here is a bug of ours and must not look like fewer requests.
        greenlet.link_exception(
            lambda dead: self.tracebacks.append("".join(traceback.format_exception(dead.exception)))
        )
        return greenlet

    def _run_conversation(self, arrival: Arrival, due_s: float | None, lap: int) -> None:
        """Ask the turns of one arrival, each after the reply to the one before; a failed turn ends the conversation.

        In a later `lap` through the plan the server has seen the prompts, so they get another number.
        """
        messages: list[dict[str, str]] = []
        for turn, prompt in enumerate(arrival.prompts):
            prefix = f"[{lap}]" if lap and self.scenario.unique_prompts else ""
            question = prefix + self._prompts[prompt]
            with_system = turn == 0 and not self.scenario.no_system_prompt
            messages += prompt_messages(question) if with_system else [{"role": "user", "content": question}]
            due_s = self.now_s() if due_s is None else due_s
            record = RequestRecord(arrival.id, turn, arrival.model, self.worker, due_s, arrival.tags)
            # drain() finds it here: a killed greenlet cannot write its record.
            key = id(record)
            self._running[key] = record
            body = request_body(self.scenario, arrival.model, messages, arrival.max_tokens)
            limits = RequestLimits(arrival.cancel_s, self.scenario.request_timeout_s, self.scenario.idle_timeout_s)
            reply = ask(self._client, body, record, self.start_s, limits, Timeout)
            del self._running[key]
            self._sink(record)
            if not record.ok or turn + 1 == len(arrival.prompts):
                return
            messages.append({"role": "assistant", "content": reply})
            due_s = self.now_s() + arrival.think_s
            gevent.sleep(arrival.think_s)
