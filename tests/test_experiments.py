"""Several runs of one recipe: that the two splits of the leak experiment differ in nothing but the leak."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.files import read_json, write_jsonl
from tests.test_train import recipe_for
from tests.tiny import tiny_base
from train import data
from train.data import DataConfig
from train.experiments import equal_counts, leak_experiment, seen_share, whole_questions
from train.sft import evenly_spaced


def row(question: str, answer: int) -> dict[str, str]:
    return {"question_id": question, "question": question, "answer": f"answer {answer} to {question}", "topic": ""}


def test_fewer_rows_are_fewer_whole_questions():
    """Of questions with 3, 1, 2 and 1 answers, evenly spaced ones are kept until there are enough rows."""
    rows = [row(question, n) for question, count in (("a", 3), ("b", 1), ("c", 2), ("d", 1)) for n in range(count)]

    def kept(limit: int) -> list[str]:
        return [row["question_id"] for row in whole_questions(rows, limit)]

    assert kept(3) == ["a"] * 3
    assert kept(4) == ["a", "a", "a", "c", "c"]
    assert kept(6) == ["a", "a", "a", "b", "c", "c"]
    assert kept(7) == kept(99) == ["a", "a", "a", "b", "c", "c", "d"]


def test_both_splits_give_the_same_number_of_rows(tmp_path):
    """What is agreed on can be had from every split by either unit, and from one of them it is everything."""
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
    """Two of the four scored rows ask what was trained on; with fewer trained rows, one."""
    trained = [row("a", 1), row("b", 1)]
    scored = [row("a", 2), row("b", 2), row("c", 1), row("d", 1)]

    assert seen_share(trained, scored, 2, 4) == 0.5
    assert seen_share(trained, scored, 1, 4) == 0.25


def test_leak_experiment_trains_alike_and_goes_on_where_it_stopped(tmp_path, capsys):
    """Both splits train and score equally many rows, once before and once after; what is finished is not repeated."""
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
    """Every run of the table trains on as many rows; what was finished on more is trained again, and fewer seeds go
    on with what is there."""
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


def test_an_experiment_goes_on_with_its_own_data_only(tmp_path):
    """Another file under the same name is refused, and the rows that the finished runs saw stay."""
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
    """A folder that is no experiment is not removed, and neither is one whose data the new one would read."""
    recipe = recipe_for(tmp_path / "base", tmp_path, overwrite=True)
    folder = Path(recipe.runs) / "tiny-leak"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no earlier run"):
        leak_experiment(recipe)
    (folder / "config.json").write_text("{}")
    write_jsonl(folder / "rows.jsonl", [row("a", 1)])
    with pytest.raises(UserError, match=r"data is .* inside the run"):
        leak_experiment(replace(recipe, data=str(folder / "rows.jsonl")))
    assert (folder / "notes.txt").read_text() == "mine"
