"""Plays a plan inside one Locust process: sends each arrival when it is due, whether or not earlier ones are back.

Locust's own waiting times start after a task ends, so a slow server slows the load it is offered. Here a Locust user
is a *source of arrivals*: it starts each request in a greenlet of its own at the planned moment and goes on. With one
source per process the arrivals of all sources together are exactly the plan; a user added beyond that (on the web
page, by a load shape) plays a share again, shifted in time, and so adds its part of the rate.
"""

import time
import traceback
from collections.abc import Callable, Sequence

import gevent
from gevent import Timeout
from gevent.pool import Pool

import openai

from counsel.chat import prompt_messages
from loadtest.records import Row
from loadtest.scenario import Scenario
from loadtest.stream import Limits, ask, request_body
from loadtest.workload import Arrival

# How far a repeated share is shifted, as a part of the run: the golden ratio spreads any number of them.
_SHIFT = 0.6180339887
# A source that begins later than this does not make up for what was due before: that would be a flood.
_LATE_S = 1.0


class Player:
    """Sends requests for the users of one process and hands finished rows to `sink`."""

    def __init__(self, scenario: Scenario, plan: Sequence[Arrival], prompts: Sequence[str], client: openai.OpenAI,
                 worker: int, sink: Callable[[Row], None]) -> None:  # fmt: skip
        self.scenario = scenario
        self.worker = worker
        self.pool = Pool()
        self.bugs: list[str] = []
        self.due_so_far = 0
        self._plan = plan
        self._prompts = prompts
        self._client = client
        self._cap = -(-scenario.max_in_flight // scenario.workers)
        self._sink = sink
        self._next_closed = worker
        self._open_rows: dict[int, Row] = {}
        self.start_s = time.monotonic()

    def now_s(self) -> float:
        """Seconds after the start of the run."""
        return time.monotonic() - self.start_s

    @property
    def in_flight(self) -> int:
        return len(self.pool)

    def play_open(self, user: int, stopping: Callable[[], bool]) -> None:
        """Start every arrival of this user's share when it is due; return after the last, or when `stopping`."""
        sources = self.scenario.sources
        share = self._plan[user % sources :: sources]
        lap = user // sources
        shift_s = lap * _SHIFT * self.scenario.duration_s
        dues = sorted(((arrival.due_s + shift_s) % self.scenario.duration_s if lap else arrival.due_s, index)
                      for index, arrival in enumerate(share))  # fmt: skip
        begun_s = self.now_s()
        for due_s, index in dues:
            if due_s < begun_s - _LATE_S:
                continue
            # Short naps, so that a user who is told to stop does so within half a second.
            while (left_s := due_s - self.now_s()) > 0:
                gevent.sleep(min(left_s, 0.5))
                if stopping():
                    return
            self.due_so_far += 1
            arrival = share[index]
            if lap:
                arrival = arrival._replace(id=arrival.id + lap * len(self._plan), due_s=due_s)
            if self.in_flight >= self._cap:
                self._sink(Row(arrival.id, 0, arrival.model, self.worker, due_s, arrival.tags, end_s=self.now_s(),
                                 outcome="dropped", error=f"{self._cap} requests in flight"))  # fmt: skip
            else:
                self._begin(arrival, due_s, lap)

    def play_closed(self, stopping: Callable[[], bool]) -> None:
        """Ask, wait for the reply, ask again, until the time or the plan's `requests` are up, or `stopping`."""
        while self.now_s() < self.scenario.duration_s and not stopping():
            number, self._next_closed = self._next_closed, self._next_closed + self.scenario.workers
            lap, index = divmod(number, len(self._plan))
            if lap and self.scenario.requests:
                return
            self.due_so_far += 1
            self._begin(self._plan[index]._replace(id=number), None, lap).join()

    def drain(self) -> None:
        """Wait for running requests, at most `drain_s`; those that are left become rows with outcome `unfinished`."""
        self.pool.join(timeout=self.scenario.drain_s)
        self.pool.kill(block=True)
        for row in list(self._open_rows.values()):
            row.end_s, row.outcome = self.now_s(), "unfinished"
            self._sink(row)
        self._open_rows.clear()

    def _begin(self, arrival: Arrival, due_s: float | None, lap: int) -> gevent.Greenlet:
        greenlet = self.pool.spawn(self._converse, arrival, due_s, lap)
        # Whatever a server does is an outcome; an exception here is our own bug, and must not pass for fewer rows.
        greenlet.link_exception(lambda dead: self.bugs.append("".join(traceback.format_exception(dead.exception))))
        return greenlet

    def _converse(self, arrival: Arrival, due_s: float | None, lap: int) -> None:
        """Ask the turns of one arrival, each after the reply before it; a failed turn ends the conversation.

        In a later `lap` through the plan the server knows its prompts already: they are numbered once more.
        """
        messages: list[dict[str, str]] = []
        for turn, prompt in enumerate(arrival.prompts):
            again = f"[{lap}]" if lap and self.scenario.unique_prompts else ""
            question = again + self._prompts[prompt]
            with_system = turn == 0 and not self.scenario.no_system_prompt
            messages += prompt_messages(question) if with_system else [{"role": "user", "content": question}]
            due_s = self.now_s() if due_s is None else due_s
            row = Row(arrival.id, turn, arrival.model, self.worker, due_s, arrival.tags)
            # Kept where drain() finds it: a killed greenlet has nobody left to write its row.
            key = id(row)
            self._open_rows[key] = row
            body = request_body(self.scenario, arrival.model, messages, arrival.max_tokens)
            limits = Limits(arrival.cancel_s, self.scenario.request_timeout_s, self.scenario.idle_timeout_s)
            reply = ask(self._client, body, row, self.start_s, limits, Timeout)
            del self._open_rows[key]
            self._sink(row)
            if not row.ok or turn + 1 == len(arrival.prompts):
                return
            messages.append({"role": "assistant", "content": reply})
            due_s = self.now_s() + arrival.think_s
            gevent.sleep(arrival.think_s)
