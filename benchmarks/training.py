"""Training speed on this CPU: against plain TRL defaults, and on conversations against training turn by turn.

`make bench-train`, or `python -m benchmarks.training --rows 48`.

Two trainers run alternately, each in its own process, on the same rows in the same order, with the same LoRA config and
batch size:

  trl   SFTTrainer("folder", SFTConfig()), TRL's defaults: fp32 weights under bf16 autocast, activation checkpointing
  ours  what `python -m train` does

tokens_per_s counts real tokens (no padding) over the optimizer steps after the first, which warms up. val_loss is
computed by the same function for both trained models.

Then our trainer runs alternately on the same replies in two forms. Each conversation is EXCHANGES rows joined, and a
step has as many replies in both:

  conversations  one sequence per conversation, with the loss on each of its replies
  turns          one sequence per reply, with the history before it

reply_tokens_per_s counts the tokens that the loss counts. The last line is JSON: speedup_vs_trl and
conversation_speedup (medians of the ratios of paired runs, with their ranges), val_loss_ratio, peak memory.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.limit import known_shape, measure_limits
from counsel.catalog import resolve
from counsel.cli import Command, Result, main, option
from counsel.errors import UserError
from counsel.processor import processor
from train.recipe import Recipe

TRAINERS, FORMS = ("trl", "ours"), ("conversations", "turns")
# Sample rows have about 170 tokens, so a conversation of four fits in MAX_LENGTH.
EXCHANGES, MAX_LENGTH = 4, 2048


@dataclass(frozen=True)
class BenchTraining:
    """What to train, and how often."""

    base: str = option("smollm2-135m", "base model")
    data: str = option("sample", "conversations")
    rows: int = option(48, "training rows, each seen once")
    val_rows: int = option(32, "rows of the validation split scored at the end")
    batch_size: int = option(8, "rows per step")
    repeats: int = option(3, "runs of each trainer")
    learning_rate: float = option(5e-4, "peak learning rate")
    trainer: str = option(
        "",
        "run one part: trl, ours, conversations or turns, and print its results (the benchmark itself uses this)",
    )
    seed: int = option(42, "seed of the first pair of runs")


def bench_training(config: BenchTraining) -> Result:
    """Run both trainers and both forms of conversations alternately, or only the part that is named."""
    if config.trainer:
        if config.trainer not in (*TRAINERS, *FORMS):
            allowed = ", ".join((*TRAINERS, *FORMS))
            raise UserError(f"trainer is {config.trainer!r}; allowed: {allowed}; leave it out to compare them")
        return Result(run_trainer(config) if config.trainer in TRAINERS else run_form(config))
    shape = known_shape(resolve(config.base).path)
    measured = _alternately(config, TRAINERS)
    forms = _alternately(config, FORMS)
    pairs = list(zip(measured["ours"], measured["trl"], strict=True))
    speedups = [ours["tokens_per_s"] / trl["tokens_per_s"] for ours, trl in pairs]
    ratios = [ours["val_loss"] / trl["val_loss"] for ours, trl in pairs]
    print(
        f"ours / trl: {statistics.median(speedups):.2f}x ({min(speedups):.2f} to {max(speedups):.2f}), n={len(pairs)}"
    )
    gains = [
        whole["reply_tokens_per_s"] / parts["reply_tokens_per_s"]
        for whole, parts in zip(forms["conversations"], forms["turns"], strict=True)
    ]
    print(
        f"conversations / turns: {statistics.median(gains):.2f}x ({min(gains):.2f} to {max(gains):.2f}), n={len(gains)}"
    )
    limit = measure_limits(shape).training_tokens_s()
    return Result(
        {
            "speedup_vs_trl": round(statistics.median(speedups), 3),
            "speedup_range": [round(min(speedups), 3), round(max(speedups), 3)],
            "val_loss_ratio": round(statistics.median(ratios), 5),
            "val_loss_ratio_range": [round(min(ratios), 5), round(max(ratios), 5)],
            "conversation_speedup": round(statistics.median(gains), 3),
            "conversation_speedup_range": [round(min(gains), 3), round(max(gains), 3)],
            "reply_tokens_per_s": {name: [run["reply_tokens_per_s"] for run in runs] for name, runs in forms.items()},
            "exchanges": EXCHANGES,
            "n": len(pairs),
            "processor": str(processor()),
            "tokens_per_s": {name: [run["tokens_per_s"] for run in runs] for name, runs in measured.items()},
            "of_limit": {
                name: round(statistics.median(run["tokens_per_s"] for run in runs) / limit, 3)
                for name, runs in (measured | forms).items()
            },
            "peak_memory_bytes": {
                name: max(run["peak_memory_bytes"] for run in runs) for name, runs in measured.items()
            },
            "rows": config.rows,
            "base": config.base,
        }
    )


def _alternately(config: BenchTraining, names: tuple[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The figures of two parts, run in turn; the order alternates, so that a machine that slows down favors neither."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(config.repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            figures = _in_own_process(dataclasses.replace(config, trainer=name, seed=config.seed + repeat))
            measured[name].append(figures)
            loss = f"val loss {figures['val_loss']:.4f}  " if "val_loss" in figures else ""
            print(
                f"{name:<13} run {repeat + 1}  {figures['tokens_per_s']:7.1f} tok/s  "
                f"{loss}peak {figures['peak_memory_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
    return measured


def run_form(config: BenchTraining) -> dict[str, Any]:
    """Train our trainer in this process on conversations, whole or turn by turn."""
    from transformers import AutoTokenizer

    from counsel import catalog
    from train import data
    from train.prompts import encode

    whole = config.trainer == "conversations"
    batch_size = max(1, config.batch_size // EXCHANGES) if whole else config.batch_size
    recipe = _recipe(config, batch_size=batch_size, max_length=MAX_LENGTH)
    base = catalog.resolve(recipe.base)
    splits, _ = data.prepare(recipe.data_config())
    talks = _conversations(data.evenly_spaced(splits["train"], config.rows))
    rows = talks if whole else [talk[:end] for talk in talks for end in range(2, len(talk) + 1, 2)]
    encoded = encode(
        AutoTokenizer.from_pretrained(base.path), ({"messages": messages} for messages in rows), recipe.system,
        recipe.max_length, "all" if whole else "last",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        _, step_times_s = _train_ours(recipe, base, encoded, Path(scratch))
    replies = sum(label != -100 for tokens in encoded.sequences for label in tokens.labels)
    # Without the first step and its share of the tokens.
    tokens, share = sum(encoded.lengths), 1 - 1 / len(step_times_s)
    return {
        "tokens_per_s": round(tokens * share / sum(step_times_s[1:]), 1),
        "reply_tokens_per_s": round(replies * share / sum(step_times_s[1:]), 1),
        "replies": encoded.replies - encoded.replies_lost,
        "peak_memory_bytes": _peak_memory(),
        "steps": len(step_times_s),
    }


def _conversations(rows: list[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """Every EXCHANGES rows as the messages of one conversation; rows that do not fill one are left out."""
    from counsel.chat import conversation

    return [
        [message for row in rows[start : start + EXCHANGES] for message in conversation(row)]
        for start in range(0, len(rows) - EXCHANGES + 1, EXCHANGES)
    ]


def run_trainer(config: BenchTraining) -> dict[str, Any]:
    """Train in this process with the trainer that is named, and score the trained model."""
    from transformers import AutoTokenizer, set_seed

    from counsel import catalog
    from train import data
    from train.prompts import encode, examples

    recipe = _recipe(config, batch_size=config.batch_size)
    base = catalog.resolve(recipe.base)
    splits, _ = data.prepare(recipe.data_config())
    rows = data.evenly_spaced(splits["train"], config.rows)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    val = examples(data.evenly_spaced(splits["val"], config.val_rows), recipe.system)
    set_seed(config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        if config.trainer == "trl":
            trainer = trl_trainer(recipe, base.path, examples(rows, recipe.system), Path(scratch))
            step_times_s = time_steps(trainer)
            trainer.train()
        else:
            encoded = encode(tokenizer, rows, recipe.system, recipe.max_length, recipe.train_on_turns)
            trainer, step_times_s = _train_ours(recipe, base, encoded, Path(scratch))
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
    return {
        # Without the first step and its share of the tokens.
        "tokens_per_s": round(tokens * (1 - 1 / len(step_times_s)) / sum(step_times_s[1:]), 1),
        "peak_memory_bytes": _peak_memory(),
        "val_loss": mean_answer_loss(trainer.model, tokenizer, val, recipe.max_length),
        "steps": len(step_times_s),
    }


def mean_answer_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> float:
    """Mean loss per answer token by full logits, one row at a time: the same measure for every trained model."""
    import torch

    total, count = 0.0, 0
    model.eval()
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)[:max_length]
        ids = torch.tensor([whole])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(whole) - len(prompt)
    return total / count


def _recipe(config: BenchTraining, **changes: Any) -> Recipe:
    return Recipe(
        base=config.base, data=config.data, learning_rate=config.learning_rate, seed=config.seed, **changes
    )  # fmt: skip


def _peak_memory() -> int:
    from train.sft import peak_memory

    return peak_memory("cpu")


def trl_trainer(recipe: Recipe, folder: Path, rows: list[dict[str, Any]], scratch: Path, device: str = "cpu") -> Any:
    """Plain TRL's trainer with its defaults, and the recipe's LoRA config, batch size and learning rate."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from train.lora import lora_config

    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=1,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio,
        seed=recipe.seed,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    # The recipe's own LoRA config for both, so that plain TRL trains the same parameters.
    return SFTTrainer(
        str(folder), args=arguments, train_dataset=Dataset.from_list(rows), peft_config=lora_config(recipe)
    )


