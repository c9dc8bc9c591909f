"""How the records and self-observations of every Locust process reach two files, written by one process.

requests.jsonl: see loadtest/records.py. start.json: mono_s and unix_s, the start of the run on the monotonic and the
wall clock. client.jsonl has one object per process and second: what the client observed about itself.
  worker           the process
  t_s              end of that second, after the start of the run
  due, in_flight   arrivals due so far; requests running now
  hub_lag_s        longest delay in waking a sleeping greenlet: the largest error of a timestamp
  hub_lag_p50_s    median of these delays: the typical error of a timestamp
  cpu              processor seconds used per second (1.0: a whole core; one process cannot use more)
  clock_error_s    how far its clock of the run may differ from the leader's (see loadtest/clock.py)
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust.env import Environment
from locust.runners import MasterRunner

from loadtest.dispatcher import Dispatcher
from loadtest.launch import ABORTED
from loadtest.records import RequestRecord

_FLUSH_S = 0.5
_NAP_S = 0.02
_PROGRESS_S = 5.0


class Outbox:
    """What one process has to report; `flush` delivers it to the collector, in this process or in the master."""

    def __init__(
        self, environment: Environment, dispatcher: Dispatcher, deliver: Callable[[dict[str, Any]], None]
    ) -> None:
        self.finished = False
        self.clock_error_s = 0.0
        self.environment = environment
        self._dispatcher = dispatcher
        self._deliver = deliver
        self._records: list[RequestRecord] = []
        self._seconds: list[dict[str, Any]] = []

    def add(self, record: RequestRecord) -> None:
        """Take a finished request, and show it and its first token in Locust's live table."""
        self._records.append(record)
        fire = self.environment.events.request.fire
        failure = None if record.outcome in ("ok", "cancelled") else RuntimeError(record.outcome)
        took_ms = 1000 * ((record.end_s or record.due_s) - record.due_s)
        fire(request_type="reply", name=record.model, response_time=took_ms,
             response_length=record.completion_tokens or 0, exception=failure, context={})  # fmt: skip
        if record.ttft_s is not None:
            fire(request_type="first token", name=record.model, response_time=1000 * record.ttft_s, response_length=0,
                 exception=None, context={})  # fmt: skip

    def flush(self) -> None:
        """Deliver everything since the last flush, and whether this process has finished."""
        records, self._records = self._records, []
        seconds, self._seconds = self._seconds, []
        self._deliver(
            {
                "worker": self._dispatcher.worker,
                "records": [record.to_json() for record in records],
                "seconds": seconds,
                "done": len(records),
                "failed": sum(record.outcome not in ("ok", "cancelled") for record in records),
                "tokens": sum(record.completion_tokens or 0 for record in records),
                "due": self._dispatcher.due_so_far,
                "in_flight": self._dispatcher.in_flight,
                "finished": self.finished,
                "tracebacks": self._dispatcher.tracebacks,
            }
        )

    def run(self) -> None:
        """Flush twice a second, forever."""
        while True:
            gevent.sleep(_FLUSH_S)
            self.flush()

    def observe(self, started: Event) -> None:
        """Observe this process forever, once the run has `started`: how late sleepers wake up, and processor use."""
        started.wait()
        late_s: list[float] = []
        second_end = time.monotonic() + 1
        cpu_s, since = _cpu_s(), time.monotonic()
        while True:
            before = time.monotonic()
            gevent.sleep(_NAP_S)
            now = time.monotonic()
            late_s.append(now - before - _NAP_S)
            if now >= second_end:
                used_s = _cpu_s()
                self._seconds.append(
                    {
                        "worker": self._dispatcher.worker,
                        "t_s": round(self._dispatcher.now_s(), 3),
                        "due": self._dispatcher.due_so_far,
                        "in_flight": self._dispatcher.in_flight,
                        "hub_lag_s": round(max(late_s), 6),
                        "hub_lag_p50_s": round(statistics.median(late_s), 6),
                        "cpu": round((used_s - cpu_s) / (now - since), 4),
                        "clock_error_s": round(self.clock_error_s, 6),
                    }
                )
                late_s, second_end, cpu_s, since = [], now + 1, used_s, now


