"""`python -m loadtest` as a user runs it, with Locust, against the stand-in."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from counsel.files import read_jsonl
from loadtest.prepare import prepare_run
from loadtest.records import read_records
from loadtest.scenario import Scenario
from loadtest.verdict import EXIT_STATUS
from tests.sse_server import arrivals, standin

# 40 requests in 2 s. None is due in the first 2.5 s, because a source that starts late skips what was due before. Many
# seconds follow the last one, because what is sent after the end of the schedule does not count as sent.
LOAD = ("--arrivals", "constant", "--rate", "spike(0.001, 20, 2.5, 4.5)", "--duration-s", "60")
N_PLANNED = 40
QUESTIONS = ["I feel lonely since we moved.", "Work is hard and I cannot sleep.", "My friend is angry with me."]


def loadtest(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """Run the command with the questions above, in `tmp_path`."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    command = [sys.executable, "-m", "loadtest", "--prompts", "q.jsonl", "--out", "out", *words]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)


def test_a_run_sends_its_plan_and_reports_the_replies(tmp_path):
    """Every planned arrival is one record of its model; the table, the last line and the files agree."""
    with standin("base", "gentle.first-30.gap-2") as url:
        done = loadtest(tmp_path, "--url", url, *LOAD, "--output-tokens", "8")

    *text, last = done.stdout.strip().split("\n")
    summary = json.loads(last)
    plan = [json.loads(line) for line in (tmp_path / "out/plan.jsonl").read_text().splitlines()]
    records = read_records(tmp_path / "out/requests.jsonl")
    assert done.returncode in (0, 4), done.stderr  # a busy machine may make the client late, and the run invalid
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert sorted((record.id, record.model) for record in records) == [
        (arrival["id"], arrival["model"]) for arrival in plan
    ]
    assert {record.outcome for record in records} == {"ok"}
    assert {name: found["n"] for name, found in summary["models"].items()} == Counter(
        record.model for record in records
    )
    assert summary["all"]["completion_tokens"] == 8 * len(plan)
    for name, found in summary["models"].items():
        middle_s = median(record.ttft_s for record in records if record.model == name)
        assert found["ttft_s"]["p50"] == pytest.approx(middle_s, rel=1e-3)
    assert any(line.startswith("gentle.first-30.gap-2") for line in text)


def test_records_arrive_from_two_workers(tmp_path):
    """Two Locust processes share the plan: every arrival once, some from each, and on one clock.

    On the server's clock each request arrived after it was sent and before its first token, in either process.
    """
    with standin("base") as url:
        done = loadtest(tmp_path, "--url", url, *LOAD, "--workers", "2")
        arrived = arrivals(url)

    records = read_records(tmp_path / "out/requests.jsonl")
    assert done.returncode in (0, 4), done.stderr
    assert sorted(record.id for record in records) == list(range(N_PLANNED))
    assert {record.worker for record in records} == {0, 1}
    assert {record.id % 2 == record.worker % 2 for record in records} != {True, False}
    texts = [line["question"] for line in read_jsonl(tmp_path / "out/prompts.jsonl")]
    prompts = {arrival["id"]: texts[arrival["prompts"][0]] for arrival in read_jsonl(tmp_path / "out/plan.jsonl")}
    start_s = json.loads((tmp_path / "out/start.json").read_text())["mono_s"]
    wrong_s = max(second["clock_error_s"] for second in read_jsonl(tmp_path / "out/client.jsonl"))
    for record in records:
        came_s = arrived[prompts[record.id]] - start_s
        assert record.sent_s - wrong_s - 1e-5 <= came_s <= record.first_s + wrong_s + 1e-5


