"""What Locust runs: users that are sources of arrivals, and how their records reach one file.

`python -m loadtest` starts it (see loadtest/launch.py) with the results directory in COUNSEL_LOADTEST. Locust's own
statistics only feed the live page: they are rounded to two digits, and their rates wait for replies.

A process is the leader (it has a Collector), a sender (it has a Sender), or, if it is the only one, both:

  leader: share -> worker                     when the test starts: the worker's share of the plan
  worker: ask -> leader, leader: time -> worker    a few times: the leader's time (see loadtest/clock.py)
  worker: aligned -> leader                   once that is enough
  leader: begin -> worker                     when all are aligned: the run begins at this time
  worker: report -> leader                    twice a second: records and self-observations
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
from loadtest.dispatcher import Dispatcher
from loadtest.scenario import read_scenario
from loadtest.stream import make_stream_client, rehearse
from loadtest.workload import Arrival

# One line per request otherwise.
logging.getLogger("httpx2").setLevel(logging.WARNING)

# Seconds without a heartbeat after which a worker counts as lost. Locust's default of three can pass on a busy machine
# while a worker connects. A worker that is really lost still makes the run invalid.
runners.HEARTBEAT_LIVENESS = 15

# Seconds between announcing the start of the run and the start, so that every worker has heard of it.
_LEAD_S = 0.2

DIRECTORY = Path(os.environ["COUNSEL_LOADTEST"])
SCENARIO = read_scenario(DIRECTORY)
# Read here and not in a listener: a worker may start as soon as it has joined, and forked workers share this.
PLAN = [Arrival.from_json(line) for line in read_jsonl(DIRECTORY / "plan.jsonl")]
PROMPTS = [line["question"] for line in read_jsonl(DIRECTORY / "prompts.jsonl")]
rehearse(SCENARIO)
# All of this lives until the end. Without freezing it, each full garbage collection would stop the hub to scan it.
gc.freeze()


class Sender:
    """The sending side of this process, for one start of the test; Locust's page can start a test again."""

    def __init__(self, environment: Environment, worker: int) -> None:
        self.dispatcher = Dispatcher(
            SCENARIO, PLAN, PROMPTS, make_stream_client(SCENARIO.url, SCENARIO.reuse), worker,
            lambda record: self.outbox.add(record),
        )  # fmt: skip
        self.outbox = Outbox(environment, self.dispatcher, deliver)
        self.clock = Clock()
        self.started = Event()
        # Numbers of the users that are sending: each takes the lowest free one.
        self.active_users: set[int] = set()
        self._jobs = (gevent.spawn(self.outbox.run), gevent.spawn(self.outbox.observe, self.started))

    def start(self, start_s: float) -> None:
        """Start the clock of the run, and the users that wait for it."""
        self.dispatcher.start_s = start_s
        self.started.set()

    def close(self) -> None:
        gevent.killall(self._jobs)


class ProcessState:
    """The state of this process. Locust's listeners are functions of this module, so it is global: see STATE."""

    def __init__(self) -> None:
        self.worker = 0  # its share of the plan
        self.sender: Sender | None = None  # None in a master, and before a test starts
        self.collector: Collector | None = None  # None in a worker
        self.aligned: set[str] = set()  # in a master, the workers that know its clock

    def the_sender(self) -> Sender:
        assert self.sender, "a test has started, and this process is not a master"
        return self.sender


STATE = ProcessState()


class ArrivalSource(User):
    """A source of arrivals, or in a closed loop one client; see loadtest/dispatcher.py."""

    @task
    def send(self) -> None:
        """Send this user's share of the plan, then wait for requests that are still running."""
        sender = STATE.the_sender()
        active = sender.active_users
        number = next(number for number in range(len(active) + 1) if number not in active)
        if number and not SCENARIO.closed and not SCENARIO.web:
            # Locust gives the users of a lost worker to the others; sending here would double this worker's share.
            raise StopUser
        active.add(number)
        sender.started.wait()
        gevent.sleep(max(-sender.dispatcher.now_s(), 0))
        try:
            if SCENARIO.closed:
                sender.dispatcher.run_closed(self._stopping)
            else:
                sender.dispatcher.run_open(number * SCENARIO.workers + STATE.worker, self._stopping)
            if active == {number}:
                sender.dispatcher.drain()
        finally:
            active.remove(number)
            sender.outbox.finished = not active
        raise StopUser

    def _stopping(self) -> bool:
        return self._state == LOCUST_STATE_STOPPING


