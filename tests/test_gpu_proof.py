"""`make gpu-proof`: its steps resume and cannot hang, its page follows from the rows, its judge finds faults.

The whole proof runs here in its tiny form, on a CPU. On a GPU it was never run.
"""

import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu_page import proof_page
from benchmarks.gpu_proof import STAGES, GpuProof, against_lock, gpu_proof, limited, ratios, verdict
from benchmarks.gpu_reference import Reference
from benchmarks.gpu_serving import answers, ask
from benchmarks.steps import DONE, Rows, Stage, Step, run_stage
from counsel.errors import UserError
from counsel.files import read_json
from tests.tiny import tiny_adapter
from tests.train_runs import ROOT
from tests.waiting import until

# A stage whose steps do what their name says; each start adds a line to the file `starts`.
SCRIPT = """
import pathlib, subprocess, sys, time
from benchmarks.steps import Rows

def hang():
    time.sleep(600)

def fail():
    raise SystemExit("error: the reason")

with pathlib.Path(sys.argv[1], "starts").open("a") as file:
    file.write("start\\n")
rows = Rows(pathlib.Path(sys.argv[1], "rows"))
if "never" in sys.argv[2:]:
    fail()
if "hang" in sys.argv[2:]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
for name in sys.argv[2:]:
    rows.run(name, {"hang": hang, "fail": fail}.get(name, lambda: {"ok": True}))
"""


def run(folder: Path, *names: str, limit_s: float = 600, set_up_s: float = 600, whole_s: float = 600) -> dict[str, str]:
    """Run a stage of these steps; return each step's status and reason."""
    rows, stage = Rows(folder / "rows"), Stage("stage", set_up_s, tuple(Step(name, limit_s) for name in names))
    rows.forget_unfinished([stage])
    argv = [sys.executable, "-c", SCRIPT, str(folder), *names]
    run_stage(stage, rows, argv, folder / "stage.log", time.monotonic() + whole_s)
    return {name: " ".join((row["status"], row["reason"])).strip() for name in names if (row := rows.read(name))}


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines()) if (folder / "starts").is_file() else 0


@pytest.mark.parametrize("names", [["fail", "one", "two"], ["one", "fail", "two"], ["one", "two", "fail"]])
def test_a_failed_step_ends_neither_the_others_nor_its_reason(tmp_path, names):
    """Wherever it stands. The next run repeats it alone."""
    assert run(tmp_path, *names) == {"one": "done", "two": "done", "fail": "failed error: the reason"}
    before = starts(tmp_path)
    written = (tmp_path / "rows" / "one.json").read_bytes()

    assert run(tmp_path, *names)["fail"] == "failed error: the reason"
    assert starts(tmp_path) == before + 1
    assert (tmp_path / "rows" / "one.json").read_bytes() == written


def test_finished_steps_are_not_started_again(tmp_path):
    """Not even their process."""
    run(tmp_path, "one", "two")
    assert run(tmp_path, "one", "two") == {"one": "done", "two": "done"}
    assert starts(tmp_path) == 1


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path):
    """After its limit."""
    assert run(tmp_path, "hang", limit_s=0.1) == {"hang": "timed out longer than its limit of 0.1 s"}
    child = int((tmp_path / "child").read_text())
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_a_stage_that_never_begins_fails_all_its_steps_once(tmp_path):
    """A server that does not start is not started again for each step."""
    reason = "failed before its first step: error: the reason"
    assert run(tmp_path, "never", "one") == {"never": reason, "one": reason}
    assert starts(tmp_path) == 1


def test_when_the_time_is_over_the_rest_says_so_and_runs_next_time(tmp_path):
    """The stage is not even started."""
    assert all("the same command goes on" in status for status in run(tmp_path, "one", "two", whole_s=0).values())
    assert starts(tmp_path) == 0
    assert run(tmp_path, "one", "two") == {"one": "done", "two": "done"}


def row(step: str, status: str = DONE, reason: str = "", **figures: object) -> dict[str, object]:
    return {"step": step, "status": status, "seconds": 1.0, "reason": reason, "figures": figures}


ROWS = [
    row("set_up", ok=False, locked=3, differ={"torch": "1.0, locked 2.0"}),
    row("answers", ok=True, answers=36, mixed_up={}),
    row("throughput", ok=None, tokens_s={"base_c1": 50.0, "adapter_c1": 40.0, "base_c32": 400.0, "mixed8_c32": 300.0}),
    row("first_token", ok=None, first_token_s={"c1": {"n": 4, "p50": 0.01, "p90": 0.02, "p99": 0.03}}),
    row("bare_throughput", ok=None, tokens_s={"base_c1": 25.0, "adapter_c1": 20.0, "mixed8_c32": 150.0}),
    row("train_ours", ok=None, tokens_per_s=300.0, peak_memory_bytes=2 << 30, steps=3, downgrades=[]),
    row("train_trl", ok=None, tokens_per_s=100.0, peak_memory_bytes=4 << 30, steps=3),
    row("drain", status="timed out", reason="longer than its limit of <30> s"),
]


def test_ratios_and_verdict_follow_from_the_rows():
    """By hand: adapters over the base at the same concurrency, ours over bare vLLM where both have the load."""
    assert ratios(ROWS) == {
        "base_c1_vs_bare": 2.0,
        "adapter_c1_vs_base": 0.8,
        "adapter_c1_vs_bare": 2.0,
        "mixed8_c32_vs_base": 0.75,
        "mixed8_c32_vs_bare": 2.0,
        "train_tokens_per_s_vs_trl": 3.0,
        "train_peak_memory_vs_trl": 0.5,
    }
    assert verdict(ROWS) == ("not whole: drain (timed out), set_up (missed)", 1)
    assert verdict(ROWS[:2]) == ("missed: set_up", 3)
    assert verdict(ROWS[1:2]) == ("every step ran, and what is judged is right", 0)


