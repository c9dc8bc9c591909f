"""Several runs of one recipe: seeds, and the leak experiment, whose two splits differ only in the leak."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.files import read_json, write_jsonl
from tests.tiny import tiny_base
from tests.train_runs import contents, recipe_for
from train import data
from train.data import DataConfig, evenly_spaced
from train.experiments import equal_counts, leak_experiment, seen_share, whole_questions


def row(question: str, answer: int) -> dict[str, str]:
    return {"question_id": question, "question": question, "answer": f"answer {answer} to {question}", "topic": ""}


def test_fewer_rows_are_fewer_whole_questions():
    """Of questions with 3, 1, 2 and 1 answers, evenly spaced ones are kept until the rows suffice."""
    rows = [row(question, n) for question, count in (("a", 3), ("b", 1), ("c", 2), ("d", 1)) for n in range(count)]

    def kept(limit: int) -> list[str]:
        return [row["question_id"] for row in whole_questions(rows, limit)]

    assert kept(3) == ["a"] * 3
    assert kept(4) == ["a", "a", "a", "c", "c"]
    assert kept(6) == ["a", "a", "a", "b", "c", "c"]
    assert kept(7) == kept(99) == ["a", "a", "a", "b", "c", "c", "d"]


def test_both_splits_give_the_same_number_of_rows(tmp_path):
    """Every split by either unit has that many rows, and one of them has no more."""
    text = "a question about work number"
    rows = [
        {"Context": f"{text} {n}", "Response": f"breathe slowly and talk to friend {n} or {k}"}
        for n in range(60)
        for k in range(n % 4)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(data=str(tmp_path / "rows.jsonl"), val_share=0.2, test_share=0.0)

    n_train, n_val = equal_counts(config, (1, 2))

    splits = [data.prepare(replace(config, split=unit, split_seed=seed))[0] for unit in ("row", "question")
              for seed in (1, 2)]  # fmt: skip
    assert len({len(split["train"]) for split in splits}) > 1
    for name, count in (("train", n_train), ("val", n_val)):
        assert {len(evenly_spaced(split[name], count)) for split in splits} == {count}
        assert count in {len(split[name]) for split in splits}


def test_seen_share_counts_scored_rows_with_a_trained_question():
    """Two of the four scored rows have a trained question; with fewer trained rows, one has."""
    trained = [row("a", 1), row("b", 1)]
    scored = [row("a", 2), row("b", 2), row("c", 1), row("d", 1)]

    assert seen_share(trained, scored, 2, 4) == 0.5
    assert seen_share(trained, scored, 1, 4) == 0.25


def test_leak_experiment_uses_equal_row_counts_and_resumes(tmp_path, capsys):
    """Both splits train and score equally many rows, before and after training; finished runs are not repeated."""
    base = tiny_base(tmp_path / "base", "llama")
    recipe = recipe_for(base, tmp_path, max_val_rows=6, seeds=(1,))

    done = leak_experiment(recipe)

    folder = Path(recipe.runs) / "tiny-leak"
    (by_row,), (by_question,) = done["runs"]["row"], done["runs"]["question"]
    assert by_row["rows"] == by_question["rows"] == done["train_rows"] <= 24
    assert by_question["seen_share"] == 0 < by_row["seen_share"]
    for unit, run in (("row", by_row), ("question", by_question)):
        logged = [json.loads(line) for line in (folder / f"{unit}-s1" / "metrics.jsonl").read_text().splitlines()]
        before, after = (row["val_loss"] for row in logged if "val_loss" in row)
        assert run["gain"] == pytest.approx(before - after)
    assert done["leak_share_of_gain"] == pytest.approx(1 - by_question["gain"] / by_row["gain"], abs=1e-3)
    assert read_json(folder / "leak.json") == done
    assert (folder / "leak.png").read_bytes()[:4] == b"\x89PNG"

    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/train.json")}
    assert leak_experiment(recipe) == done
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/train.json")} == finished
    with pytest.raises(UserError, match="rank is 2"):
        leak_experiment(replace(recipe, rank=2))


def test_seeds_added_later_do_not_mix_row_counts(tmp_path, capsys):
    """Every run trains on the same number of rows: a run with more is repeated, and fewer seeds reuse finished runs."""
    base = tiny_base(tmp_path / "base", "llama")
    recipe = recipe_for(base, tmp_path, max_rows=None, max_val_rows=99, max_steps=2, store="")
    config = replace(recipe, val_share=0.2, test_share=0.0).data_config()
    seeds = sorted(range(1, 9), key=lambda seed: equal_counts(config, (seed,)), reverse=True)
    more, fewer = seeds[0], seeds[-1]
    assert equal_counts(config, (more,)) > equal_counts(config, (fewer,))

    alone = leak_experiment(replace(recipe, seeds=(more,)))
    both = leak_experiment(replace(recipe, seeds=(more, fewer)))

    counts = equal_counts(config, (more, fewer))
    assert (both["train_rows"], both["held_out_rows"]) == counts < (alone["train_rows"], alone["held_out_rows"])
    assert {run["rows"] for runs in both["runs"].values() for run in runs} == {counts[0]}
    assert "trained again" in capsys.readouterr().out
    again = leak_experiment(replace(recipe, seeds=(more,)))
    assert again["runs"]["row"] == both["runs"]["row"][:1]
    assert "trained again" not in capsys.readouterr().out


def test_an_experiment_resumes_with_its_own_data_only(tmp_path):
    """Other data under the same name is refused, and the rows of the finished runs are kept."""
    base = tiny_base(tmp_path / "base", "llama")
    recipe = recipe_for(base, tmp_path, max_steps=2, seeds=(1,), store="")
    leak_experiment(recipe)
    before = (Path(recipe.runs) / "tiny-leak" / "rows.jsonl").read_bytes()
    lines = Path(recipe.data).read_text().splitlines(keepends=True)
    Path(recipe.data).write_text("".join(lines[::-1]))

    with pytest.raises(UserError, match="not those that experiment 'tiny-leak' was started with"):
        leak_experiment(recipe)
    assert (Path(recipe.runs) / "tiny-leak" / "rows.jsonl").read_bytes() == before


def test_overwrite_removes_experiments_only(tmp_path):
    """A folder that is not an experiment is not removed, and neither is one that contains the new one's data."""
    recipe = recipe_for(tmp_path / "base", tmp_path, overwrite=True)
    folder = Path(recipe.runs) / "tiny-leak"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an earlier run"):
        leak_experiment(recipe)
    (folder / "config.json").write_text("{}")
    write_jsonl(folder / "rows.jsonl", [row("a", 1)])
    with pytest.raises(UserError, match=r"data is .* inside the run"):
        leak_experiment(replace(recipe, data=str(folder / "rows.jsonl")))
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


