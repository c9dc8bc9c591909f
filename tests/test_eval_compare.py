"""Arms of different evaluations are compared on shared questions, under different labels."""

from pathlib import Path
from typing import Any

import pytest

from counsel.errors import UserError
from counsel.files import read_json, write_json, write_jsonl
from eval.compare import compare, side, unique_labels
from eval.config import CompareConfig
from eval.summary import FORMAT, OLD_ROWS

SETTINGS = {"max_tokens": 128, "temperature": 0.7, "top_p": 0.95, "samples": 1, "references": 3, "questions": 60}


def evaluation(
    run: Path, questions: range, stamp: str = "20260101T000000Z", settings: dict[str, Any] = SETTINGS, gain: float = 0.0
) -> Path:
    """A finished evaluation of `gentle`: question k takes k - gain nats for ten bytes, and scores k/100 + gain."""
    folder = run / "eval" / stamp
    keys = {k: f"{k:016x}" for k in questions}
    write_jsonl(
        folder / "likelihood.jsonl",
        [
            {
                "arm": "gentle",
                "question_id": key,
                "answer": 0,
                "nll_nats": k - gain,
                "tokens": 5,
                "bytes": 10,
                "attempts": 1,
                "error": None,
            }
            for k, key in keys.items()
        ],
    )
    write_jsonl(
        folder / "scores.jsonl",
        [
            {
                "arm": "gentle",
                "question_id": key,
                "sample": 0,
                "text": "be kind",
                "finish_reason": "stop",
                "error": None,
                "scores": {"similarity_max": k / 100 + gain, "distinct_2": 1.0 if k > 20 else None},
            }
            for k, key in keys.items()
        ],
    )
    write_json(folder / "summary.json", {
        "format": FORMAT, "run": run.name, "stamp": stamp, "arms": {"gentle": {"kind": "adapter"}},
        "spec": {"format": FORMAT, "test_sha256": "t", "base": "tiny", "config": settings, "system_prompt": "be kind"},
    })  # fmt: skip
    write_json(run / "train.json", {})
    return folder


def test_columns_and_spread_are_over_shared_questions(tmp_path: Path) -> None:
    """Equal models, one asked forty questions and one sixty, of which ten are shared: no spread, one value, n ten."""
    one = evaluation(tmp_path / "one", range(1, 41))
    two = evaluation(tmp_path / "two", range(31, 91))
    found = compare(CompareConfig((str(one), str(two)))).document

    assert found["spread"]["bits_per_byte"]["sd"] == 0
    assert found["spread"]["similarity_max"] == {"mean": pytest.approx(0.355), "sd": 0}
    for metrics in found["metrics"].values():
        assert {name: cell["n"] for name, cell in metrics.items() if name != "perplexity"} == dict.fromkeys(
            ("bits_per_byte", "nll_per_token", "similarity_max", "distinct_2"), 10
        )
    assert found["warnings"] == []


def test_a_metric_is_over_the_questions_for_which_every_side_has_it(tmp_path: Path) -> None:
    """distinct-2 is undefined up to question 20: of questions 11 to 30 ten have it, on both sides."""
    folders = [evaluation(tmp_path / name, range(11, 31)) for name in ("one", "two")]
    found = compare(CompareConfig(tuple(map(str, folders)))).document["metrics"]["two:gentle"]

    assert (found["distinct_2"]["n"], found["similarity_max"]["n"]) == (10, 20)


def test_the_difference_is_that_of_the_columns(tmp_path: Path) -> None:
    """Half a point better on every shared question, though the second side also answered easier ones."""
    one = evaluation(tmp_path / "one", range(31, 61))
    two = evaluation(tmp_path / "two", range(1, 61), gain=0.5)
    found = compare(CompareConfig((str(one), str(two)))).document
    change = next(row for row in found["differences"] if row["metric"] == "similarity_max")
    values = [found["metrics"][label]["similarity_max"]["value"] for label in found["sides"]]

    assert change["value"] == pytest.approx(0.5)
    assert values[1] - values[0] == pytest.approx(0.5)


def test_no_shared_question_is_an_error(tmp_path: Path) -> None:
    """Instead of a table of unrelated values."""
    folders = [evaluation(tmp_path / name, asked) for name, asked in (("one", range(1, 9)), ("two", range(11, 19)))]

    with pytest.raises(UserError, match="no question in common"):
        compare(CompareConfig(tuple(map(str, folders))))


@pytest.mark.parametrize("name", SETTINGS)
def test_different_settings_are_a_warning(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each setting causes a difference that is not due to the models."""
    other = SETTINGS | {name: SETTINGS[name] / 2}
    folders = [evaluation(tmp_path / "one", range(1, 9)), evaluation(tmp_path / "two", range(1, 9), settings=other)]
    found = compare(CompareConfig(tuple(map(str, folders)))).document
    warning = f"the sides were evaluated with different {name}: one:gentle {SETTINGS[name]}, two:gentle {other[name]}"

    assert found["warnings"] == [warning]
    assert f"! {warning}" in capsys.readouterr().out


def test_old_rows_are_a_warning(tmp_path: Path) -> None:
    """A side whose rows an earlier version asked for is named."""
    folders = [evaluation(tmp_path / name, range(1, 9)) for name in ("one", "two")]
    summary = read_json(folders[1] / "summary.json")
    write_json(folders[1] / "summary.json", summary | {"spec": summary["spec"] | {"format": 2}})

    assert compare(CompareConfig(tuple(map(str, folders)))).document["warnings"] == [f"two:gentle: {OLD_ROWS}"]


def test_two_evaluations_of_one_run_have_different_labels(tmp_path: Path) -> None:
    """By their stamps, and compared; the same one twice is still refused."""
    stamps = ("20260101T000000Z", "20260102T000000Z")
    folders = [evaluation(tmp_path / "run", range(1, 9), stamp=stamp) for stamp in stamps]
    found = compare(CompareConfig(tuple(map(str, folders)))).document

    assert found["sides"] == [f"run/{stamp}:gentle" for stamp in stamps]
    assert [one.label for one in unique_labels([side(str(tmp_path / "run"))])] == ["run:gentle"]
    with pytest.raises(UserError, match="two or more different ones"):
        compare(CompareConfig((str(folders[0]), str(folders[0]))))