@pytest.mark.parametrize("n", [0, 1, 3, len(ROWS)])
def test_the_page_holds_every_row_whatever_ran(n):
    """Figures with their units, reasons escaped, and a warning on tiny models."""
    document = {"processor": "a CPU", "device": "a GPU", "tiny": True, "verdict": verdict(ROWS[:n])[0],
                "ratios": ratios(ROWS[:n]), "steps": ROWS[:n], "git": "abc", "git_clean": True,
                "time_utc": "2026-01-01", "versions": {"torch": "2.0"}}  # fmt: skip
    html = proof_page(json.loads(json.dumps(document)))

    assert all(str(each["step"]) in html for each in ROWS[:n])
    assert "not a measurement" in html
    if n == len(ROWS):
        assert "torch: 1.0, locked 2.0" in html
        assert "its limit of &lt;30&gt; s" in html
        assert "<30>" not in html
        assert "0.750" in html
        assert "10.0" in html


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    """Status 4: a proof that did not run must not pass for one that did."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_proof", "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip

    assert done.returncode == 4, done.stderr
    assert done.stdout.splitlines()[0] == "not run: no GPU"
    assert not out.exists()


def test_rows_of_another_machine_or_commit_are_not_mixed_in(tmp_path):
    """The error names what differs."""
    (tmp_path / "spec.json").write_text(json.dumps({"tiny": True, "device": "another card", "git": "0"}))

    with pytest.raises(UserError, match=r"its device is 'another card'.*choose another --out"):
        gpu_proof(GpuProof(tiny=True, out=str(tmp_path)))


def test_the_whole_fits_in_eight_minutes_if_steps_take_half_of_their_limits():
    """The limits stop what hangs; together they are below twice the time that the proof has."""
    total = sum(stage.set_up_s + sum(step.limit_s for step in stage.steps) for stage in limited(tiny=False))
    names = [step.name for stage in STAGES for step in stage.steps]

    assert total / 2 <= GpuProof().within_s == 480
    assert len(set(names)) == len(names)


def test_the_lock_is_compared_with_what_is_installed():
    """A wrong version, a missing package, and a marker that does not hold here."""
    here = metadata.version("psutil")
    lock = (f'psutil=={here} \\\n    --hash=sha256:0\nabsent-package==1.0 \\\n    --hash=sha256:0\n'
            f'pytest==0.1 ; python_version > "3"\nwindows-only==1.0 ; sys_platform == "win32"\n')  # fmt: skip

    assert against_lock(lock) == {
        "ok": False,
        "locked": 3,
        "differ": {
            "absent-package": "absent, locked 1.0",
            "pytest": f"{metadata.version('pytest')}, locked 0.1",
        },
    }


def test_the_judge_accepts_a_server_and_finds_each_fault(server, tmp_path):
    """Right answers pass. Adapters exchanged, adapters ignored, shifted log-probabilities and wrong tokens do not."""
    url = server.base_url.removesuffix("/v1")
    other = tiny_adapter(server.base.path, tmp_path / "other", seed=7)
    reference = Reference(server.base.path, {**server.adapters, "other": other})
    base = server.base.name
    weights = {base: None, "gentle": "gentle", "calm": "calm"}
    right = answers(url, weights, reference, server.user_key)
    asked = ask(url, [base, "gentle", "calm"], server.user_key)

    assert right["ok"], right
    assert (right["answers"], right["tokens"]) == (12, 288)
    for wrong in (
        {base: None, "gentle": "calm", "calm": "gentle"},
        {base: None, "gentle": None, "calm": "calm"},
        {base: "gentle", "gentle": "gentle", "calm": "calm"},
        {base: None, "gentle": "gentle", "calm": "other"},
    ):
        judged = reference.judge(asked, wrong)
        faults = {model: right or "base" for model, right in weights.items() if wrong[model] != right}
        assert (judged["ok"], judged["mixed_up"]) == (False, faults)
    shifted = [answer._replace(logprobs=[value - 3 for value in answer.logprobs]) for answer in asked]
    assert not reference.judge(shifted, weights)["ok"]
    one, *rest = asked
    assert not reference.judge([one._replace(ids=[one.ids[0] ^ 1, *one.ids[1:]]), *rest], weights)["ok"]


@pytest.mark.slow
def test_the_whole_proof_runs_tiny_and_resumes(tmp_path):
    """Every step, with real servers and trainings; a second call finds nothing to do and writes the same rows."""
    argv = [sys.executable, "-m", "benchmarks.gpu_proof", "--tiny", "--within-s", "3600", "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    document = read_json(tmp_path / "proof.json")
    by_step = {each["step"]: each for each in document["steps"]}

    assert list(by_step) == [step.name for stage in STAGES for step in stage.steps], done.stderr
    assert {each["status"] for each in by_step.values()} == {DONE}, done.stderr
    assert [name for name, each in by_step.items() if each["figures"]["ok"] is False] in ([], ["set_up"])
    assert by_step["answers"]["figures"]["answers"] == 36
    assert by_step["drain"]["figures"]["whole"] == 16
    assert (tmp_path / "proof.html").is_file()

    again = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == done.returncode
    assert read_json(tmp_path / "proof.json")["steps"] == document["steps"]
