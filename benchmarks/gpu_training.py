"""The training half of the GPU proof: our trainer against TRL's defaults, and the 4-bit reference recipe.

tokens_per_s counts real tokens over the optimizer steps after the first, which warms up. Each trainer has a process of
its own, so that peak_memory_bytes is its own.
"""

import itertools
import math
from pathlib import Path
from typing import Any

from benchmarks.steps import Figures
from benchmarks.training import time_steps, trl_trainer
from counsel import catalog
from counsel.cli import load_config
from counsel.files import read_jsonl
from train.recipe import RECIPES, Recipe

REFERENCE_STEPS = 6


def recipe(work: Path, tiny: bool) -> Recipe:
    """What both trainers train."""
    return Recipe(
        name="ours", base=str(work / "llama-1b"), runs=str(work / "runs"), store="", overwrite=True, system="listen",
        batch_size=2 if tiny else 8, max_steps=3 if tiny else 16, max_length=1024, evaluations=1, samples=0,
        max_val_rows=2,
    )  # fmt: skip


def train_ours(work: Path, tiny: bool) -> Figures:
    """`counsel train` on rows of the sample set."""
    from train.sft import train

    chosen = recipe(work, tiny)
    summary = train(chosen)
    steps = [row for row in read_jsonl(chosen.run_path / "metrics.jsonl") if "loss" in row]
    tokens = [after["tokens"] - before["tokens"] for before, after in itertools.pairwise(steps)]
    seconds = sum(n / row["tokens_per_s"] for n, row in zip(tokens, steps[1:], strict=True))
    return {
        "ok": None,
        "tokens_per_s": round(sum(tokens) / seconds, 1),
        "steps": len(steps),
        "loss_last": steps[-1]["loss"],
        **_of_summary(summary),
    }


def train_trl(work: Path, tiny: bool, device: str) -> Figures:
    """SFTTrainer with TRL's defaults on the same rows: float32 weights under bfloat16 autocast, checkpointing."""
    from transformers import set_seed

    from train import data
    from train.prompts import examples
    from train.sft import peak_memory

    chosen = recipe(work, tiny)
    splits, _ = data.prepare(chosen.data_config())
    set_seed(chosen.seed)
    base = catalog.resolve(chosen.base)
    trainer = trl_trainer(chosen, base.path, examples(splits["train"], chosen.system), work / "trl", device)
    trainer.args.logging_steps = 1
    seconds = time_steps(trainer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "num_tokens" in row]
    return {
        "ok": None,
        "tokens_per_s": round((logged[len(seconds) - 1]["num_tokens"] - logged[0]["num_tokens"]) / sum(seconds[1:]), 1),
        "steps": len(seconds),
        "loss_last": logged[len(seconds) - 1]["loss"],
        "peak_memory_bytes": peak_memory(device),
    }


def train_reference(work: Path, device: str) -> Figures:
    """Six steps of the recipe `reference`: a 4-bit base of Gemma 2's shape, rank 64, a paged 8-bit optimizer."""
    from train.sft import train

    changes = {
        "base": str(work / "gemma2-2b"), "data": "sample", "runs": str(work / "runs"), "store": "", "overwrite": True,
        "system": "listen", "max_steps": REFERENCE_STEPS, "evaluations": 2, "max_val_rows": 2, "samples": 0,
    }  # fmt: skip
    chosen = load_config(Recipe, str(RECIPES / "reference.yaml"), changes)
    summary = train(chosen)
    losses = [summary["val_loss_base"], summary["val_loss"], summary["train_loss_last"]]
    whole = summary["steps"] == REFERENCE_STEPS and all(math.isfinite(loss) for loss in losses)
    return {
        # On a GPU the recipe must run as it is written.
        "ok": whole and (device != "cuda" or not summary["downgrades"]),
        "steps": summary["steps"],
        "tokens_per_s": summary["tokens_per_s"],
        "val_loss_base": summary["val_loss_base"],
        "val_loss": summary["val_loss"],
        "estimated_memory_bytes": estimated_memory(chosen),
        **_of_summary(summary),
    }


def estimated_memory(chosen: Recipe) -> int:
    """What the checks before the training estimate, for rows of full length, in bytes."""
    from transformers import AutoConfig

    from train.hardware import choose_precision, detect_training_hardware
    from train.lora import adapted_layers
    from train.memory import estimate_memory

    folder = Path(chosen.base)
    config = AutoConfig.from_pretrained(folder)
    weight_bytes = sum(file.stat().st_size for file in catalog.weight_files(folder))
    precision = choose_precision(chosen, detect_training_hardware())
    layers = adapted_layers(chosen, config)
    return estimate_memory(chosen, precision, weight_bytes, config, layers, chosen.max_length).total


def _of_summary(summary: dict[str, Any]) -> Figures:
    return {key: summary[key] for key in ("peak_memory_bytes", "rows_left_out", "downgrades")}
