"""`Recipe`: the schema of a training run. Shipped recipes are the YAML files in train/recipes, named by their stem."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from counsel.chat import SYSTEM_PROMPT
from counsel.cli import option
from counsel.errors import UserError
from counsel.run import RENAMED_KEYS
from counsel.values import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    ShareBelowOne,
    check_bounds,
)
from train.data import DataConfig

RECIPES = Path(__file__).parent / "recipes"
FLASH = "flash_attention_2"

# What may differ between a run and its --resume: these say how to start, not what to train.
START_FIELDS = ("resume", "overwrite", "strict", "seeds")

_RUN, _DATA, _LORA = "run", "data", "LoRA"
_OPTIMIZATION, _EVALUATION, _MEMORY = "optimization", "evaluation", "memory and speed"


@dataclass(frozen=True)
class Recipe:
    """One training run: the resolved copy is the run's config.json."""

    RENAMED: ClassVar[dict[str, str]] = RENAMED_KEYS

    name: str = option(
        "gentle", "name of the run directory under --runs, and of the adapter in the store", group=_RUN, metavar="NAME"
    )
    base: str = option(
        "smollm2-135m", "base model: a catalog name, a hub id or a local folder", group=_RUN, metavar="MODEL"
    )
    data: str = option(
        "sample",
        "conversations: CSV, TSV, JSON, JSONL or Parquet files, a hub id, or `sample` or `dialogues`, the shipped sets",
        group=_DATA,
        metavar="SOURCE",
    )
    revision: str = option(
        "", "commit, tag or branch of a hub dataset; pin a commit to repeat a run", group=_DATA, metavar="REF"
    )
    question_column: str = option("Context", "column that holds the question", group=_DATA, metavar="COLUMN")
    answer_column: str = option("Response", "column that holds the answer", group=_DATA, metavar="COLUMN")
    topic_column: str = option("topic", "column that holds the topic, if there is one", group=_DATA, metavar="COLUMN")
    contacts: Literal["drop", "mask"] = option(
        "drop",
        "what to do with rows that have links, e-mail addresses or phone numbers: drop the row, or mask those parts",
        group=_DATA,
    )
    val_share: ShareBelowOne = option(0.1, "share of the questions held out to choose a checkpoint", group=_DATA)
    test_share: ShareBelowOne = option(0.1, "share of the questions held out for eval and loadtest", group=_DATA)
    split: Annotated[str, Literal["question", "conversation", "row"]] = option(
        "question",
        "unit of splitting: `conversation`, the default for conversations, also keeps near copies together; `row` "
        "leaks test questions into training, and exists only to measure how much",
        group=_DATA,
    )
    split_seed: Seed = option(0, "seed of the split: another seed holds out other questions", group=_DATA)
    max_rows: PositiveInt | None = option(
        None, "train on only this many rows, evenly spaced (for smoke runs)", group=_DATA, shown="all"
    )
    max_val_rows: PositiveInt = option(64, "validation rows scored at each evaluation", group=_EVALUATION)
    system: str = option(
        SYSTEM_PROMPT, "system prompt, in training and when served", group=_DATA, shown="the built-in supportive prompt"
    )

    rank: PositiveInt = option(16, "LoRA rank r", group=_LORA)
    alpha: PositiveInt = option(32, "LoRA alpha; the update is scaled by alpha / rank", group=_LORA)
    dropout: ShareBelowOne = option(0.0, "LoRA dropout", group=_LORA)
    use_rslora: bool = option(False, "rank-stabilized LoRA: scale by alpha / sqrt(rank) instead", group=_LORA)
    target_modules: tuple[str, ...] = option(
        ("all-linear",), "modules that get an adapter: `all-linear`, or names", group=_LORA, metavar="NAME,..."
    )

    init_adapter: str = option(
        "",
        "continue from an adapter: a name or name@version in the store, or a PEFT folder",
        group=_LORA,
        metavar="ADAPTER",
        flag="--from",
    )

    train_on_turns: Literal["all", "last"] = option(
        "all", "assistant turns of a conversation that the loss counts: each one, or only the last", group=_OPTIMIZATION
    )
    epochs: PositiveFloat = option(1.0, "passes over the training rows", group=_OPTIMIZATION)
    max_steps: NonNegativeInt = option(
        0, "stop after this many optimizer steps, whatever --epochs is; 0: no such limit", group=_OPTIMIZATION
    )
    batch_size: PositiveInt = option(4, "rows in a forward pass, per process", group=_OPTIMIZATION)
    gradient_accumulation_steps: PositiveInt = option(1, "forward passes per optimizer step", group=_OPTIMIZATION)
    learning_rate: PositiveFloat = option(2e-4, "peak learning rate", group=_OPTIMIZATION)
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = option(
        "cosine", "learning-rate schedule after warm-up", group=_OPTIMIZATION
    )
    warmup_ratio: ShareBelowOne = option(0.05, "share of the steps spent warming up", group=_OPTIMIZATION)
    weight_decay: NonNegativeFloat = option(0.0, "AdamW weight decay", group=_OPTIMIZATION)
    max_grad_norm: NonNegativeFloat = option(1.0, "gradient norm to clip at; 0: no clipping", group=_OPTIMIZATION)
    optim: str = option(
        "adamw_torch_fused",
        "a transformers optimizer name, such as paged_adamw_8bit",
        group=_OPTIMIZATION,
        metavar="NAME",
    )
    max_length: Annotated[int, Ge(16)] = option(
        1024, "tokens per row; longer rows are cut at the end, which may lose replies", group=_OPTIMIZATION
    )
    group_by_length: bool = option(
        False, "batch rows of similar length, which saves padding where the fast CPU path does not apply", group=_MEMORY
    )

    load_in_4bit: bool = option(False, "load the base in NF4 with double quantization (QLoRA)", group=_MEMORY)
    force_4bit: bool = option(False, "keep the 4-bit base and optimizer without CUDA: slow, for checks", group=_MEMORY)
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = option(
        "sdpa",
        "attention; Gemma 2 needs eager or flash_attention_2 (package flash-attn), since sdpa drops its soft-capping",
        group=_MEMORY,
    )
    packing: bool = option(
        False,
        "fill each sequence up to --max-length with whole rows, which do not see each other; needs flash_attention_2",
        group=_MEMORY,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: slower, less memory", group=_MEMORY
    )
    fast_cpu: bool = option(
        True,
        "on a CPU, compute the loss of answer tokens only: the same loss, faster (train/cpu/loss.py)",
        group=_MEMORY,
    )

    evaluations: PositiveInt = option(
        4, "evenly spaced validation passes, each with a checkpoint; the best checkpoint is kept", group=_EVALUATION
    )
    patience: NonNegativeInt = option(
        0, "stop after this many evaluations without improvement; 0: never", group=_EVALUATION
    )
    samples: NonNegativeInt = option(
        2, "validation questions answered at each evaluation, into samples.jsonl", group=_EVALUATION
    )
    seed: Seed = option(42, "seed of the initial adapter, the order of rows and dropout", group=_OPTIMIZATION)

    report_to: tuple[Literal["none", "trackio", "tensorboard", "wandb", "mlflow"], ...] = option(
        ("none",), "experiment trackers that get settings and metrics, no texts; each needs its package", group=_RUN
    )
    runs: str = option("runs", "folder of run directories", group=_RUN, metavar="FOLDER")
    store: str = option("store", "adapter store to publish to; empty: do not publish", group=_RUN, metavar="FOLDER")
    resume: bool = option(False, "continue from the last checkpoint of the run", group=_RUN)
    overwrite: bool = option(False, "remove the existing run of that name first", group=_RUN)
    strict: bool = option(False, "fail instead of falling back where the machine lacks something", group=_RUN)
    seeds: tuple[Seed, ...] = option(
        (), "train once per seed, as <name>-s<seed>, and report mean and spread", group=_RUN
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one")
        for key in ("name", "base", "data", "question_column", "answer_column", "runs", "optim"):
            if not getattr(self, key).strip():
                raise UserError(f"{key} is empty; leave it out for {Recipe.__dataclass_fields__[key].default!r}")
        if self.question_column == self.answer_column:
            raise UserError(
                f"question_column and answer_column are both {self.question_column!r}; name two different columns"
            )
        if not self.target_modules or ("all-linear" in self.target_modules and len(self.target_modules) > 1):
            raise UserError(
                f"target_modules is {', '.join(self.target_modules) or 'empty'}; "
                "give all-linear alone, or names of layers"
            )
        if not self.report_to or ("none" in self.report_to and len(self.report_to) > 1):
            raise UserError(f"report_to is {', '.join(self.report_to) or 'empty'}; give none alone, or trackers")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {', '.join(map(str, self.seeds))}; each seed is one run: give each once")

    @property
    def run_path(self) -> Path:
        return Path(self.runs) / self.name

    def document(self) -> dict[str, Any]:
        """What config.json holds: every field that affects the result."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in START_FIELDS}

    def data_config(self) -> DataConfig:
        """The part of the recipe that chooses and splits the rows."""
        return DataConfig(**{f.name: getattr(self, f.name) for f in fields(DataConfig)})

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe under another seed and run name."""
        return replace(self, seed=seed, name=f"{self.name}-s{seed}", seeds=())
