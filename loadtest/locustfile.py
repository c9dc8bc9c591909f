"""What Locust runs: users that are sources of arrivals, and the plumbing that brings their rows to one file.

`python -m loadtest` starts it (see loadtest/launch.py) with the results directory in COUNSEL_LOADTEST. Locust's own
table feeds the live page and nothing else: it rounds to two digits, and what it calls a rate waits for replies.
"""

import gc
import logging
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import User, events, runners, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner
from locust.user.task import LOCUST_STATE_STOPPING

from counsel.files import read_jsonl
from loadtest.clock import Clock
from loadtest.collector import Collector, Outbox
from loadtest.dispatcher import Player
from loadtest.scenario import read_scenario
from loadtest.stream import make_client, rehearse
from loadtest.workload import Arrival

# One line per request otherwise.
logging.getLogger("httpx2").setLevel(logging.WARNING)

# Seconds without a heartbeat after which a worker is given up. Three, Locust's own, pass on a crowded machine while a
# worker connects; a worker that really is gone still makes the run invalid.
runners.HEARTBEAT_LIVENESS = 15

# Seconds from saying when the run begins to its beginning, so that every worker has heard it by then.
_LEAD_S = 0.2

DIRECTORY = Path(os.environ["COUNSEL_LOADTEST"])
SCENARIO = read_scenario(DIRECTORY)
# Read here and not in a listener: a worker is told to start as soon as it has joined, and several share this memory.
PLAN = [Arrival.from_row(row) for row in read_jsonl(DIRECTORY / "plan.jsonl")]
PROMPTS = [row["question"] for row in read_jsonl(DIRECTORY / "prompts.jsonl")]
rehearse(SCENARIO)
# All of this lives to the end: without freezing it, each full collection would stop the hub to look through it.
gc.freeze()


class ProcessState:
    """This Locust process: its number, player and outbox, and which of its users play (numbered from 0, reused)."""

    worker = 0
    player: Player
    outbox: Outbox
    playing: set[int]
    jobs: tuple[gevent.Greenlet, ...] = ()
    collector: Collector | None = None
    # What a worker knows of the leader's clock, and who of the workers has told the leader that it does.
    clock: Clock
    aligned: set[str]
    begun = Event()


class ArrivalSource(User):
    """A source of arrivals, or in a closed loop one client; see loadtest/dispatcher.py."""

    @task
    def play(self) -> None:
        """Play this user's share of the plan, then wait for what is still running."""
        own = next(number for number in range(len(ProcessState.playing) + 1) if number not in ProcessState.playing)
        if own and not SCENARIO.closed and not SCENARIO.web:
            # Locust hands a lost worker's users to the others; playing on here would double this worker's share.
            raise StopUser
        ProcessState.playing.add(own)
        ProcessState.begun.wait()
        gevent.sleep(max(-ProcessState.player.now_s(), 0))
        try:
            if SCENARIO.closed:
                ProcessState.player.play_closed(self._told_to_stop)
            else:
                ProcessState.player.play_open(own * SCENARIO.workers + ProcessState.worker, self._told_to_stop)
            if ProcessState.playing == {own}:
                ProcessState.player.drain()
        finally:
            ProcessState.playing.remove(own)
            ProcessState.outbox.finished = not ProcessState.playing
        raise StopUser

    def _told_to_stop(self) -> bool:
        return self._state == LOCUST_STATE_STOPPING


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Be ready to write down what the others, or this process, report; or to be told which share to play."""
    runner = environment.runner
    gevent.spawn(end_with_parent, os.getppid())
    # Here and not at import: the last listener is asked first, and Locust's own would say goodbye before our last rows.
    environment.events.quitting.add_listener(end)
    if isinstance(runner, WorkerRunner):
        runner.register_message("share", lambda msg, **_: setattr(ProcessState, "worker", msg.data["number"]))
        runner.register_message("time", lambda msg, **_: told_the_time(runner, **msg.data))
        runner.register_message("begin", lambda msg, **_: begin(ProcessState.clock.here(msg.data["leader_s"])))
        return
    collector = ProcessState.collector = Collector(environment, DIRECTORY, SCENARIO.workers)
    if isinstance(runner, MasterRunner):
        runner.register_message("report", lambda msg, **_: collector.take(msg.data))
        runner.register_message("ask", lambda msg, **_: tell_the_time(runner, msg.node_id, msg.data["asked_s"]))
        runner.register_message("aligned", lambda msg, **_: begin_when_aligned(runner, collector, msg.node_id))


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    """Begin with a fresh player, outbox and files; workers, once all of them know what time it is."""
    runner = environment.runner
    if ProcessState.collector:
        ProcessState.collector.restart()
    if isinstance(runner, MasterRunner):
        ProcessState.aligned = set()
        assign_shares(runner)
        return
    gevent.killall(ProcessState.jobs)
    ProcessState.begun.clear()
    client = make_client(SCENARIO.url, SCENARIO.reuse)
    ProcessState.player = Player(
        SCENARIO, PLAN, PROMPTS, client, ProcessState.worker, lambda row: ProcessState.outbox.add(row)
    )
    ProcessState.outbox = Outbox(environment, ProcessState.player, deliver)
    ProcessState.playing = set()
    ProcessState.jobs = (
        gevent.spawn(ProcessState.outbox.run),
        gevent.spawn(ProcessState.outbox.observe, ProcessState.begun),
    )
    if isinstance(runner, WorkerRunner):
        ProcessState.clock = Clock()
        ProcessState.clock.ask(lambda asked_s: runner.send_message("ask", {"asked_s": asked_s}))
    else:
        assert ProcessState.collector, "what is no worker collects"
        now_s = time.monotonic()
        ProcessState.collector.begin(now_s)
        begin(now_s)


def tell_the_time(runner: MasterRunner, worker: str, asked_s: float) -> None:
    """Answer a worker: this is the leader's clock."""
    runner.send_message("time", {"asked_s": asked_s, "leader_s": time.monotonic()}, client_id=worker)


