"""Reports on a training run: metrics.jsonl, sample answers, and a line on stderr with the time left.

metrics.jsonl has one object per line, for each step and each evaluation:

  step          optimizer steps done (0: before the first)
  epoch         passes over the training rows, fractional
  loss          training loss of this step: mean over its answer tokens, in nats (steps only)
  val_loss      mean over the validation answers' tokens, in nats (evaluations only)
  lr            learning rate of this step (steps only)
  tokens        real tokens (prompt and answer, no padding) trained on so far
  reward_margin, reward_accuracy  of train dpo: chosen less rejected reward, and the share of pairs where it is above 0
  tokens_per_s  of this step, without evaluation and checkpoints (steps only)

samples.jsonl has one object per line: step, question, answer (greedy, at most 64 tokens).
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from counsel.errors import UserError
from counsel.files import read_jsonl, write_jsonl
from counsel.run import Run

SAMPLE_TOKENS = 64
_REWARDS = {"rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy"}
PRINT_EVERY_S = 10.0


class TrainingProgress(TrainerCallback):
    """Writes what the trainer logs to files, and prints progress.

    prompts: {question: rendered prompt} to answer at each evaluation.
    """

    def __init__(self, run: Run, tokenizer: Any, prompts: dict[str, str]) -> None:
        self.metrics_path = run.path / "metrics.jsonl"
        self.samples_path = run.path / "samples.jsonl"
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.train_s = 0.0
        self.session_tokens = 0
        self._tokens_before = 0
        self._started = self._printed = time.monotonic()
        self._step_started = self._step_s = 0.0
        self._steps = 0
        self._validations: list[float] = []
        self._validating_since: float | None = None
        self._validated = 0
        self._loss = self._val_loss = math.nan

    @property
    def tokens(self) -> int:
        """Real tokens trained on since the run began, also before a --resume."""
        return self._tokens_before + self.session_tokens

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second over the steps of this process."""
        return self.session_tokens / self.train_s if self.train_s else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        # The steps that a killed run logged after its last checkpoint are trained and logged again.
        for path in (self.metrics_path, self.samples_path):
            logged = read_jsonl(path, torn=True) if path.is_file() else []
            kept = [row for row in logged if row["step"] <= state.global_step]
            write_jsonl(path, kept if state.global_step else [])
        self._tokens_before = max((row["tokens"] for row in read_jsonl(self.metrics_path)), default=0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_s = time.perf_counter() - self._step_started
        self.train_s += self._step_s
        self._steps += 1

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if self._validating_since is None:
            self._validating_since, self._validated = now, 0
        self._validated += 1
        # The validation before the first step can take half a minute or more on a CPU.
        if state.is_world_process_zero and now - self._printed >= PRINT_EVERY_S:
            self._print(f"validation   batch {self._validated} of {len(eval_dataloader)}", keep=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "eval_loss" in logs:
            value = self._val_loss = logs["eval_loss"]
            row |= {"val_loss": value, "tokens": self.tokens}
        elif "loss" in logs:
            value = self._loss = logs["loss"]
            step_tokens = int(logs["num_tokens"]) - self.session_tokens
            self.session_tokens += step_tokens
            row |= {"loss": value, "lr": logs["learning_rate"], "tokens": self.tokens}
            row |= {ours: logs[theirs] for theirs, ours in _REWARDS.items() if theirs in logs}
            row["tokens_per_s"] = round(step_tokens / self._step_s, 1)
        else:
            return
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {state.global_step}; lower --learning-rate (now {args.learning_rate:g}) "
                "and start again with --overwrite"
            )
        if state.is_world_process_zero:
            _append(self.metrics_path, row)
            self._print_progress(args, state, evaluated="eval_loss" in logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self._answer_samples(args, state, model)
        if self._validating_since is not None:
            self._validations.append(time.monotonic() - self._validating_since)
            self._validating_since = None

    def _answer_samples(self, args: Any, state: Any, model: Any) -> None:
        # With several processes, all of them would have to generate.
        if not self.prompts or args.world_size > 1:
            return
        answers = greedy_answers(model, self.tokenizer, list(self.prompts.values()), SAMPLE_TOKENS)
        for question, answer in zip(self.prompts, answers, strict=True):
            _append(self.samples_path, {"step": state.global_step, "question": question, "answer": answer})

    def _print_progress(self, args: Any, state: Any, evaluated: bool) -> None:
        now = time.monotonic()
        if not (evaluated or sys.stderr.isatty() or now - self._printed >= PRINT_EVERY_S):
            return
        left_s = seconds_left(
            state.max_steps - state.global_step, self._steps, self.train_s, args.eval_steps, self._validations
        )
        line = f"step {state.global_step:>4}/{state.max_steps}  epoch {state.epoch or 0:.2f}"
        line += "".join(
            f"  {name} {value:.3f}"
            for name, value in (("loss", self._loss), ("val", self._val_loss))
            if not math.isnan(value)
        )
        line += f"  {self.tokens_per_s:.0f} tok/s" if self._steps else ""
        line += f"  {_clock(now - self._started)} elapsed"
        line += "" if left_s is None else f", {_clock(left_s)} left"
        self._print(line, keep=evaluated)

    def _print(self, line: str, keep: bool) -> None:
        """Print one line on stderr. On a terminal the next line overwrites it, unless `keep` is true."""
        self._printed = time.monotonic()
        terminal = sys.stderr.isatty()
        print(f"\r{line}\x1b[K" if terminal else line, end="\n" if keep or not terminal else "", file=sys.stderr)
        sys.stderr.flush()


def seconds_left(
    steps_left: int, steps_done: int, train_s: float, steps_per_validation: float | None, validations_s: Sequence[float]
) -> float | None:
    """Seconds until the last step and its validation are done; None before the first step.

    Steps and validations are estimated separately: on a CPU one validation takes as long as many steps.
    train_s: seconds of the steps done. validations_s: seconds of each validation so far.
    """
    if not steps_done:
        return None
    left_s = steps_left * train_s / steps_done
    if validations_s and steps_per_validation:
        left_s += math.ceil(steps_left / steps_per_validation) * sum(validations_s) / len(validations_s)
    return left_s


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The model's greedy continuation of each rendered prompt, as text."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = inputs.to(model.device)
    low_precision = model.dtype == torch.bfloat16
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low_precision):
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    model.train(training)
    new = out[:, inputs.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
