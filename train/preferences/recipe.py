"""`PreferenceRecipe`: the schema of `counsel train dpo`, training on pairs of a better and a worse answer."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from counsel.cli import option
from counsel.errors import UserError
from counsel.values import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    ShareBelowOne,
    check_bounds,
)
from train.recipe import START_FIELDS

_RUN, _DATA, _MEASURES = "run", "data", "measures"
_OPTIMIZATION, _MEMORY = "optimization", "memory and speed"


@dataclass(frozen=True)
class PreferenceRecipe:
    """One preference training: the resolved copy is the run's config.json.

    The LoRA shape is that of the adapter that the run continues from.
    """

    name: str = option(
        "preferred", "name of the run directory under --runs, and of the adapter in the store", group=_RUN,
        metavar="NAME",
    )  # fmt: skip
    base: str = option(
        "smollm2-135m", "base model: a catalog name, a hub id or a local folder", group=_RUN, metavar="MODEL"
    )
    init_adapter: str = option(
        "",
        "the adapter to train, which is also the reference: a name or name@version in the store, or a PEFT folder",
        group=_RUN,
        metavar="ADAPTER",
        flag="--from",
    )
    data: str = option(
        "",
        "preference pairs: votes.jsonl, or a file or hub id in TRL's, OpenAI's or UltraFeedback's form",
        group=_DATA,
        metavar="SOURCE",
    )
    revision: str = option(
        "", "commit, tag or branch of a hub dataset; pin a commit to repeat a run", group=_DATA, metavar="REF"
    )
    held_out_share: Annotated[float, Gt(0), Lt(1)] = option(
        0.2, "share of the questions whose pairs are held out to measure", group=_DATA
    )
    split_seed: Seed = option(0, "seed of the split: another seed holds out other questions", group=_DATA)
    system: str = option(
        "",
        "system prompt of prompts that have none, and when served",
        group=_DATA,
        metavar="TEXT",
        shown="the adapter's own",
    )

    beta: PositiveFloat = option(0.1, "DPO's beta: higher stays closer to the initial adapter", group=_OPTIMIZATION)
    epochs: PositiveFloat = option(1.0, "passes over the training pairs", group=_OPTIMIZATION)
    max_steps: NonNegativeInt = option(
        0, "stop after this many optimizer steps, whatever --epochs is; 0: no such limit", group=_OPTIMIZATION
    )
    batch_size: PositiveInt = option(4, "pairs in a forward pass", group=_OPTIMIZATION)
    gradient_accumulation_steps: PositiveInt = option(1, "forward passes per optimizer step", group=_OPTIMIZATION)
    learning_rate: PositiveFloat = option(5e-5, "peak learning rate", group=_OPTIMIZATION)
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
        1024, "tokens of prompt and answer; longer answers are cut at the end", group=_OPTIMIZATION
    )
    seed: Seed = option(42, "seed of the order of pairs", group=_OPTIMIZATION)

    load_in_4bit: bool = option(False, "load the base in NF4 with double quantization (QLoRA)", group=_MEMORY)
    force_4bit: bool = option(False, "keep the 4-bit base and optimizer without CUDA: slow, for checks", group=_MEMORY)
    attn_implementation: Literal["sdpa", "eager"] = option(
        "sdpa", "attention; Gemma 2 needs eager, since sdpa drops its soft-capping", group=_MEMORY
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: slower, less memory", group=_MEMORY
    )

    max_people_rows: NonNegativeInt = option(
        64, "held-out answers of people, of the adapter's own run, whose bits per byte are compared", group=_MEASURES
    )
    samples: NonNegativeInt = option(
        8, "held-out prompts answered before and after, to compare lengths", group=_MEASURES
    )
    checkpoints: PositiveInt = option(4, "evenly spaced checkpoints, for --resume", group=_RUN)

    report_to: tuple[Literal["none", "trackio", "tensorboard", "wandb", "mlflow"], ...] = option(
        ("none",), "experiment trackers that get settings and metrics, no texts; each needs its package", group=_RUN
    )
    runs: str = option("runs", "folder of run directories", group=_RUN, metavar="FOLDER")
    store: str = option("store", "adapter store to publish to; empty: do not publish", group=_RUN, metavar="FOLDER")
    resume: bool = option(False, "continue from the last checkpoint of the run", group=_RUN)
    overwrite: bool = option(False, "remove the existing run of that name first", group=_RUN)
    strict: bool = option(False, "fail instead of falling back where the machine lacks something", group=_RUN)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one")
        if not self.init_adapter.strip():
            raise UserError("--from is needed: the adapter to train, a name in the store or a PEFT folder")
        if not self.data.strip():
            raise UserError("--data is needed: votes.jsonl, or another file of preference pairs")
        for key in ("name", "base", "runs", "optim"):
            if not getattr(self, key).strip():
                raise UserError(f"{key} is empty; leave it out for {self.__dataclass_fields__[key].default!r}")
        if not self.report_to or ("none" in self.report_to and len(self.report_to) > 1):
            raise UserError(f"report_to is {', '.join(self.report_to) or 'empty'}; give none alone, or trackers")

    @property
    def packing(self) -> bool:
        """Pairs are never packed."""
        return False

    @property
    def run_path(self) -> Path:
        return Path(self.runs) / self.name

    def document(self) -> dict[str, Any]:
        """What config.json holds: every field that affects the result."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in START_FIELDS}
