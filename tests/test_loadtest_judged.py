"""`find-capacity` and `compare` as a user runs them, on a stand-in whose capacity and speed are known."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sse_server import standin
from train.files import read_json

# Long enough a service time that the machine's own delays are small beside it.
COMMON = ("--prompts", "q.jsonl", "--arrivals", "constant", "--output-tokens", "4")


def command(folder: Path, *words: str) -> subprocess.Popen:
    """Start `python -m loadtest` with these words, in a folder with one question."""
    (folder / "q.jsonl").write_text('{"question": "How are you?"}\n')
    argv = [sys.executable, "-m", "loadtest", *words]
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[dict[str, Any], str, str]:
    """Its JSON line, the text before, and what it said meanwhile."""
    out, err = process.communicate(timeout=150)
    *text, last = out.strip().split("\n")
    return json.loads(last), "\n".join(text), err


@pytest.mark.slow
def test_the_capacity_found_is_that_of_the_server(tmp_path):
    """Ten slots of half a second serve 20 requests/s: 19 hold a first token within 0.65 s, 24 leave a growing queue."""
    with standin("base.slots-10.first-500") as url:
        run = command(
            tmp_path, "find-capacity", *COMMON, "--url", url, "--duration-s", "4", "--lowest", "9.5", "--highest", "24",
            "--precision", "0.3", "--repeats", "1", "--slo", "ttft_p90_s <= 0.65", "--out", "out",
        )  # fmt: skip
        found, text, err = ended(run)

    assert found["invalid"] == "", err
    assert (found["held"], found["failed"]) == (19, 24)
    assert [(point["offered"], point["verdict"]) for point in found["points"]] == [
        (9.5, "passed"),
        (19, "passed"),
        (24, "missed"),
    ]
    assert found["points"][2]["achieved"] == pytest.approx(20, rel=0.1)
    assert run.returncode == 0
    assert "capacity: 19 requests/s (missed at 24)" in text
    assert found == read_json(tmp_path / "out/capacity.json")
    assert "<svg" in (tmp_path / "out/report.html").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs side by side of servers whose first chunk takes 200, 200 and 300 ms: folders a, same and slow."""
    folder = tmp_path_factory.mktemp("runs")
    models = {"a": "base.gap-40.first-200", "same": "base.gap-40.first-200", "slow": "base.gap-40.first-300"}
    with standin(*sorted(set(models.values()))) as url:
        load = (*COMMON, "--url", url, "--rate", "10", "--duration-s", "10")
        started = [command(folder, *load, "--models", model, "--out", out) for out, model in models.items()]
        for process in started:
            ended(process)
    return folder


@pytest.mark.parametrize(
    ("b", "verdict", "status"), [("same", "no difference", 0), ("slow", "worse", 1)], ids=["same", "slow"]
)
def test_two_runs_are_told_apart_by_what_differs_only(runs, b, verdict, status):
    """Equal servers: no difference, exit 0. Half as slow again: worse in TTFT and e2e, not in throughput, exit 1."""
    run = command(runs, "compare", "a", b, "--block-s", "1")
    document, text, err = ended(run)

    shows = {item["metric"]: item["shows"] for item in document["differences"]}
    ratios = {item["metric"]: item["ratio"] for item in document["differences"]}
    slower = {"ttft_p50_s", "ttft_p90_s", "e2e_p50_s", "e2e_p90_s"} if b == "slow" else set()
    assert {metric for metric, shown in shows.items() if shown == "worse"} - {"tpot_p50_s", "tpot_p90_s"} == slower, (
        text
    )
    assert ratios["ttft_p50_s"] == pytest.approx(1.5 if b == "slow" else 1.0, rel=0.04)
    # A crowded machine may spoil a run for its client; then that, and not the difference, is the verdict.
    spoilt = "invalid" in {read_json(runs / name / "summary.json")["verdict"] for name in ("a", b)}
    assert (document["verdict"], run.returncode) == (("invalid", 2) if spoilt else (verdict, status)), text + err
    assert f"verdict: {document['verdict']}" in text
