"""The settings of a run as the configs of TRL's trainers."""

from typing import Any

from counsel.run import Run
from train.hardware import Precision
from train.recipe import Recipe
from train.settings import RunSettings


def trainer_arguments(recipe: Recipe, precision: Precision, run: Run, validate: bool) -> Any:
    """The recipe as TRL's SFTConfig."""
    from trl import SFTConfig

    return SFTConfig(
        **(
            common_arguments(recipe, precision, run)
            # Packed, the collator joins a batch to one sequence, in which AnswerTrainer could not tell repeated rows.
            | {"per_device_eval_batch_size": 1 if precision.packing else recipe.batch_size}
        ),
        packing=precision.packing,
        eval_packing=False,
        train_sampling_strategy="group_by_length" if recipe.group_by_length and not precision.packing else "random",
        eval_strategy="steps" if validate else "no",
        eval_on_start=validate,
        load_best_model_at_end=validate,
        metric_for_best_model="eval_loss" if validate else None,
        greater_is_better=False if validate else None,
    )


def common_arguments(recipe: RunSettings, precision: Precision, run: Run) -> dict[str, Any]:
    """What the config of each of TRL's trainers takes from a run's settings."""
    return {
        "output_dir": str(run.path / "checkpoints"),
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": precision.optimizer,
        "max_length": recipe.max_length,
        "bf16": precision.dtype == "bfloat16",
        "use_cpu": precision.device == "cpu",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "disable_tqdm": True,
        "report_to": list(recipe.report_to),
        "run_name": recipe.name,
        "project": "counsel-stack",
        "dataloader_pin_memory": precision.device == "cuda",
    }
