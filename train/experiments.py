"""Several runs of one recipe: seeds, and how much of a score is leak.

`python -m train RECIPE --seeds 1,2,3` trains once per seed and reports mean and spread.

`python -m train leak-experiment RECIPE` trains under both splits, three seeds each. Every run sees the same number of
training rows, and the loss on its held-out rows is compared with the base's loss on the same rows. What the row split
gains beyond the question split is leak: those held-out questions were in training with another answer.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from train.files import write_json
from train.recipe import Recipe

SEEDS = (1, 2, 3)


def train_seeds(recipe: Recipe) -> dict[str, Any]:
    """One run per seed; the mean and the sample standard deviation of their best validation losses."""
    from train.sft import train

    runs = [train(recipe.with_seed(seed)) for seed in recipe.seeds]
    losses = [run["val_loss"] for run in runs]
    return {
        "runs": [run["run"] for run in runs],
        "adapters": [run["adapter"] for run in runs],
        "n": len(runs),
        "val_loss_mean": round(statistics.fmean(losses), 5),
        "val_loss_sd": round(statistics.stdev(losses), 5) if len(losses) > 1 else None,
        "val_losses": losses,
    }


def leak_experiment(recipe: Recipe) -> dict[str, Any]:
    """Train under both splits and several seeds (of split and training); draw gain by split into a PNG.

    A finished run of the experiment is read, not repeated, so that a stopped one can go on.
    """
    from train.plot import gains
    from train.run import Run
    from train.sft import train

    folder = Path(recipe.runs) / f"{recipe.name}-leak"
    found: dict[str, list[dict[str, Any]]] = {"row": [], "question": []}
    for seed in recipe.seeds or SEEDS:
        for split in found:
            one = dataclasses.replace(
                recipe, name=f"{split}-s{seed}", runs=str(folder), split=split, seed=seed, split_seed=seed, seeds=(),
                store="", samples=0, overwrite=True,
            )  # fmt: skip
            run = Run(one.run_path)
            summary = run.summary() if run.complete else train(one)
            gain = summary["val_loss_base"] - summary["val_loss"]
            found[split].append({"seed": seed, "gain": gain, **{k: summary[k] for k in ("val_loss_base", "val_loss")}})
            print(f"{split:<9} seed {seed}  base {summary['val_loss_base']:.4f}  tuned {summary['val_loss']:.4f}  "
                  f"gain {gain:.4f}", flush=True)  # fmt: skip
    mean = {split: statistics.fmean(run["gain"] for run in runs) for split, runs in found.items()}
    document = {
        "gain_mean": {split: round(value, 5) for split, value in mean.items()},
        "gain_sd": {split: round(statistics.stdev([run["gain"] for run in runs]), 5) if len(runs) > 1 else None
                    for split, runs in found.items()},
        "leak_share_of_gain": round(1 - mean["question"] / mean["row"], 4),
        "n": len(found["row"]),
        "runs": found,
        "figure": str(folder / "leak.png"),
    }  # fmt: skip
    gains({split: [run["gain"] for run in runs] for split, runs in found.items()}, folder / "leak.png")
    write_json(folder / "leak.json", document)
    return document
