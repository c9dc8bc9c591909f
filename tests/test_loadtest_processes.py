"""Runs of several processes: workers that join a run, Locust's page, Ctrl-C, and a full disk."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counsel.errors import UserError
from loadtest.dispatcher import Dispatcher
from loadtest.launch import worker_argv
from loadtest.records import RequestRecord, read_records
from loadtest.scenario import Scenario
from loadtest.stream import make_stream_client
from loadtest.verdict import EXIT_STATUS
from loadtest.workload import Arrival
from tests.sse_server import arrivals, counts, standin
from tests.test_layout import ROOT
from tests.test_loadtest import LOAD
from tests.waiting import until

# A busy machine may make the client late, and then these checks fail; no other may.
LOAD_CHECKS = ("schedule_lag_s", "clock_error_s", "hub_lag_p50_s", "hub_lag_s", "client_cpu")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start `python -m loadtest` with these words in a folder with one question; kill it after the test."""
    (tmp_path / "q.jsonl").write_text('{"question": "How are you?"}\n')
    begun: list[subprocess.Popen] = []

    def run(*words: str, file_limit: int = resource.RLIM_INFINITY) -> subprocess.Popen:
        def limited() -> None:
            # If the tests run in the background, Ctrl-C is ignored there, and would be here.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "loadtest", *words], cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                preexec_fn=limited,
            )
        )  # fmt: skip
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def port() -> Iterator[int]:
    """A port for this test alone: it is bound here, so that the system gives it to no other process.

    Nothing listens on it here, so that with SO_REUSEADDR on both sides the command can.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield int(kept.getsockname()[1])


def wait_for_line(process: subprocess.Popen, words: str) -> str:
    """The first line of its stderr that contains `words`."""
    assert process.stderr is not None
    line = next((line for line in process.stderr if words in line), None)
    assert line, f"it ended without {words!r}"
    return line


def run_with_workers(start: Any, port: int, url: str, slo: str) -> tuple[subprocess.Popen, str, str, list[Any]]:
    """A run with two workers that join it: the leader, its output, and both workers."""
    leader = start(
        "--prompts", "q.jsonl", "--out", "out", "--url", url, *LOAD, "--workers", "2", "--bind", f"127.0.0.1:{port}",
        "--slo", slo,
    )  # fmt: skip
    command = wait_for_line(leader, "waiting for 2 workers").split("python -m loadtest ")[1]
    workers = [start(*command.split()) for _ in range(2)]
    out, err = leader.communicate(timeout=900)
    for worker in workers:
        worker.communicate(timeout=900)
    return leader, out, err, workers


def valid_but_for_load(summary: dict[str, Any]) -> bool:
    """Whether a run is valid, apart from what a busy machine does to it."""
    return all(check["held"] or check["name"] in LOAD_CHECKS for check in summary["checks"])


def test_workers_that_join_share_one_run(tmp_path, start, port):
    """A run with two workers that join it: every arrival is sent once, by its own worker, into one file."""
    with standin("base", "gentle.first-30") as url:
        leader, out, err, workers = run_with_workers(start, port, url, slo="error_rate <= 0")
        counted = counts(url)

    *text, last = out.strip().split("\n")
    summary = json.loads(last)
    records = read_records(tmp_path / "out/requests.jsonl")
    plan = [json.loads(line) for line in (tmp_path / "out/plan.jsonl").read_text().splitlines()]
    assert valid_but_for_load(summary), err
    assert sorted((record.id, record.model) for record in records) == [
        (arrival["id"], arrival["model"]) for arrival in plan
    ]
    assert {(record.worker, record.id % 2) for record in records} == {(0, 0), (1, 1)}
    assert {record.outcome for record in records} == {"ok"}
    assert counted["requests"] == Counter(record.model for record in records)
    assert f"verdict: {summary['verdict']}" in text
    assert leader.returncode == EXIT_STATUS[summary["verdict"]]
    assert [worker.returncode for worker in workers] == [0, 0]


@pytest.mark.slow
def test_failures_do_not_fail_a_worker(start, port):
    """Every request fails: that is for the run to judge (exit 3), and the workers exit 0."""
    with standin("base.status-503") as url:
        leader, out, err, workers = run_with_workers(start, port, url, slo="error_rate <= 0.01")

    summary = json.loads(out.strip().split("\n")[-1])
    assert valid_but_for_load(summary), err
    assert set(summary["all"]["outcomes"]) == {"http_error"}
    assert leader.returncode == EXIT_STATUS[summary["verdict"]] != 0
    assert [worker.returncode for worker in workers] == [0, 0]


@pytest.mark.parametrize("text", ["5557", ":5557", "host:", "host:port", "host:99999"])
def test_an_address_needs_both_halves(text):
    """One line gives the form, for the run and for the worker."""
    with pytest.raises(UserError, match="the form is HOST:PORT"):
        Scenario(bind=text)
    with pytest.raises(UserError, match="the form is HOST:PORT"):
        worker_argv(Path("out"), text)


def test_a_source_that_joins_late_does_not_catch_up(monkeypatch):
    """Ten seconds into the run it sends what was due up to a second ago and what comes, not a flood of the rest."""
    plan = [Arrival(n, due_s, "base", (0,), 2, 0.0, None, ()) for n, due_s in enumerate((0.0, 8.9, 9.0, 9.5, 10.1))]
    records: list[RequestRecord] = []
    clock = SimpleNamespace(now_s=10.0, sleeps_s=[])

    def sleep(seconds: float) -> None:
        clock.sleeps_s.append(seconds)
        clock.now_s += seconds

    # Only these sleeps move the clock.
    monkeypatch.setattr(Dispatcher, "now_s", lambda _: clock.now_s)
    monkeypatch.setattr("loadtest.dispatcher.gevent", SimpleNamespace(sleep=sleep))
    with standin("base") as url, make_stream_client(url) as client:
        dispatcher = Dispatcher(Scenario(url=url, duration_s=20), plan, ["hi"], client, 0, records.append)
        dispatcher.run_open(0, lambda: False)
        dispatcher.drain()

    assert sorted((record.id, record.outcome) for record in records) == [(2, "ok"), (3, "ok"), (4, "ok")]
    assert clock.sleeps_s == [pytest.approx(0.1)]


def test_a_plan_that_is_repeated_has_new_prompts(monkeypatch):
    """A closed loop repeats a plan of two for a minute; the server sees no prompt twice."""
    plan = [Arrival(n, 0.0, "base", (n,), 2, 0.0, None, ()) for n in range(2)]
    clock = SimpleNamespace(now_s=0.0)

    def now_s(_: Dispatcher) -> float:
        clock.now_s += 1
        return clock.now_s

    monkeypatch.setattr(Dispatcher, "now_s", now_s)
    with standin("base") as url, make_stream_client(url) as client:
        dispatcher = Dispatcher(
            Scenario(url=url, arrivals="closed", concurrency=1), plan, ["a", "b"], client, 0, lambda _: None
        )
        dispatcher.run_closed(lambda: False)
        served, prompts = counts(url)["requests"]["base"], arrivals(url)

    assert served > 4
    assert len(prompts) == served


def page(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=300) as response:
        return json.load(response)


def rows_on_page(port: int, n: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The table of Locust's page by type and model, once it counts at least `n` replies of each of two models."""
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def shown() -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            found.update(
                {(record["method"], record["name"]): record for record in page(port, "/stats/requests")["stats"]}
            )
        replies = [record["num_requests"] for (method, _), record in found.items() if method == "reply"]
        return len(replies) == 2 and min(replies) >= n

    until(shown)
    return found


