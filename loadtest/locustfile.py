"""What Locust runs: users that are sources of arrivals, and the plumbing that brings their rows to one file.

`python -m loadtest` starts it (see loadtest/launch.py) with the results directory in COUNSEL_LOADTEST. Locust's own
table feeds the live page and nothing else: it rounds to two digits, and what it calls a rate waits for replies.
"""

import gc
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from locust import User, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner
from locust.user.task import LOCUST_STATE_STOPPING

from loadtest.collect import Collector, Outbox
from loadtest.player import Player
from loadtest.scenario import read_scenario
from loadtest.stream import make_client, rehearse
from loadtest.work import Arrival
from train.files import read_jsonl

# One line per request otherwise.
logging.getLogger("httpx2").setLevel(logging.WARNING)

DIRECTORY = Path(os.environ["COUNSEL_LOADTEST"])
SCENARIO = read_scenario(DIRECTORY)


class Here:
    """This Locust process: its player and outbox, and which of its users play (their numbers from 0, reused)."""

    worker = 0
    player: Player
    outbox: Outbox
    playing: set[int]


class Source(User):
    """A source of arrivals, or in a closed loop one client; see loadtest/player.py."""

    @task
    def play(self) -> None:
        """Play this user's share of the plan, then wait for what is still running."""
        own = next(number for number in range(len(Here.playing) + 1) if number not in Here.playing)
        Here.playing.add(own)
        try:
            if SCENARIO.closed:
                Here.player.play_closed(self._told_to_stop)
            else:
                Here.player.play_open(own * SCENARIO.workers + Here.worker, self._told_to_stop)
            if Here.playing == {own}:
                Here.player.drain()
        finally:
            Here.playing.remove(own)
            Here.outbox.finished = not Here.playing
        raise StopUser

    def _told_to_stop(self) -> bool:
        return self._state == LOCUST_STATE_STOPPING


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Load the plan and connect rows to their file, or to the master that owns it."""
    runner = environment.runner
    deliver: Callable[[dict[str, Any]], None]
    if isinstance(runner, WorkerRunner):
        Here.worker = runner.worker_index
        deliver = lambda report: runner.send_message("report", report)  # noqa: E731
    else:
        collector = Collector(environment, DIRECTORY, SCENARIO.workers)
        deliver = collector.take
        events.test_start.add_listener(lambda **_: collector.restart())
    if isinstance(runner, MasterRunner):
        runner.register_message("report", lambda msg, **_: collector.take(msg.data))
        return
    plan = [Arrival.from_row(row) for row in read_jsonl(DIRECTORY / "plan.jsonl")]
    prompts = [row["question"] for row in read_jsonl(DIRECTORY / "prompts.jsonl")]
    client = make_client(SCENARIO.url, SCENARIO.max_in_flight)
    rehearse(SCENARIO)
    # Everything so far lives to the end: without this, each full collection would stop the hub to look through it.
    gc.freeze()
    jobs: list[gevent.Greenlet] = []

    def start(**_: Any) -> None:
        gevent.killall(jobs)
        Here.player = Player(SCENARIO, plan, prompts, client, Here.worker, lambda row: Here.outbox.add(row))
        Here.outbox = Outbox(environment, Here.player, deliver)
        Here.playing = set()
        jobs[:] = [gevent.spawn(Here.outbox.run), gevent.spawn(Here.outbox.observe)]

    def broken(exception: Exception, **_: Any) -> None:
        Here.player.bugs.append("".join(traceback.format_exception(exception)))

    events.test_start.add_listener(start)
    # Locust logs what a task raises and runs the task again: here that is our own bug, and ends the run.
    events.user_error.add_listener(broken)

    def end(**_: Any) -> None:
        if jobs:
            Here.outbox.flush()

    events.quitting.add_listener(end)