def test_no_two_runs_send_the_same_prompt_unless_asked_to(tmp_path):
    """One seed gives one plan, but the runs share no prompt: the server may have cached it."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    with standin("base") as url:
        runs = [
            prepare_run(
                Scenario(url=url, prompts=str(tmp_path / "q.jsonl"), out=str(tmp_path / name), unique_prompts=unique)
            )
            for name, unique in (("a", True), ("b", True), ("c", False), ("d", False))
        ]
    plans = [(run / "plan.jsonl").read_text() for run in runs]
    texts = [{line["question"] for line in read_jsonl(run / "prompts.jsonl")} for run in runs]

    assert plans[0] == plans[1]
    assert not texts[0] & texts[1]
    assert texts[2] == texts[3] <= set(QUESTIONS)


def test_open_arrivals_do_not_wait_for_replies(tmp_path):
    """A server that answers nothing until it has all forty requests gets them all, and answers all."""
    with standin(f"slow.together-{N_PLANNED}") as url:
        loadtest(tmp_path, "--url", url, *LOAD)

    records = read_records(tmp_path / "out/requests.jsonl")
    assert [record.outcome for record in records] == ["ok"] * N_PLANNED
    assert max(record.sent_s for record in records) < min(record.first_s for record in records)


def test_arrivals_beyond_the_in_flight_limit_are_dropped(tmp_path):
    """Three in flight never end: the others have the outcome dropped, and the run does not pass."""
    with standin("slow.holds-0") as url:
        patience = ("--request-timeout-s", "3600", "--idle-timeout-s", "3600", "--drain-s", "1")
        done = loadtest(tmp_path, "--url", url, *LOAD, *patience, "--max-in-flight", "3")

    summary = json.loads(done.stdout.strip().split("\n")[-1])
    assert summary["all"]["outcomes"] == {"dropped": N_PLANNED - 3, "unfinished": 3}
    assert done.returncode == EXIT_STATUS[summary["verdict"]]
    assert next(check for check in summary["checks"] if check["name"] == "sent_share")["held"]
    assert summary["verdict"] in ("missed", "invalid")  # a busy machine may make the client late


def test_a_closed_loop_keeps_its_clients_busy(tmp_path):
    """Three clients and 24 conversations of two turns: 48 records, always three at once, or none is answered."""
    with standin("base.together-3") as url:
        load = ("--arrivals", "closed", "--concurrency", "3", "--requests", "24", "--turns", "2", "--duration-s", "900")
        loadtest(tmp_path, "--url", url, *load)

    records = read_records(tmp_path / "out/requests.jsonl")
    assert sorted((record.id, record.turn) for record in records) == [(i, turn) for i in range(24) for turn in (0, 1)]
    assert {record.outcome for record in records} == {"ok"}
    assert max(sum(other.sent_s <= record.sent_s < other.end_s for other in records) for record in records) <= 3


def test_a_server_that_dies_leaves_counted_failures(tmp_path):
    """The first request ends the server: the run continues, and every arrival is a counted failure."""
    with standin("base.die") as url:
        done = loadtest(tmp_path, "--url", url, *LOAD)

    outcomes = json.loads(done.stdout.strip().split("\n")[-1])["all"]["outcomes"]
    assert sum(outcomes.values()) == N_PLANNED
    assert set(outcomes) <= {"broken_stream", "connect_error"}


def test_a_server_that_dies_in_mid_run_fails_the_rest(tmp_path):
    """It answers 29 requests and ends at the 30th: 29 complete replies, the rest fail, and an objective is missed."""
    with standin("base.dies-30") as url:
        slo = "ttft_p90_s <= 3600,error_rate <= 0.1"
        done = loadtest(tmp_path, "--url", url, *LOAD, "--slo", slo)

    summary = json.loads(done.stdout.strip().split("\n")[-1])
    records = read_records(tmp_path / "out/requests.jsonl")
    outcomes = summary["all"]["outcomes"]
    assert outcomes["ok"] == 29
    assert outcomes["connect_error"] + outcomes.get("broken_stream", 0) == N_PLANNED - 29
    assert summary["all"]["ttft_s"]["n"] == 29
    assert min(record.ttft_s for record in records if record.ok) > 0
    assert not any(item["held"] for item in summary["slo"])
    assert done.returncode == EXIT_STATUS[summary["verdict"]] != 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--url", "http://127.0.0.1:9/v1"), "no server answers at http://127.0.0.1:9/v1"),
        (("--prompts", "absent.jsonl"), "cannot read 'absent.jsonl'"),
        (("--rate", "many"), "rate is 'many'"),
        (("--duration", "5"), ""),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, words, says):
    """Exit 1 with `error:` (or 2 for an unknown flag), and no results directory."""
    done = loadtest(tmp_path, *words)

    assert done.returncode == (1 if says else 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