class Collector:
    """Writes the reports of all processes, shows progress, and stops Locust when every process has finished.

    Locust is stopped once: when the last process has finished, or at the first error (`abort`). Reports that arrive
    after that are still written, unless writing is what failed.
    """

    def __init__(self, environment: Environment, directory: Path, processes: int) -> None:
        self._environment = environment
        self._requests = directory / "requests.jsonl"
        self._client = directory / "client.jsonl"
        self._start = directory / "start.json"
        self._processes = processes
        self._reset()

    def _reset(self) -> None:
        self._latest: dict[int, Mapping[str, Any]] = {}
        self._done = self._failed = self._tokens = 0
        self._started_at = self._shown_at = time.monotonic()
        self._stopped = self._write_failed = False

    def restart(self) -> None:
        """Start with empty files: a test that is started again on Locust's page replaces the one before."""
        self._reset()
        for path in (self._requests, self._client):
            path.write_text("", encoding="utf-8")

    def begin(self, start_s: float) -> None:
        """Write when the run starts; the process that reads /metrics on this machine aligns its samples to it."""
        unix_s = time.time() + start_s - time.monotonic()
        self._start.write_text(json.dumps({"mono_s": start_s, "unix_s": unix_s}), encoding="utf-8")

    def take(self, report: Mapping[str, Any]) -> None:
        """Write a report of one process. Stop after the last one, after a bug of ours, or if it cannot be written."""
        if self._write_failed:
            # Behind a line that was cut off, further lines could not be read.
            return
        for path, lines in ((self._requests, report["records"]), (self._client, map(json.dumps, report["seconds"]))):
            try:
                _append_lines(path, lines)
            except OSError as error:
                self._write_failed = True
                self.abort(f"cannot write {str(path)!r}: {error.strerror}; free some space, and run it again")
                return
        self._latest[report["worker"]] = report
        self._done += report["done"]
        self._failed += report["failed"]
        self._tokens += report["tokens"]
        if self._stopped:
            return
        if report["tracebacks"]:
            self.abort(report["tracebacks"][0])
        elif self._all_finished():
            self._show_progress()
            self._stop()
        elif time.monotonic() - self._shown_at >= _PROGRESS_S:
            self._show_progress()

    def abort(self, reason: str) -> None:
        """Stop a run that went wrong: print why, and let Locust exit with a status that says so."""
        if self._stopped:
            return
        print(reason, file=sys.stderr)
        self._environment.process_exit_code = ABORTED
        self._stop()

    def _all_finished(self) -> bool:
        """Whether every process has finished, except those that were lost."""
        finished = sum(bool(report["finished"]) for report in self._latest.values())
        return finished >= self._processes - self._lost_workers()

    def _lost_workers(self) -> int:
        """Workers that have reported and are gone. The verdict notices them by their missing requests and seconds."""
        runner = self._environment.runner
        if not isinstance(runner, MasterRunner) or len(self._latest) < self._processes:
            return 0
        return max(self._processes - runner.worker_count, 0)

    def _stop(self) -> None:
        self._stopped = True
        # In a separate greenlet: stopping waits for users and workers, whose reports still arrive here.
        gevent.spawn(self._stop_locust)

    def _stop_locust(self) -> None:
        runner = self._environment.runner
        assert runner is not None, "a run has started"
        if self._environment.web_ui is None or self._environment.process_exit_code:
            runner.quit()
        else:
            # The page stays open until Ctrl-C.
            runner.stop()

    def _show_progress(self) -> None:
        self._shown_at = time.monotonic()
        elapsed_s = self._shown_at - self._started_at
        due = sum(report["due"] for report in self._latest.values())
        running = sum(report["in_flight"] for report in self._latest.values())
        print(
            f"{elapsed_s:5.0f} s  {due} due  {self._done} done  {self._failed} failed  {running} running  "
            f"{self._tokens / elapsed_s:.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )


def _append_lines(path: Path, lines: Iterable[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
