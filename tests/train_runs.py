"""Tiny training runs: the recipe and the commands that the training tests share."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from counsel.files import read_jsonl, write_jsonl
from tests.tiny import WORDS
from train.recipe import Recipe

ROOT = Path(__file__).parent.parent


def short_rows(folder: Path) -> str:
    """The path of 80 short rows for 40 questions: rows of the sample have ten times the tokens and test no more."""
    words, draw = WORDS.split(), random.Random(0)
    rows = [
        {"Context": f"{' '.join(draw.choices(words, k=6))} {n}", "Response": " ".join(draw.choices(words, k=12))}
        for n in range(40)
    ]
    rows += [{**row, "Response": " ".join(draw.choices(words, k=12))} for row in rows]
    path = folder / "short.jsonl"
    write_jsonl(path, rows)
    return str(path)


def recipe_for(base: Path, folder: Path, **changes) -> Recipe:
    """A run of eight steps on twenty-four rows; it takes about a second."""
    return replace(
        Recipe(
            name="tiny",
            base=str(base),
            data=short_rows(folder),
            runs=str(folder / "runs"),
            store=str(folder / "store"),
            max_rows=24,
            max_val_rows=4,
            batch_size=3,
            learning_rate=0.01,
            rank=4,
            alpha=8,
            evaluations=4,
            samples=1,
            max_length=1000,
            system="listen",
        ),
        **changes,
    )


def finished_run(base: Path, folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """Train a tiny run to its end; return its recipe and its summary."""
    from train.sft import train

    recipe = recipe_for(base, folder)
    return recipe, train(recipe)


def run_command(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def flags_of(recipe: Recipe) -> list[str]:
    plain = Recipe()
    changed = {key.replace("_", "-"): value for key, value in vars(recipe).items() if value != getattr(plain, key)}
    return [
        (f"--{key}" if value else f"--no-{key}") if isinstance(value, bool) else f"--{key}={value}"
        for key, value in changed.items()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(recipe: Recipe) -> list[tuple]:
    return [(r["step"], r.get("loss"), r.get("val_loss"), r["tokens"])
            for r in read_jsonl(recipe.run_path / "metrics.jsonl")]  # fmt: skip


def interrupt_at(monkeypatch, step: int) -> None:
    """Press Ctrl-C once, when that step is logged."""
    from train.progress import TrainingProgress

    whole, pressed = TrainingProgress.on_log, []

    def on_log(self, args, state, *given, **named):
        whole(self, args, state, *given, **named)
        if state.global_step == step and not pressed:
            pressed.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "on_log", on_log)