def test_seeds_give_mean_and_standard_deviation(base, tmp_path):
    """Two seeds are two runs; the mean and the standard deviation are those of their validation losses."""
    from train.experiments import train_seeds

    done = train_seeds(recipe_for(base, tmp_path, seeds=(1, 2), samples=0, max_steps=2, evaluations=1, store=""))

    one, two = (read_json(tmp_path / "runs" / f"tiny-s{seed}" / "train.json")["val_loss"] for seed in (1, 2))
    assert one != two
    assert done["val_loss_mean"] == pytest.approx((one + two) / 2, abs=1e-5)
    assert done["val_loss_sd"] == pytest.approx(abs(one - two) / 2**0.5, abs=1e-5)


def test_seeds_resume_and_need_no_validation(base, tmp_path):
    """With --resume, finished seeds are read and others trained; without validation rows there is no mean."""
    from train.experiments import train_seeds

    recipe = recipe_for(base, tmp_path, seeds=(1,), samples=0, max_steps=2, evaluations=1, store="", val_share=0.0)
    first = train_seeds(recipe)
    assert (first["val_loss_mean"], first["val_loss_sd"], first["val_losses"]) == (None, None, [])
    before = contents(tmp_path / "runs" / "tiny-s1")

    both = train_seeds(replace(recipe, seeds=(1, 2), resume=True))

    assert both["n"] == 2
    assert contents(tmp_path / "runs" / "tiny-s1") == before
    assert (tmp_path / "runs" / "tiny-s2" / "train.json").is_file()
    with pytest.raises(UserError, match="rank is 8"):
        train_seeds(replace(recipe, seeds=(1, 2), resume=True, rank=8))