def test_the_page_shows_each_adapter_and_ctrl_c_ends_with_the_report(tmp_path, start, port):
    """The plan is sent and shown. Ctrl-C to the command ends Locust, and the run is judged and reported."""
    with standin("base", "gentle.first-300") as url:
        run = start(
            "--prompts", "q.jsonl", "--out", "out", "--url", url, *LOAD, "--mix", "weights(base=1, gentle.first-300=1)",
            "--web", "--web-port", str(port), "--slo", "error_rate <= 0",
        )  # fmt: skip
        wait_for_line(run, "live page")
        n_planned = len((tmp_path / "out/plan.jsonl").read_text().splitlines())
        found = rows_on_page(port, 5)
        until(lambda: page(port, "/stats/requests")["state"] == "stopped")
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=900)

    summary = json.loads(out.strip().split("\n")[-1])
    assert {("reply", "base"), ("first token", "base"), ("reply", "gentle.first-300")} <= set(found)
    # Locust rounds to two digits.
    assert found["first token", "gentle.first-300"]["median_response_time"] >= 290
    assert valid_but_for_load(summary), err
    assert summary["all"]["outcomes"] == {"ok": n_planned}
    assert run.returncode == EXIT_STATUS[summary["verdict"]]
    assert (tmp_path / "out/report.html").is_file()