@events.init.add_listener
def set_up_process(environment: Environment, **_: Any) -> None:
    """Register the messages of the table above, and make the collector unless this is a worker."""
    runner = environment.runner
    gevent.spawn(end_with_parent, os.getppid())
    # Here and not at import: the last listener is called first, and Locust's own disconnects from the master.
    environment.events.quitting.add_listener(send_last_report)
    if isinstance(runner, WorkerRunner):
        runner.register_message("share", lambda msg, **_: setattr(STATE, "worker", msg.data["number"]))
        runner.register_message("time", lambda msg, **_: take_time(runner, **msg.data))
        runner.register_message("begin", lambda msg, **_: begin_worker(msg.data["leader_s"]))
        return
    collector = STATE.collector = Collector(environment, DIRECTORY, SCENARIO.workers)
    if isinstance(runner, MasterRunner):
        runner.register_message("report", lambda msg, **_: collector.take(msg.data))
        runner.register_message("ask", lambda msg, **_: send_time(runner, msg.node_id, msg.data["asked_s"]))
        runner.register_message("aligned", lambda msg, **_: begin_if_aligned(runner, collector, msg.node_id))


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    """Start with a new sender and empty files. A single process begins at once, workers when all clocks are aligned."""
    runner = environment.runner
    if STATE.collector:
        STATE.collector.restart()
    if isinstance(runner, MasterRunner):
        STATE.aligned = set()
        assign_shares(runner)
        return
    if STATE.sender:
        STATE.sender.close()
    sender = STATE.sender = Sender(environment, STATE.worker)
    if isinstance(runner, WorkerRunner):
        ask_time(runner, sender)
    else:
        assert STATE.collector, "a process that is not a worker has a collector"
        now_s = time.monotonic()
        STATE.collector.begin(now_s)
        sender.start(now_s)


def assign_shares(runner: MasterRunner) -> None:
    """Send each worker its share of the plan, before the start message.

    Locust's own numbers of the workers do not work here: a worker that left before the start leaves a gap in them.
    """
    ready = runner.clients.ready
    for number, node in enumerate(ready):
        runner.send_message("share", {"number": number}, client_id=node.id)
    if len(ready) != SCENARIO.workers:
        assert STATE.collector, "a master has a collector"
        STATE.collector.abort(f"{len(ready)} workers joined a run for {SCENARIO.workers}; stop the extra ones")


def ask_time(runner: WorkerRunner, sender: Sender) -> bool:
    """Ask the leader for its time; whether another question was needed."""
    return sender.clock.ask(lambda asked_s: runner.send_message("ask", {"asked_s": asked_s}))


def send_time(runner: MasterRunner, worker: str, asked_s: float) -> None:
    """Answer a worker with the leader's time."""
    runner.send_message("time", {"asked_s": asked_s, "leader_s": time.monotonic()}, client_id=worker)


def take_time(runner: WorkerRunner, asked_s: float, leader_s: float) -> None:
    """Take the leader's answer; ask again, or report that this clock is aligned."""
    sender = STATE.the_sender()
    sender.clock.answer(asked_s, leader_s)
    if not ask_time(runner, sender):
        sender.outbox.clock_error_s = sender.clock.error_s
        runner.send_message("aligned")


def begin_if_aligned(runner: MasterRunner, collector: Collector, worker: str) -> None:
    """Once every worker is aligned, tell all of them when the run begins."""
    STATE.aligned.add(worker)
    if len(STATE.aligned) == SCENARIO.workers:
        leader_s = time.monotonic() + _LEAD_S
        collector.begin(leader_s)
        for each in STATE.aligned:
            runner.send_message("begin", {"leader_s": leader_s}, client_id=each)


def begin_worker(leader_s: float) -> None:
    """Begin the run at `leader_s` on the leader's clock."""
    sender = STATE.the_sender()
    sender.start(sender.clock.here(leader_s))


def deliver(report: dict[str, Any]) -> None:
    """Pass a report to the collector, in this process or in the master."""
    if STATE.collector:
        STATE.collector.take(report)
    else:
        runner = STATE.the_sender().outbox.environment.runner
        assert isinstance(runner, WorkerRunner), "only a worker has no collector"
        runner.send_message("report", report)


@events.user_error.add_listener
def record_bug(exception: Exception, **_: Any) -> None:
    """Locust would log what a task raises and run the task again. Here it is a bug of ours, and ends the run."""
    STATE.the_sender().dispatcher.tracebacks.append("".join(traceback.format_exception(exception)))


def send_last_report(environment: Environment, **_: Any) -> None:
    """Let running requests end, and report them."""
    runner = environment.runner
    assert runner is not None, "there is a runner since `set_up_process`"
    runner.stop()
    if STATE.sender:
        STATE.sender.outbox.flush()


def end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone: nothing would judge its records."""
    while os.getppid() == parent:
        gevent.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
