"""Verdicts as a user gets them, for a server of known capacity and speed and a client that is never late."""

import heapq
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counsel.cli import main
from counsel.files import read_json, read_jsonl, write_json, write_jsonl
from loadtest.__main__ import COMMANDS
from loadtest.records import RequestRecord, append_records
from loadtest.scenario import Scenario
from tests.sse_server import Behavior, standin

COMMON = ("--arrivals", "constant", "--output-tokens", "4")


def scripted_locust(scenario: Scenario, directory: Path) -> None:
    """Write what Locust would write for a plan: the replies of the stand-in, computed from the models' names."""
    free: dict[str, list[float]] = {}
    records = []
    plan = read_jsonl(directory / "plan.jsonl")
    for arrival in plan:
        model, due_s = arrival["model"], arrival["due_s"]
        how = Behavior.of(model)
        slots = free.setdefault(model, [0.0] * (how.slots or len(plan)))
        first_s = max(due_s, heapq.heappop(slots)) + how.first_s
        gaps_s = [how.gap_s] * (arrival["max_tokens"] - 1)
        last_s = first_s + sum(gaps_s)
        heapq.heappush(slots, last_s)
        records.append(
            RequestRecord(
                id=arrival["id"], turn=0, model=model, worker=0, due_s=due_s, sent_s=due_s, first_s=first_s,
                content_s=first_s, last_s=last_s, end_s=last_s, gaps_s=gaps_s, prompt_tokens=7,
                completion_tokens=len(gaps_s) + 1, finish="stop", outcome="ok", status=200,
            )
        )  # fmt: skip
    append_records(directory / "requests.jsonl", records)
    calm = {"worker": 0, "due": 0, "in_flight": 0, "hub_lag_s": 0.0, "cpu": 0.1}
    write_jsonl(directory / "client.jsonl", [{**calm, "t_s": float(t)} for t in range(1, int(records[-1].end_s) + 1)])
    write_json(directory / "start.json", {"mono_s": time.monotonic(), "unix_s": time.time()})


@pytest.fixture
def loadtest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """`python -m loadtest` without Locust, in a folder with one question: its status, its JSON line, the text before.

    Delays of a busy machine would change these times, and are not what is tested.
    """
    (tmp_path / "q.jsonl").write_text('{"question": "How are you?"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loadtest.run.run_locust", scripted_locust)

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        status = main("loadtest", COMMANDS, words)
        *text, last = capsys.readouterr().out.strip().split("\n")
        return status, json.loads(last), "\n".join(text)

    return run


def test_a_missed_objective_is_exit_status_3_and_an_invalid_run_4(loadtest):
    """A server with a TTFT of 300 ms meets 400 ms and misses 100 ms. The same run with two requests is invalid."""
    with standin("base.first-300") as url:
        load = ("--prompts", "q.jsonl", *COMMON, "--url", url, "--rate", "15", "--duration-s", "3")
        held, _, _ = loadtest(*load, "--slo", "ttft_p50_s <= 0.4", "--out", "held")
        missed, _, text = loadtest(*load, "--slo", "ttft_p50_s <= 0.1", "--out", "missed")
        few, found, _ = loadtest(*load, "--slo", "ttft_p50_s <= 0.1", "--out", "few", "--requests", "2")

    assert (held, missed, few) == (0, 3, 4)
    assert "MISSED" in text
    assert found["verdict"] == "invalid"


def test_the_capacity_found_is_that_of_the_server(tmp_path, loadtest):
    """Ten slots of half a second serve 20 requests/s: 19 keep the first token within 0.65 s, 24 make the queue grow."""
    with standin("base.slots-10.first-500") as url:
        status, found, text = loadtest(
            "find-capacity", "--prompts", "q.jsonl", *COMMON, "--url", url, "--duration-s", "4", "--lowest", "9.5",
            "--highest", "24", "--precision", "0.3", "--repeats", "1", "--slo", "ttft_p90_s <= 0.65", "--out", "out",
        )  # fmt: skip

    assert found["invalid"] == ""
    assert (found["held"], found["failed"]) == (19, 24)
    assert [(point["offered"], point["verdict"]) for point in found["points"]] == [
        (9.5, "passed"),
        (19, "passed"),
        (24, "missed"),
    ]
    assert found["points"][2]["achieved"] == pytest.approx(20, rel=0.1)
    assert status == 0
    assert "capacity: 19 requests/s (missed at 24)" in text
    assert found == read_json(tmp_path / "out/capacity.json")
    assert "<svg" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("b", "verdict", "status"), [("same", "no difference", 0), ("slow", "worse", 3)], ids=["same", "slow"]
)
def test_compare_shows_only_what_differs(loadtest, b, verdict, status):
    """Equal servers: no difference, exit 0. First tokens 1.5 times as late: worse, except in throughput, exit 3."""
    models = {"a": "base.gap-40.first-200", "same": "base.gap-40.first-200", "slow": "base.gap-40.first-300"}
    with standin(*sorted(set(models.values()))) as url:
        for out in ("a", b):
            load = ("--rate", "10", "--duration-s", "10", "--models", models[out])
            loadtest("--prompts", "q.jsonl", *COMMON, "--url", url, *load, "--out", out)
    found, document, text = loadtest("compare", "a", b, "--block-s", "1")

    shows = {item["metric"]: item["shows"] for item in document["differences"]}
    ratios = {item["metric"]: item["ratio"] for item in document["differences"]}
    slower = {"ttft_p50_s", "ttft_p90_s", "e2e_p50_s", "e2e_p90_s"} if b == "slow" else set()
    assert {metric for metric, shown in shows.items() if shown == "worse"} == slower, text
    assert ratios["ttft_p50_s"] == pytest.approx(1.5 if b == "slow" else 1.0, rel=1e-3)
    assert (document["verdict"], found) == (verdict, status), text
    assert f"verdict: {document['verdict']}" in text