def told_the_time(runner: WorkerRunner, asked_s: float, leader_s: float) -> None:
    """Ask again, or say that it is enough."""
    ProcessState.clock.answer(asked_s, leader_s)
    if not ProcessState.clock.ask(lambda asked_s: runner.send_message("ask", {"asked_s": asked_s})):
        ProcessState.outbox.clock_error_s = ProcessState.clock.error_s
        runner.send_message("aligned")


def begin_when_aligned(runner: MasterRunner, collector: Collector, worker: str) -> None:
    """Say when the run begins, once every worker can tell."""
    ProcessState.aligned.add(worker)
    if len(ProcessState.aligned) == SCENARIO.workers:
        leader_s = time.monotonic() + _LEAD_S
        collector.begin(leader_s)
        for each in ProcessState.aligned:
            runner.send_message("begin", {"leader_s": leader_s}, client_id=each)


def begin(start_s: float) -> None:
    """Start this process's clock of the run, and its sources."""
    ProcessState.player.start_s = start_s
    ProcessState.begun.set()


def assign_shares(runner: MasterRunner) -> None:
    """Tell each worker which share of the plan is its own, before it is told to start.

    Locust's own number of a worker will not do: one that went away before the start leaves a gap in them.
    """
    ready = runner.clients.ready
    for number, node in enumerate(ready):
        runner.send_message("share", {"number": number}, client_id=node.id)
    if len(ready) != SCENARIO.workers:
        assert ProcessState.collector, "the master collects"
        ProcessState.collector.give_up(f"{len(ready)} workers joined a run for {SCENARIO.workers}; end those too many")


def deliver(report: dict[str, Any]) -> None:
    """Bring a report to the collector: ours, or the master's."""
    if ProcessState.collector:
        ProcessState.collector.take(report)
    else:
        runner = ProcessState.outbox.environment.runner
        assert isinstance(runner, WorkerRunner), "only a worker has no collector"
        runner.send_message("report", report)


@events.user_error.add_listener
def broken(exception: Exception, **_: Any) -> None:
    """Locust logs what a task raises and runs the task again: here it is our own bug, and ends the run."""
    ProcessState.player.bugs.append("".join(traceback.format_exception(exception)))


def end(environment: Environment, **_: Any) -> None:
    """Let what still runs end, and report it."""
    runner = environment.runner
    assert runner is not None, "it was there when this was registered"
    runner.stop()
    if ProcessState.jobs:
        ProcessState.outbox.flush()


def end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone: nobody would judge its rows."""
    while os.getppid() == parent:
        gevent.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
