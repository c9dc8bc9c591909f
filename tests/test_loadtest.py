"""`python -m loadtest` as a user runs it, Locust and all, against the stand-in."""

import json
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from counsel.files import read_jsonl
from loadtest.prepare import prepare
from loadtest.records import read_records
from loadtest.scenario import Scenario
from loadtest.verdict import EXIT_STATUS
from tests.sse_server import standin

# 40 requests in 2 s. None is due in the first 2.5 s: a source that begins late leaves out what was due before. And many
# seconds are left after the last: what is sent later than the schedule's end does not count as sent.
LOAD = ("--arrivals", "constant", "--rate", "spike(0.001, 20, 2.5, 4.5)", "--duration-s", "60")
N_PLANNED = 40
QUESTIONS = ["I feel lonely since we moved.", "Work is hard and I cannot sleep.", "My friend is angry with me."]


def loadtest(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """Run the command with the questions above, in `tmp_path`."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    command = [sys.executable, "-m", "loadtest", "--prompts", "q.jsonl", "--out", "out", *words]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)


def test_a_run_sends_its_plan_and_says_what_came_back(tmp_path):
    """Every planned arrival is one row of the model it names; the table, the last line and the files agree."""
    with standin("base", "gentle.first-30.gap-2") as url:
        done = loadtest(tmp_path, "--url", url, *LOAD, "--output-tokens", "8")

    *text, last = done.stdout.strip().split("\n")
    summary = json.loads(last)
    plan = [json.loads(line) for line in (tmp_path / "out/plan.jsonl").read_text().splitlines()]
    rows = read_records(tmp_path / "out/requests.jsonl")
    assert done.returncode in (0, 4), done.stderr  # a crowded machine may make the client late: then it says so
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert sorted((row.id, row.model) for row in rows) == [(arrival["id"], arrival["model"]) for arrival in plan]
    assert {row.outcome for row in rows} == {"ok"}
    assert {name: found["n"] for name, found in summary["models"].items()} == Counter(row.model for row in rows)
    assert summary["all"]["completion_tokens"] == 8 * len(plan)
    for name, found in summary["models"].items():
        middle_s = median(row.ttft_s for row in rows if row.model == name)
        assert found["ttft_s"]["p50"] == pytest.approx(middle_s, rel=1e-3)
    assert any(line.startswith("gentle.first-30.gap-2") for line in text)


def test_rows_arrive_from_two_workers(tmp_path):
    """Two Locust processes share the plan: every arrival once, some from each, and on one clock.

    By the server's clock each came after it was sent and before it was answered, by the rows of whichever process.
    """
    with standin("base") as url:
        done = loadtest(tmp_path, "--url", url, *LOAD, "--workers", "2")
        with urllib.request.urlopen(url.replace("/v1", "/arrived")) as response:
            arrived = {text: at_s for at_s, text in json.load(response)["arrived"]}

    rows = read_records(tmp_path / "out/requests.jsonl")
    assert done.returncode in (0, 4), done.stderr
    assert sorted(row.id for row in rows) == list(range(N_PLANNED))
    assert {row.worker for row in rows} == {0, 1}
    assert {row.id % 2 == row.worker % 2 for row in rows} != {True, False}
    texts = [row["question"] for row in read_jsonl(tmp_path / "out/prompts.jsonl")]
    prompts = {arrival["id"]: texts[arrival["prompts"][0]] for arrival in read_jsonl(tmp_path / "out/plan.jsonl")}
    start_s = json.loads((tmp_path / "out/start.json").read_text())["mono_s"]
    wrong_s = max(second["clock_error_s"] for second in read_jsonl(tmp_path / "out/client.jsonl"))
    for row in rows:
        came_s = arrived[prompts[row.id]] - start_s
        assert row.sent_s - wrong_s - 1e-5 <= came_s <= row.first_s + wrong_s + 1e-5


def test_no_two_runs_send_the_same_prompt_unless_asked_to(tmp_path):
    """One seed, one plan, and yet no prompt of the first run is in the second: its server may still remember it."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    with standin("base") as url:
        runs = [
            prepare(
                Scenario(url=url, prompts=str(tmp_path / "q.jsonl"), out=str(tmp_path / name), unique_prompts=unique)
            )
            for name, unique in (("a", True), ("b", True), ("c", False), ("d", False))
        ]
    plans = [(run / "plan.jsonl").read_text() for run in runs]
    texts = [{row["question"] for row in read_jsonl(run / "prompts.jsonl")} for run in runs]

    assert plans[0] == plans[1]
    assert not texts[0] & texts[1]
    assert texts[2] == texts[3] <= set(QUESTIONS)


def test_open_arrivals_do_not_wait_for_replies(tmp_path):
    """A server that answers nobody before all forty requests are there gets them all, and all are answered."""
    with standin(f"slow.together-{N_PLANNED}") as url:
        loadtest(tmp_path, "--url", url, *LOAD)

    rows = read_records(tmp_path / "out/requests.jsonl")
    assert [row.outcome for row in rows] == ["ok"] * N_PLANNED
    assert max(row.sent_s for row in rows) < min(row.first_s for row in rows)


def test_arrivals_beyond_the_cap_are_dropped_and_counted(tmp_path):
    """Three in flight that never end: the rest are rows with outcome dropped, and the run is no pass."""
    with standin("slow.holds-0") as url:
        patience = ("--request-timeout-s", "3600", "--idle-timeout-s", "3600", "--drain-s", "1")
        done = loadtest(tmp_path, "--url", url, *LOAD, *patience, "--max-in-flight", "3")

    summary = json.loads(done.stdout.strip().split("\n")[-1])
    assert summary["all"]["outcomes"] == {"dropped": N_PLANNED - 3, "unfinished": 3}
    assert done.returncode == EXIT_STATUS[summary["verdict"]]
    assert next(check for check in summary["checks"] if check["name"] == "sent_share")["held"]
    assert summary["verdict"] in ("missed", "invalid")  # a crowded machine may make the client late


def test_a_closed_loop_keeps_its_clients_busy(tmp_path):
    """Three clients and 24 conversations of two turns: 48 rows, and always three at once: fewer get no answer."""
    with standin("base.together-3") as url:
        load = ("--arrivals", "closed", "--concurrency", "3", "--requests", "24", "--turns", "2", "--duration-s", "900")
        loadtest(tmp_path, "--url", url, *load)

    rows = read_records(tmp_path / "out/requests.jsonl")
    assert sorted((row.id, row.turn) for row in rows) == [(i, turn) for i in range(24) for turn in (0, 1)]
    assert {row.outcome for row in rows} == {"ok"}
    assert max(sum(other.sent_s <= row.sent_s < other.end_s for other in rows) for row in rows) <= 3


def test_a_server_that_dies_leaves_counted_failures(tmp_path):
    """The first request ends the server: the run goes on, and every arrival has an outcome that is no success."""
    with standin("base.die") as url:
        done = loadtest(tmp_path, "--url", url, *LOAD)

    outcomes = json.loads(done.stdout.strip().split("\n")[-1])["all"]["outcomes"]
    assert sum(outcomes.values()) == N_PLANNED
    assert set(outcomes) <= {"broken_stream", "connect_error"}


def test_a_server_that_dies_in_mid_run_is_counted_from_then_on(tmp_path):
    """It answers 29 requests and ends at the 30th: 29 whole replies, the rest failures, and an objective missed."""
    with standin("base.dies-30") as url:
        slo = "ttft_p90_s <= 3600,error_rate <= 0.1"
        done = loadtest(tmp_path, "--url", url, *LOAD, "--slo", slo)

    summary = json.loads(done.stdout.strip().split("\n")[-1])
    rows = read_records(tmp_path / "out/requests.jsonl")
    outcomes = summary["all"]["outcomes"]
    assert outcomes["ok"] == 29
    assert outcomes["connect_error"] + outcomes.get("broken_stream", 0) == N_PLANNED - 29
    assert summary["all"]["ttft_s"]["n"] == 29
    assert min(row.ttft_s for row in rows if row.ok) > 0
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
    """Exit 1 with `error:` (or 2 for a flag that does not exist), and no results directory."""
    done = loadtest(tmp_path, *words)

    assert done.returncode == (1 if says else 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
