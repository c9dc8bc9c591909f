"""How rows and self-observation of every Locust process reach two files, written by one process.

requests.jsonl: see loadtest/records.py. start.json: mono_s and unix_s, the start of the run by the monotonic and the
wall clock. client.jsonl, one object per process and second: what the client saw of itself.
  worker           the process
  t_s              end of that second, after the start of the run
  due, in_flight   arrivals that have come due so far; requests running now
  hub_lag_s        longest time by which a sleeping greenlet woke late: how wrong a timestamp may be
  hub_lag_p50_s    the median of such times: how wrong timestamps usually are
  cpu              processor seconds used per second (1.0: a whole core; one process cannot use more)
  clock_error_s    how far its clock of the run may be from the leader's (see loadtest/clock.py)
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust.env import Environment
from locust.runners import MasterRunner

from loadtest.dispatcher import Player
from loadtest.launch import GIVEN_UP
from loadtest.records import Row

_FLUSH_S = 0.5
_NAP_S = 0.02
_PROGRESS_S = 5.0


class Outbox:
    """What one process has to report; `flush` brings it to the collector, here or in the master."""

    def __init__(self, environment: Environment, player: Player, deliver: Callable[[dict[str, Any]], None]) -> None:
        self.finished = False
        self.clock_error_s = 0.0
        self.environment = environment
        self._player = player
        self._deliver = deliver
        self._rows: list[Row] = []
        self._seconds: list[dict[str, Any]] = []

    def add(self, row: Row) -> None:
        """Take a finished row, and show it in Locust's live table: the request, and its first token."""
        self._rows.append(row)
        fire = self.environment.events.request.fire
        failure = None if row.outcome in ("ok", "cancelled") else RuntimeError(row.outcome)
        took_ms = 1000 * ((row.end_s or row.due_s) - row.due_s)
        fire(request_type="reply", name=row.model, response_time=took_ms,
             response_length=row.completion_tokens or 0, exception=failure, context={})  # fmt: skip
        if row.ttft_s is not None:
            fire(request_type="first token", name=row.model, response_time=1000 * row.ttft_s, response_length=0,
                 exception=None, context={})  # fmt: skip

    def flush(self) -> None:
        """Deliver everything since the last flush, with whether this process is done."""
        rows, self._rows = self._rows, []
        seconds, self._seconds = self._seconds, []
        self._deliver(
            {
                "worker": self._player.worker,
                "rows": [row.to_json() for row in rows],
                "seconds": seconds,
                "done": len(rows),
                "failed": sum(row.outcome not in ("ok", "cancelled") for row in rows),
                "tokens": sum(row.completion_tokens or 0 for row in rows),
                "due": self._player.due_so_far,
                "in_flight": self._player.in_flight,
                "finished": self.finished,
                "bugs": self._player.bugs,
            }
        )

    def run(self) -> None:
        """Flush for ever, twice a second."""
        while True:
            gevent.sleep(_FLUSH_S)
            self.flush()

    def observe(self, begun: Event) -> None:
        """Once the run has `begun`, watch this process for ever: how late the hub wakes sleepers, its processor use."""
        begun.wait()
        late_s: list[float] = []
        second_end = time.monotonic() + 1
        cpu_s, since = _cpu_s(), time.monotonic()
        while True:
            asked = time.monotonic()
            gevent.sleep(_NAP_S)
            now = time.monotonic()
            late_s.append(now - asked - _NAP_S)
            if now >= second_end:
                used_s = _cpu_s()
                self._seconds.append(
                    {
                        "worker": self._player.worker,
                        "t_s": round(self._player.now_s(), 3),
                        "due": self._player.due_so_far,
                        "in_flight": self._player.in_flight,
                        "hub_lag_s": round(max(late_s), 6),
                        "hub_lag_p50_s": round(statistics.median(late_s), 6),
                        "cpu": round((used_s - cpu_s) / (now - since), 4),
                        "clock_error_s": round(self.clock_error_s, 6),
                    }
                )
                late_s, second_end, cpu_s, since = [], now + 1, used_s, now


class Collector:
    """Writes the reports of all processes, shows progress, and ends the run when every process is done."""

    def __init__(self, environment: Environment, directory: Path, processes: int) -> None:
        self._environment = environment
        self._requests = directory / "requests.jsonl"
        self._client = directory / "client.jsonl"
        self._start = directory / "start.json"
        self._processes = processes
        self._begin()

    def _begin(self) -> None:
        self._latest: dict[int, Mapping[str, Any]] = {}
        self._done = self._failed = self._tokens = 0
        self._begun = self._shown = time.monotonic()
        self._ended = self._torn = False

    def restart(self) -> None:
        """Start with empty files: a test started anew on the page replaces the one before."""
        self._begin()
        for path in (self._requests, self._client):
            path.write_text("", encoding="utf-8")

    def begin(self, start_s: float) -> None:
        """Note when the run begins, for the process that reads /metrics on this machine and puts its samples beside."""
        unix_s = time.time() + start_s - time.monotonic()
        self._start.write_text(json.dumps({"mono_s": start_s, "unix_s": unix_s}), encoding="utf-8")

    def take(self, report: Mapping[str, Any]) -> None:
        """Write one process's report down; end the run when it was the last one due, or cannot be written."""
        if self._torn:
            # What is written behind a torn row would be lost with it, and the whole file with both.
            return
        for path, lines in ((self._requests, report["rows"]), (self._client, map(json.dumps, report["seconds"]))):
            text = "".join(line + "\n" for line in lines)
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                self._torn = True
                self.give_up(f"cannot write {str(path)!r}: {error.strerror}; free some space, and run it again")
                return
        self._latest[report["worker"]] = report
        self._done += report["done"]
        self._failed += report["failed"]
        self._tokens += report["tokens"]
        if not self._ended and time.monotonic() - self._shown >= _PROGRESS_S:
            self._show()
        if report["bugs"]:
            self.give_up(report["bugs"][0])
        finished = sum(bool(latest["finished"]) for latest in self._latest.values())
        if not self._ended and finished >= self._processes - self._lost():
            self._ended = True
            self._show()
            gevent.spawn(self._end)

    def give_up(self, reason: str) -> None:
        """End the run as one that went wrong: say why, and let Locust end with a status that says so."""
        if self._ended:
            return
        print(reason, file=sys.stderr)
        self._environment.process_exit_code = GIVEN_UP
        self._ended = True
        gevent.spawn(self._end)

    def _lost(self) -> int:
        """Workers that were there and are gone; the verdict finds them by their missing rows and seconds."""
        runner = self._environment.runner
        if not isinstance(runner, MasterRunner) or len(self._latest) < self._processes:
            return 0
        return max(self._processes - runner.worker_count, 0)

    def _end(self) -> None:
        runner = self._environment.runner
        assert runner is not None, "a run has begun"
        if self._environment.web_ui is None or self._environment.process_exit_code:
            runner.quit()
        else:
            runner.stop()

    def _show(self) -> None:
        self._shown = time.monotonic()
        passed_s = self._shown - self._begun
        due = sum(latest["due"] for latest in self._latest.values())
        running = sum(latest["in_flight"] for latest in self._latest.values())
        print(
            f"{passed_s:5.0f} s  {due} due  {self._done} done  {self._failed} failed  {running} running  "
            f"{self._tokens / passed_s:.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
