"""`Recipe`: the schema of a training run. Shipped recipes are the YAML files in train/recipes, named by their stem."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from counsel.chat import SYSTEM_PROMPT
from counsel.cli import option
from counsel.errors import UserError
from train.data import DataConfig

RECIPES = Path(__file__).parent / "recipes"

# What may differ between a run and its --resume: these say how to start, not what to train.
START_FIELDS = ("resume", "overwrite", "strict", "seeds")


@dataclass(frozen=True)
class Recipe:
    """One training run, whole: the resolved copy is the run's config.json."""

    name: str = option("gentle", "run directory under --runs, and adapter name in the store")
    base: str = option("smollm2-135m", "base model: catalog name, hub id or local folder")
    data: str = option("sample", "conversations: a CSV, TSV, JSON, JSONL or Parquet file, a hub id, or `sample`")
    revision: str = option("", "commit, tag or branch of a hub set; pin one to repeat a run")
    question_column: str = option("Context", "column that holds the question")
    answer_column: str = option("Response", "column that holds the answer")
    topic_column: str = option("topic", "column that holds the topic, where there is one")
    contacts: str = option(
        "drop", "rows with links, e-mail addresses, phone numbers: `drop` them, or `mask` those parts"
    )
    val_share: float = option(0.1, "share of the questions held out to choose a checkpoint")
    test_share: float = option(0.1, "share of the questions held out for eval and loadtest")
    split: str = option("question", "unit of splitting: `question`; `row` leaks, and is there to measure how much")
    split_seed: int = option(0, "another seed holds out other questions")
    max_rows: int | None = option(None, "train on so many rows only, evenly spaced (smoke runs)")
    max_val_rows: int = option(64, "validation rows scored at each evaluation")
    system: str = option(SYSTEM_PROMPT, "system prompt, in training and when served")

    rank: int = option(16, "LoRA rank r")
    alpha: int = option(32, "LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = option(0.0, "LoRA dropout")
    target_modules: tuple[str, ...] = option(("all-linear",), "modules that get an adapter: `all-linear`, or names")

    epochs: float = option(1.0, "passes over the training rows")
    max_steps: int = option(0, "stop after this many optimizer steps; 0: by epochs")
    batch_size: int = option(4, "rows in a forward pass, per process")
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    learning_rate: float = option(2e-4, "peak learning rate")
    lr_scheduler_type: str = option(
        "cosine", "learning-rate schedule after warm-up: cosine, linear or constant_with_warmup"
    )
    warmup_ratio: float = option(0.05, "share of steps spent warming up")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping")
    optim: str = option("adamw_torch_fused", "a transformers optimizer name, such as paged_adamw_8bit")
    max_length: int = option(1024, "tokens per row; longer rows are cut at the end")
    group_by_length: bool = option(False, "batch rows of like length: saves padding where the fast path does not apply")

    load_in_4bit: bool = option(False, "load the base in NF4 with double quantisation (QLoRA)")
    force_4bit: bool = option(False, "keep the 4-bit base and optimizer without CUDA: slower, for checks")
    attn_implementation: str = option(
        "sdpa", "attention: sdpa or eager; Gemma 2 needs eager, sdpa drops its soft-capping"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: slower, less memory")
    fast_cpu: bool = option(True, "on a CPU, score answer tokens only (same loss; train/cpu/loss.py)")

    evaluations: int = option(4, "evenly spaced validation passes, each with a checkpoint; the best is kept")
    patience: int = option(0, "stop after this many evaluations without improvement; 0: never")
    samples: int = option(2, "validation questions answered at each evaluation, into samples.jsonl")
    seed: int = option(42, "seed of the initial adapter, the order of rows and dropout")

    runs: str = option("runs", "folder of run directories")
    store: str = option("store", "adapter store to publish to; empty: do not publish")
    resume: bool = option(False, "go on from the last checkpoint of the run")
    overwrite: bool = option(False, "remove the existing run of that name first")
    strict: bool = option(False, "refuse instead of falling back where the machine lacks something")
    seeds: tuple[int, ...] = option((), "train once per seed, as <name>-s<seed>, and report mean and spread")

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one")
        if self.lr_scheduler_type not in ("cosine", "linear", "constant_with_warmup"):
            raise UserError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}; allowed: cosine, linear, constant_with_warmup"
            )
        if self.attn_implementation not in ("sdpa", "eager"):
            raise UserError(f"attn_implementation is {self.attn_implementation!r}; allowed: sdpa, eager")
        for key in ("rank", "alpha", "batch_size", "gradient_accumulation_steps", "evaluations", "max_val_rows",
                    "epochs", "learning_rate", "max_rows"):  # fmt: skip
            if (value := getattr(self, key)) is not None and not 0 < value < math.inf:
                raise UserError(f"{key} is {value}; it must be above 0{' (or none)' if key == 'max_rows' else ''}")
        for key in ("max_steps", "patience", "samples", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{key} is {getattr(self, key)}; it must be 0 or more")
        for key in ("dropout", "warmup_ratio", "val_share", "test_share"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key} is {getattr(self, key)}; it must be at least 0 and below 1")
        for key in ("name", "base", "data", "question_column", "answer_column", "runs", "optim"):
            if not getattr(self, key).strip():
                raise UserError(f"{key} is empty; leave it out for {Recipe.__dataclass_fields__[key].default!r}")
        if self.question_column == self.answer_column:
            raise UserError(
                f"question_column and answer_column are both {self.question_column!r}; the answer is another"
            )
        if not self.target_modules or ("all-linear" in self.target_modules and len(self.target_modules) > 1):
            raise UserError(
                f"target_modules is {', '.join(self.target_modules) or 'empty'}; "
                "give all-linear alone, or names of layers"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {', '.join(map(str, self.seeds))}; each seed is one run: give each once")
        for key, value in (("seed", self.seed), ("split_seed", self.split_seed), *(("seeds", s) for s in self.seeds)):
            if not 0 <= value < 2**32:
                raise UserError(f"{key} is {value}; it must be from 0 to {2**32 - 1}")
        if self.max_length < 16:
            raise UserError(f"max_length is {self.max_length}; it must be at least 16 tokens")

    @property
    def run_path(self) -> Path:
        return Path(self.runs) / self.name

    def document(self) -> dict[str, Any]:
        """What config.json holds: every field that shapes the result."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in START_FIELDS}

    def data_config(self) -> DataConfig:
        """The part of the recipe that chooses and splits the rows."""
        return DataConfig(**{f.name: getattr(self, f.name) for f in fields(DataConfig)})

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe under another seed and run name."""
        return replace(self, seed=seed, name=f"{self.name}-s{seed}", seeds=())
