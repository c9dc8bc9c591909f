"""What the gate may decide: complete evaluations only, arms with unique names, rules over their own questions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counsel.cli import CANNOT_BE_JUDGED, MISSED
from counsel.client import ServerModels
from counsel.errors import UserError
from counsel.files import write_json, write_jsonl
from counsel.run import Run
from eval.arms import YARDSTICKS, Arm, choose
from eval.config import GateConfig
from eval.folders import folder_for
from eval.gate import gate
from eval.summary import FORMAT, OLD_ROWS, paired, summarize_arms, warnings
from tests.test_eval import called, make_run

BETTER = "difference.bits_per_byte.high<0"
N = 60


def likelihood(arm: str, question: int, nats: float | None, error: str | None = None) -> dict[str, Any]:
    return {"arm": arm, "question_id": f"q{question:02}", "answer": 0, "nll_nats": nats, "tokens": 9, "bytes": 10,
            "attempts": 1, "error": error}  # fmt: skip


def answer(arm: str, question: int, text: str = "be kind", score: float | None = 0.5) -> dict[str, Any]:
    return {"arm": arm, "question_id": f"q{question:02}", "sample": 0, "text": text, "finish_reason": "stop",
            "attempts": 1, "completion_tokens": 2, "error": None,
            "scores": None if score is None else {"similarity_max": score}}  # fmt: skip


def better_by(*nats: float) -> list[dict[str, Any]]:
    """Likelihoods of base and adapter; entry i is how many nats fewer the adapter needs on question i."""
    return [
        likelihood(arm, at, 10.0 - (gain if arm == "gentle" else 0.0))
        for at, gain in enumerate(nats) for arm in ("base", "gentle")
    ]  # fmt: skip


def decided(folder: Path, rules: str, likelihoods: list[dict], answers: list[dict] = ()) -> tuple[int, list[dict]]:
    """The gate's exit status and rules for an evaluation with these rows."""
    summary = {
        "format": FORMAT, "run": "r", "questions": N, "spec": {"base": "base"},
        "arms": summarize_arms(["base", "gentle"], "base", answers, answers, likelihoods, seed=0),
        "differences": paired(answers, likelihoods, [("gentle", "base")], seed=0),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    result = gate(GateConfig(f"{folder}:gentle", tuple(rules.split(","))))
    return result.exit_status, list(result.document["rules"])


def test_a_rule_is_over_its_own_questions(tmp_path: Path) -> None:
    """Sixty questions that differ by 0.9 to 1.1 nats: it passes with n = 60."""
    status, (rule,) = decided(tmp_path, BETTER, better_by(*np.linspace(0.9, 1.1, N)))

    assert (status, rule["passed"], rule["n"]) == (0, True, N)


def test_pairs_that_the_base_failed_are_missing(tmp_path: Path) -> None:
    """The base failed on 58 of 60: errors count for both arms, and the difference is not judged on the other two."""
    rows = better_by(*np.linspace(0.9, 1.1, N))
    lost = [
        likelihood("base", at, None, "APITimeoutError") if row["arm"] == "base" and at >= 2 else row
        for row in rows for at in [int(row["question_id"][1:])]
    ]  # fmt: skip
    status, (difference, errors) = decided(tmp_path, f"{BETTER},errors<=0", lost)
    alone, _ = decided(tmp_path, BETTER, lost)

    assert (difference["passed"], difference["n"]) == (None, 2)
    assert difference["problem"].startswith("58 questions are missing")
    assert (errors["observed"], errors["n"], errors["passed"]) == (58, 2 * N, False)
    assert (status, alone) == (MISSED, CANNOT_BE_JUDGED)


def test_answers_without_a_word_are_missing_pairs(tmp_path: Path) -> None:
    """`...` and an emoji count as empty; a rule on their scores is not judged without them."""
    answers = [
        answer(arm, at, score=0.5 + at / 100 + (arm == "gentle") * 0.1) for at in range(8) for arm in ("base", "gentle")
    ]
    answers[1] |= {"text": "...", "scores": None}
    answers[3] |= {"text": "🙂", "scores": None}
    status, (empty, difference) = decided(tmp_path, "empty<=0,difference.similarity_max.low>0", [], answers)

    assert (empty["observed"], empty["passed"]) == (2, False)
    assert (difference["n"], difference["problem"][:25]) == (6, "2 questions are missing: ")
    assert status == MISSED


def test_a_reference_that_is_too_long_is_no_failure(tmp_path: Path) -> None:
    """It is left out for both arms; it neither fails the default gate nor counts as a missing question."""
    rows = better_by(*np.linspace(0.9, 1.1, 10))
    rows += [likelihood(arm, 10, None, "too long") for arm in ("base", "gentle")]
    status, (difference, errors) = decided(tmp_path, f"{BETTER},errors<=0", rows)

    assert (status, difference["n"], errors["observed"]) == (0, 10, 0)


@pytest.mark.parametrize(
    ("gains", "problem"),
    [
        ((0.9, 1.0, 1.1, 1.0, 0.9), "needs at least 6 questions: fewer cannot show a difference"),
        ((1.0,) * 10, "all questions differ by the same amount, so there is no interval"),
    ],
)
def test_what_cannot_be_judged_has_a_status_of_its_own(tmp_path: Path, gains: tuple[float, ...], problem: str) -> None:
    """Better on every question, but with too few questions or no variation: neither passed nor failed."""
    status, (rule,) = decided(tmp_path, BETTER, better_by(*gains))

    assert (status, rule["passed"], rule["problem"]) == (CANNOT_BE_JUDGED, None, problem)


def test_a_failed_rule_outweighs_one_that_cannot_be_judged(tmp_path: Path) -> None:
    """Worse on ten questions, and a metric that does not exist."""
    status, rules = decided(tmp_path, f"{BETTER},chrf.low>0", better_by(*np.linspace(-1.1, -0.9, 10)))

    assert (status, [rule["passed"] for rule in rules]) == (MISSED, [False, None])


def unfinished(tmp_path: Path, samples: int, error: str | None = None) -> tuple[Run, Path]:
    """An evaluation of six questions and two arms with this many of its twelve answers, the last with `error`."""
    run = Run(make_run(tmp_path / "run", Path("tiny")))
    folder = run.path / "eval" / "20260101T000000Z"
    config = {"run": "run", "questions": 6, "samples": 1, "references": 2, "seed": 0, "models": []}
    write_json(folder / "config.json", {"format": FORMAT, "config": config, "base": "tiny", "arms": ["tiny", "gentle"]})
    keys = [(arm, f"{at:016x}") for arm in ("tiny", "gentle") for at in range(6)]
    rows = [{**answer(arm, 0), "question_id": key, "prompt_tokens": 1, "latency_s": 0.1} for arm, key in keys[:samples]]
    rows[-1]["error"] = error
    write_jsonl(folder / "samples.jsonl", [{k: v for k, v in row.items() if k != "scores"} for row in rows])
    likelihoods = [
        {**likelihood(arm, 0, 9.0 + number), "question_id": key, "answer": number}
        for arm, key in keys
        for number in (0, 1)
    ]
    write_jsonl(folder / "likelihood.jsonl", likelihoods)
    return run, folder


def test_a_part_of_an_evaluation_is_not_reported_as_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of twelve answers: `report` fails and writes no summary, so there is nothing to gate."""
    run, folder = unfinished(tmp_path, samples=3)
    status, _, err = called(capsys, "report", str(folder))

    assert status == 1
    assert "lacks 9 of 36 rows" in err
    assert not (folder / "summary.json").exists()
    assert "no finished evaluation" in called(capsys, "gate", str(run.path))[2]


def test_failed_rows_of_a_finished_evaluation_are_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`report` exits with 1 if a row failed; the same spec then continues that folder until none has."""
    run, folder = unfinished(tmp_path, samples=12, error="APITimeoutError: timed out")
    spec = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    status, out, err = called(capsys, "report", str(folder))

    assert (status, json.loads(out.splitlines()[-1])["arms"]["gentle"]["errors"]) == (1, 1)
    assert "1 rows failed; run the same evaluation again to ask for them once more" in err
    spec["config"]["run"] = "runs/run"  # another name for the same run
    assert folder_for(run, spec) == folder
    assert not (folder / "summary.json").exists()
    write_json(folder / "summary.json", {"arms": {"gentle": {"errors": 0}}})
    assert folder_for(run, spec) != folder


@pytest.mark.parametrize(
    ("rows", "remedy"),
    [
        (FORMAT - 1, r"run python -m eval report .*20260101T000000Z"),
        (2, r"evaluate again with .* --run .*run$"),
    ],
)
def test_an_older_evaluation_says_what_to_do(tmp_path: Path, rows: int, remedy: str) -> None:
    """`report` again where only the summary is old, a new evaluation where the rows are."""
    _, folder = unfinished(tmp_path, samples=12)
    write_json(folder / "config.json", {"format": rows})
    write_json(folder / "summary.json", {"format": FORMAT - 1, "plan": {}})

    with pytest.raises(UserError, match=f"has format {FORMAT - 1}, and this version reads {FORMAT}: .*{remedy}"):
        gate(GateConfig(f"{folder}:gentle"))


def test_rows_of_the_last_format_are_reported_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only summary.json changed since format 3. Older rows are reported with a warning."""
    _, folder = unfinished(tmp_path, samples=12)
    spec = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for rows, old in ((3, False), (2, True)):
        write_json(folder / "config.json", spec | {"format": rows})
        _, out, _ = called(capsys, "report", str(folder))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))

        assert (summary["format"], summary["spec"]["format"]) == (FORMAT, rows)
        assert (OLD_ROWS in summary["warnings"]) is old
        assert (f"! {OLD_ROWS}" in out) is old


def listed(*adapters: str) -> ServerModels:
    names = ("tiny", *adapters)
    return ServerModels("tiny", adapters, names, dict.fromkeys(names, "x"), 512)


def test_a_run_asks_its_own_adapter() -> None:
    """Not any other that is served; if its own is not served, the error lists what is."""
    assert choose(listed("calm", "gentle"), "gentle", (), baselines=False) == [Arm("tiny"), Arm("gentle")]
    assert choose(listed("calm"), "gentle", ("calm",), baselines=False) == [Arm("calm")]
    with pytest.raises(UserError, match=r"does not serve 'gentle', this run's adapter.*--models base, calm"):
        choose(listed("calm"), "gentle", (), baselines=False)


@pytest.mark.parametrize("name", [*YARDSTICKS, "tiny/native"])
def test_a_model_cannot_be_taken_for_another_arm(name: str) -> None:
    """Both arms would share rows in every table; if it is not asked, it does no harm."""
    with pytest.raises(UserError, match=f"the model '{name}' has the name of another arm"):
        choose(listed(name), name, ("base", name), baselines=True)
    assert choose(listed(name, "gentle"), "gentle", (), baselines=False) == [Arm("tiny"), Arm("gentle")]


def test_base_is_the_base_whatever_adapters_are_called() -> None:
    """`--models base` never means an adapter named `base`."""
    assert choose(listed("base", "gentle"), "gentle", ("base",), baselines=False) == [Arm("tiny")]
    with pytest.raises(UserError, match="'human' has the name of another arm"):
        choose(ServerModels("human", (), ("human",), {"human": ""}, 9), "gentle", ("base",), baselines=False)


def test_likelihoods_that_are_all_missing_do_not_show_that_weights_have_no_effect() -> None:
    """Without measurements nothing is equal; equal numbers are still reported."""

    def warning(nats: float | None) -> str:
        rows = [
            likelihood(arm, at, nats, None if nats else "too long") for at in range(3) for arm in ("base", "gentle")
        ]
        arms = summarize_arms(["base", "gentle"], "base", [], [], rows, seed=0)
        return " ".join(warnings(arms, rows, {"format": FORMAT, "base": "base"}, {}))

    assert "no effect" not in warning(None)
    assert "gentle predicts every answer exactly as base does: its weights have no effect" in warning(3.0)