TORN = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from loadtest.collector import Collector

there = SimpleNamespace(process_exit_code=None, runner=SimpleNamespace(quit=lambda: None), web_ui=None)
collector = Collector(there, Path(sys.argv[1]), 1)
collector.restart()
report = {"worker": 0, "seconds": [], "done": 1, "failed": 0, "tokens": 1, "due": 1, "in_flight": 0, "tracebacks": [],
          "finished": False}
collector.take({**report, "records": ['{"id": 1}']})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
collector.take({**report, "records": ['{"id": 2}']})
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
collector.take({**report, "records": ['{"id": 3}']})
"""


def test_nothing_is_written_after_a_line_that_a_full_disk_cut_off(tmp_path):
    """There is space again for the next report, but after half a line it could not be read."""
    done = subprocess.run([sys.executable, "-c", TORN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "free some space" in done.stderr
    assert (tmp_path / "requests.jsonl").read_text() == '{"id": 1}\n{"id"'


@pytest.mark.parametrize("web", [True, False], ids=["page", "headless"])
def test_ctrl_c_keeps_what_was_recorded_and_is_invalid(tmp_path, start, port, web):
    """Stopped with requests in flight: they finish and are recorded, the report is written, the run is invalid."""
    with standin("base.holds-10", "gentle.holds-10") as url:
        run = start(
            "--prompts", "q.jsonl", "--out", "out", "--url", url, "--rate", "20", "--duration-s", "900",
            "--idle-timeout-s", "3600", "--request-timeout-s", "3600",
            *(("--web", "--web-port", str(port)) if web else ()),
        )  # fmt: skip
        if web:
            wait_for_line(run, "live page")
            rows_on_page(port, 10)
        until(lambda: len(counts(url)["requests"]) == 2)
        until(lambda: max(counts(url)["requests"].values()) > 10)
        run.send_signal(signal.SIGINT)
        wait_for_line(run, "waiting for running requests")
        # The test passes without this second; it makes a drain that gives up held requests fail.
        time.sleep(1)
        urllib.request.urlopen(url.replace("/v1", "/release")).close()
        out, err = run.communicate(timeout=900)
        counted = counts(url)

    assert run.returncode == 4, err
    summary = json.loads(out.strip().split("\n")[-1])
    records = read_records(tmp_path / "out/requests.jsonl")
    assert any("sent_share" in reason for reason in summary["invalid"])
    assert web or "it was stopped with Ctrl-C" in summary["invalid"]
    assert {record.outcome for record in records} == {"ok"}
    assert Counter(record.model for record in records) == counted["requests"]
    assert max(counted["requests"].values()) > 10
    assert counted["hung_up"] == 0
    assert (tmp_path / "out/report.html").is_file()


def test_a_full_disk_ends_the_run_with_an_error(tmp_path, start):
    """No file may exceed 200 kB, which the records reach: a run of a quarter of an hour ends there."""
    with standin("base") as url:
        run = start(
            "--prompts", "q.jsonl", "--out", "out", "--url", url, "--rate", "60", "--duration-s", "900", "--requests",
            "400", "--output-tokens", "200", file_limit=200_000,
        )  # fmt: skip
        _, err = run.communicate(timeout=900)

    assert run.returncode == 1, err
    assert "requests.jsonl': File too large; free some space" in err
    assert err.strip().split("\n")[-1].startswith("error: the run in out was aborted")
    assert "Traceback" not in err
