"""Several runs of one recipe: one per seed, or the leak experiment.

`python -m train RECIPE --seeds 1,2,3` trains once per seed and reports the mean and the standard deviation.

`python -m train leak-experiment RECIPE` trains with both splits, three seeds each. Every run trains on the same number
of rows, and is scored on the same number of held-out rows, before and after training, so no checkpoint is chosen by the
rows it is scored on. A run's gain is the base's loss on its held-out rows minus its own. What the row split gains
beyond the question split is leak: those held-out questions were in training, with another answer.

`--max-rows` makes it cheaper by leaving out whole questions. Leaving out single rows would reduce the leak too.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json, read_jsonl, replaced_directory, write_json, write_jsonl
from counsel.run import Run
from train import data
from train.data import DEFAULT_TOPIC_COLUMN, DataConfig, Row, evenly_spaced
from train.recipe import Recipe
from train.resume import as_json, check_replaceable, check_run_directory, check_same_settings
from train.sft import train

SEEDS = (1, 2, 3)
UNITS = ("row", "question")
# In the experiment's folder: the rows of all its runs, and how many of them each run trains on and is scored on.
ROWS, COUNTS = "rows.jsonl", "counts.json"


def train_seeds(recipe: Recipe) -> dict[str, Any]:
    """One run per seed; the mean and the sample standard deviation of their best validation losses.

    With `resume`, a finished run is read, a stopped run continues, and a missing run is trained. Without validation
    rows there is no loss to report, and its fields are None.
    """
    runs = [_train_seed(recipe.with_seed(seed)) for seed in recipe.seeds]
    losses = [run["val_loss"] for run in runs if run["val_loss"] is not None]
    return {
        "runs": [run["run"] for run in runs],
        "adapters": [run["adapter"] for run in runs],
        "n": len(runs),
        "val_loss_mean": round(statistics.fmean(losses), 5) if losses else None,
        "val_loss_sd": round(statistics.stdev(losses), 5) if len(losses) > 1 else None,
        "val_losses": losses,
    }


def _train_seed(recipe: Recipe) -> dict[str, Any]:
    run = Run(recipe.run_path)
    if not recipe.resume or not run.path.exists():
        return train(dataclasses.replace(recipe, resume=False))
    if not run.complete:
        return train(recipe)
    check_same_settings(recipe)
    return run.summary()


def leak_experiment(recipe: Recipe) -> dict[str, Any]:
    """Train with both splits and several seeds (of split and training); draw the gain by split into a PNG.

    Finished runs are read, not repeated, so a stopped experiment can continue; they are repeated only if added seeds
    leave fewer rows to every run. Raises UserError if the experiment was started with other settings or other data.
    """
    from train.plot import gains

    experiment = dataclasses.replace(recipe, name=f"{recipe.name}-leak")
    folder, seeds = experiment.run_path, recipe.seeds or SEEDS
    resuming = folder.exists() and not recipe.overwrite
    if resuming:
        check_run_directory(dataclasses.replace(experiment, resume=True))
    elif folder.exists():
        check_replaceable(experiment, ("config.json", ROWS))
    held_out = recipe.val_share + recipe.test_share
    rows: Sequence[Row] = data.load_rows(recipe.data_config()).cleaned.rows
    if recipe.max_rows is not None:
        rows = whole_questions(rows, round(recipe.max_rows / (1 - held_out)))
    if not resuming:
        with replaced_directory(folder) as new:
            write_json(new / "config.json", experiment.document())
            write_jsonl(new / ROWS, rows)
    elif read_jsonl(folder / ROWS) != rows:
        raise UserError(
            f"the rows of {recipe.data!r} are not those that experiment {experiment.name!r} was started with; "
            "start again with --overwrite, or choose another --name"
        )
    common = dataclasses.replace(
        recipe, data=str(folder / ROWS), revision="", question_column="question", answer_column="answer",
        topic_column=DEFAULT_TOPIC_COLUMN, val_share=held_out, test_share=0.0, runs=str(folder), store="", seeds=(),
        evaluations=1, patience=0, samples=0, resume=False, overwrite=True,
    )  # fmt: skip
    n_train, n_val = equal_counts(common.data_config(), seeds)
    n_train, n_val = min(n_train, recipe.max_rows or n_train), min(n_val, recipe.max_val_rows)
    if resuming and (folder / COUNTS).is_file():
        # Fewer seeds may allow more rows, but finished runs are not repeated for that.
        counts = read_json(folder / COUNTS)
        n_train, n_val = min(n_train, counts["train_rows"]), min(n_val, counts["held_out_rows"])
    write_json(folder / COUNTS, {"train_rows": n_train, "held_out_rows": n_val})
    print(f"{2 * len(seeds)} runs, each on {n_train} rows, scored on {n_val} held-out rows", flush=True)
    results: dict[str, list[dict[str, Any]]] = {unit: [] for unit in UNITS}
    for seed in seeds:
        for unit in UNITS:
            one = dataclasses.replace(
                common, name=f"{unit}-s{seed}", split=unit, seed=seed, split_seed=seed, max_rows=n_train,
                max_val_rows=n_val,
            )  # fmt: skip
            run = Run(one.run_path)
            if run.complete and not same_run(run, one):
                print(f"{unit:<9} seed {seed}  is trained again, with the new row counts", flush=True)
            summary = run.summary() if run.complete and same_run(run, one) else train(one)
            scores = {key: summary[key] for key in ("rows", "tokens", "val_loss_base", "val_loss")}
            gain = summary["val_loss_base"] - summary["val_loss"]
            share = seen_share(run.split("train"), run.split("val"), n_train, n_val)
            results[unit].append({"seed": seed, "gain": gain, "seen_share": share, **scores})
            print(f"{unit:<9} seed {seed}  base {summary['val_loss_base']:.4f}  tuned {summary['val_loss']:.4f}  "
                  f"gain {gain:.4f}  {share:.0%} of the questions seen in training", flush=True)  # fmt: skip
    values = {unit: [run["gain"] for run in runs] for unit, runs in results.items()}
    mean = {unit: statistics.fmean(gained) for unit, gained in values.items()}
    document = {
        "gain_mean": {unit: round(value, 5) for unit, value in mean.items()},
        "gain_sd": {unit: round(statistics.stdev(gained), 5) if len(gained) > 1 else None
                    for unit, gained in values.items()},
        # A share is undefined without a gain.
        "leak_share_of_gain": round(1 - mean["question"] / mean["row"], 4) if mean["row"] > 0 else None,
        "n": len(seeds),
        "train_rows": n_train,
        "held_out_rows": n_val,
        "runs": results,
        "figure": str(folder / "leak.png"),
    }  # fmt: skip
    gains(values, folder / "leak.png")
    write_json(folder / "leak.json", document)
    return document


def same_run(run: Run, recipe: Recipe) -> bool:
    """Whether a finished run has the settings of `recipe`, and so its number of rows."""
    return run.config() == as_json(recipe.document())


def whole_questions(rows: Sequence[Row], limit: int) -> list[Row]:
    """At least `limit` rows: evenly spaced questions with all their answers. Every row if there are fewer."""
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(row["question_id"], []).append(row)
    for count in range(1, len(by_question)):
        kept = [row for question in evenly_spaced(list(by_question), count) for row in by_question[question]]
        if len(kept) >= limit:
            return kept
    return list(rows)


def equal_counts(config: DataConfig, seeds: Sequence[int]) -> tuple[int, int]:
    """(training rows, held-out rows) that every split of `config`, by either unit and with any of the seeds, has."""
    rows = data.load_rows(config).cleaned.rows
    splits = [
        data.full_splits(rows, dataclasses.replace(config, split=unit, split_seed=seed))
        for unit in UNITS
        for seed in seeds
    ]
    return min(len(split["train"]) for split in splits), min(len(split["val"]) for split in splits)


def seen_share(train_rows: Sequence[Row], held_out: Sequence[Row], n_train: int, n_val: int) -> float:
    """The share of the `n_val` scored rows whose question is also among the `n_train` trained ones."""
    trained = {row["question_id"] for row in evenly_spaced(train_rows, n_train)}
    scored = evenly_spaced(held_out, n_val)
    return round(sum(row["question_id"] in trained for row in scored) / len(scored), 4)