def _train_ours(recipe: Recipe, base: Any, encoded: Any, scratch: Path) -> tuple[Any, list[float]]:
    """Our trainer after training, and the seconds of each of its steps."""
    from transformers import AutoTokenizer

    from counsel.run import Run
    from train import sft
    from train.arguments import trainer_arguments
    from train.cpu.loss import keep_freed_memory
    from train.hardware import choose_precision, detect_training_hardware
    from train.lora import lora_config
    from train.prompts import encode
    from train.trainer import AnswerTrainer

    precision, lora = choose_precision(recipe, detect_training_hardware()), lora_config(recipe)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = sft.load_base(recipe, precision, base)
    if reason := sft.slow_path_reason(recipe, precision, model, lora):
        raise UserError(f"the fast path is off, so there is nothing to measure: {reason}")
    keep_freed_memory()
    arguments = trainer_arguments(recipe, precision, Run(scratch), validate=False)
    arguments.save_strategy = "no"
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        training=encoded,
        validation=encode(tokenizer, [], recipe.system, recipe.max_length, recipe.train_on_turns),
        processing_class=tokenizer,
        peft_config=lora,
        fast=True,
    )
    step_times_s = time_steps(trainer)
    trainer.train()
    return trainer, step_times_s


def time_steps(trainer: Any) -> list[float]:
    """Return a list to which each optimizer step adds its seconds."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    trainer.add_callback(Clock())
    return seconds


def _in_own_process(config: BenchTraining) -> dict[str, Any]:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in dataclasses.asdict(config).items()]
    done = subprocess.run([sys.executable, "-m", "benchmarks.training", *flags], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UserError(f"the {config.trainer} trainer failed: {reason}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    sys.exit(
        main(
            "benchmarks.training",
            {
                "": Command(
                    BenchTraining, bench_training, "measure training speed against plain TRL defaults, on this CPU"
                )
            },
        )
    )
