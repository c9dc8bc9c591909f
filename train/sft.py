"""One training run from start to end: data, base, LoRA, SFTTrainer, checks, adapter, summary, store.

Each step writes its files to the run directory (counsel/run.py lists them). train.json is written last.
"""

import contextlib
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from counsel import catalog, store
from counsel.errors import UserError
from counsel.files import read_json, read_jsonl, replaced_directory, write_json
from counsel.fingerprint import fingerprint
from counsel.run import Run, how_to_continue, provenance
from train import init_adapter
from train.arguments import trainer_arguments
from train.card import card_text
from train.data import evenly_spaced
from train.hardware import Precision, TrainHardware, attention_for, choose_precision, detect_training_hardware
from train.lora import lora_config
from train.preflight import Prepared, preflight
from train.prompts import TrainRows, encode, rendered_prompts
from train.recipe import Recipe
from train.resume import check_run_directory, last_checkpoint, opened_run
from train.settings import RunSettings


def train(recipe: Recipe) -> dict[str, Any]:
    """Train one adapter, check it, publish it; return the summary that train.json holds."""
    from accelerate import PartialState

    started = time.monotonic()
    store.check_name(recipe.name)
    recipe = init_adapter.pinned(recipe)
    hardware = detect_training_hardware()
    precision = choose_precision(recipe, hardware)
    # A launcher's config file must not overrule the precision chosen for this machine.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if precision.dtype == "bfloat16" else "no"
    processes = PartialState(cpu=precision.device == "cpu")
    prepared = None
    with contextlib.ExitStack() as stack:
        with processes.main_process_first():
            if processes.is_main_process:
                check_run_directory(recipe)
                if not recipe.resume:
                    prepared = preflight(recipe, precision, hardware)
            base = prepared.base if prepared else catalog.resolve(recipe.base)
            if processes.is_main_process:
                new_data = (prepared.splits, prepared.report) if prepared else None
                stack.enter_context(opened_run(recipe, new_data))
                write_json(recipe.run_path / "provenance.json", run_provenance(recipe, hardware, precision, base))
                print_start(precision, hardware, base)
        run = Run(recipe.run_path)
        trainer, progress = build(recipe, precision, base, run, prepared)
        run_steps(recipe, run, trainer, progress, processes, recipe.patience)
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return {}
        return finish_run(recipe, precision, base, run, trainer, progress, time.monotonic() - started)


def run_steps(recipe: RunSettings, run: Run, trainer: Any, progress: Any, processes: Any, patience: int = 0) -> None:
    """Train to the end; with --resume, from the last complete checkpoint. Raises KeyboardInterrupt after Ctrl-C."""
    from train.stop import StopAfterStep

    checkpoint = None
    if recipe.resume:
        with processes.main_process_first():
            checkpoint = last_checkpoint(run)
    if checkpoint and trainer.had_ended_at(checkpoint, patience):
        progress.on_train_begin(trainer.args, trainer.state, trainer.control)
        return
    trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
    stop = StopAfterStep()
    trainer.add_callback(stop)
    # With several processes, one could stop a step before the others, which would then wait for it forever.
    with stop.listening() if processes.num_processes == 1 else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, with a "
                                f"checkpoint; {how_to_continue(run)}")  # fmt: skip


def build(
    recipe: Recipe, precision: Precision, base: catalog.Base, run: Run, prepared: Prepared | None = None
) -> tuple[Any, Any]:
    """The trainer, ready to start, and the callback that reports its progress.

    prepared: what the checks loaded; None on --resume, and in every process but the first.
    """
    quiet_libraries()
    import transformers

    from train.cpu.loss import keep_freed_memory
    from train.progress import TrainingProgress
    from train.trainer import AnswerTrainer

    transformers.set_seed(recipe.seed)
    tokenizer = prepared.tokenizer if prepared else transformers.AutoTokenizer.from_pretrained(base.path)
    model = load_base(recipe, precision, base, prepared.config if prepared else None)
    lora = lora_config(recipe)
    slow_reason = slow_path_reason(recipe, precision, model, lora)
    fast = slow_reason is None
    print(f"path         {'fast CPU' if fast else f'TRL, because {slow_reason}'}", file=sys.stderr)
    if precision.device == "cpu":
        keep_freed_memory()
    train_rows = evenly_spaced(run.split("train"), recipe.max_rows)
    val_rows = evenly_spaced(run.split("val"), recipe.max_val_rows)
    by_question = {row["question"]: row for row in reversed(val_rows)}
    asked = evenly_spaced(list(dict.fromkeys(row["question"] for row in val_rows)), recipe.samples)
    prompts = rendered_prompts(tokenizer, [by_question[question] for question in asked], recipe.system)
    progress = TrainingProgress(run, tokenizer, prompts)
    training, validation = (
        encode(tokenizer, rows, recipe.system, recipe.max_length, recipe.train_on_turns)
        for rows in (train_rows, val_rows)
    )
    for kind, encoded in (("training", training), ("validation", validation)):
        _print_lost(kind, encoded, recipe.max_length)
    if validation.rows and not validation.sequences:
        raise UserError(
            f"each of the {validation.rows} validation rows has a prompt that alone fills {recipe.max_length} tokens, "
            "so no checkpoint can be chosen; raise max_length"
        )
    callbacks: list[Any] = [progress]
    if recipe.patience and val_rows:
        callbacks.append(transformers.EarlyStoppingCallback(recipe.patience))
    trainer = AnswerTrainer(
        model=model,
        args=trainer_arguments(recipe, precision, run, validate=bool(val_rows)),
        training=training,
        validation=validation,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=callbacks,
        fast=fast,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    keep_tensorboard(trainer, run)
    if recipe.init_adapter:
        init_adapter.load_weights(init_adapter.find_init_adapter(recipe), trainer.model)
    rows_per_step = recipe.batch_size * recipe.gradient_accumulation_steps * trainer.args.world_size
    steps = recipe.max_steps or math.ceil(math.ceil(len(trainer.train_dataset) / rows_per_step) * recipe.epochs)
    trainer.args.eval_steps = trainer.args.save_steps = math.ceil(steps / recipe.evaluations)
    return trainer, progress


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and remarks off stderr, before a trainer is built."""
    # On import, bitsandbytes warns that a hub kernel is missing. We use none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _print_lost(kind: str, encoded: TrainRows, max_length: int) -> None:
    """Say how many rows and replies were lost because cutting at max_length left none of their tokens."""
    if n := encoded.rows_left_out:
        print(f"rows         {n} of {encoded.rows} {kind} rows left out: their prompt alone fills {max_length} tokens",
              file=sys.stderr)  # fmt: skip
    if (n := encoded.replies_lost) > encoded.rows_left_out:
        print(f"replies      {n} of {encoded.replies} {kind} replies lost: they begin after {max_length} tokens",
              file=sys.stderr)  # fmt: skip


def keep_tensorboard(trainer: Any, run: Run) -> None:
    """Let TensorBoard write into the run: its own place is among the checkpoints, which are removed at the end."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(run.path / "tensorboard")


def slow_path_reason(recipe: Recipe, precision: Precision, model: Any, lora: Any) -> str | None:
    """Why TRL's own path trains this model; None if the fast CPU path does, which was shown to compute the same."""
    from train.cpu.loss import unsupported_reason
    from train.cpu.proof import mismatch

    if not recipe.fast_cpu:
        return "fast_cpu is off"
    if precision.packing:
        return "packing is on"
    if recipe.gradient_checkpointing:
        return "gradient_checkpointing is on"
    return unsupported_reason(model, precision.device) or mismatch(model, lora)


def load_base(recipe: RunSettings, precision: Precision, base: catalog.Base, config: Any = None) -> Any:
    """The base model in the chosen precision. config: the base's, if it was read already."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if precision.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, precision.dtype),
        )
    config = config or AutoConfig.from_pretrained(base.path)
    model = AutoModelForCausalLM.from_pretrained(
        base.path,
        config=config,
        dtype=getattr(torch, precision.dtype),
        attn_implementation=attention_for(precision, config),
        quantization_config=quantization,
    )
    if precision.load_in_4bit and precision.device == "cpu":
        keep_4bit_gradients(model)
    return model


def keep_4bit_gradients(model: Any) -> None:
    """Keep gradients correct after an evaluation pass on a CPU with AVX512-BF16.

    In the first forward pass without gradients, bitsandbytes 0.50 repacks the weights, and then also trains on the
    packed form. Its kernel has no gradient: there is only a warning, and the gradient has a cosine of 0.73 to the true
    one.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def finish_run(
    recipe: Recipe, precision: Precision, base: catalog.Base, run: Run, trainer: Any, progress: Any, wall_s: float
) -> dict[str, Any]:
    """Save the adapter, check it, publish it, draw the curve, write the summary."""
    rows = read_jsonl(run.path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    val_losses = [row["val_loss"] for row in rows if "val_loss" in row]
    state = trainer.state
    summary: dict[str, Any] = {
        "run": str(run.path),
        "adapter": None,
        "version": None,
        "base": {"name": base.name, "hub_id": base.hub_id, "license": base.license},
        "steps": state.global_step,
        "epochs": round(state.epoch, 4),
        "best_step": state.best_global_step,
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "val_loss_base": val_losses[0] if val_losses else None,
        "val_loss": state.best_metric,
        "rows": trainer.training.rows - trainer.training.rows_left_out,
        "rows_left_out": trainer.training.rows_left_out,
        "val_rows_left_out": trainer.validation.rows_left_out,
        "sequences": len(trainer.training.sequences),
        "replies": trainer.training.replies - trainer.training.replies_lost,
        "replies_lost": trainer.training.replies_lost,
        "val_replies_lost": trainer.validation.replies_lost,
        "tokens": progress.tokens,
        "tokens_per_s": round(tokens_per_s(rows), 1),
        "wall_s": round(wall_s, 1),
        "peak_memory_bytes": peak_memory(precision.device),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "fast_loss": trainer.fast,
        "downgrades": [item._asdict() for item in precision.downgrades],
    }
    save_run(recipe, base, run, trainer, rows, summary)
    return summary


def save_run(
    recipe: RunSettings,
    base: catalog.Base,
    run: Run,
    trainer: Any,
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    """Save the adapter, check and publish it, draw the curve of metrics.jsonl's rows; write the completed summary."""
    from train.plot import loss_curve
    from train.postflight import check_trained

    with replaced_directory(run.adapter) as folder:
        save_adapter(trainer.model, trainer.processing_class, base, folder)
        summary["postflight"] = check_trained(folder, base, trainer.model, trainer.processing_class, recipe)
        (folder / "README.md").write_text(card_text(run, summary=summary), encoding="utf-8")
    loss_curve(rows, f"{recipe.name} on {base.name}", run.path / "loss.png")
    if recipe.store:
        manifest = store.publish(
            Path(recipe.store), recipe.name, run.adapter, base, system=recipe.system, run=recipe.name
        )
        summary |= {"adapter": manifest.id, "version": manifest.version}
    write_json(run.path / "train.json", summary)
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)


def tokens_per_s(rows: Sequence[dict[str, Any]]) -> float:
    """Real tokens per second over all steps of metrics.jsonl, also those before a --resume."""
    before, seconds = 0, 0.0
    for row in rows:
        if "loss" in row:
            seconds += (row["tokens"] - before) / row["tokens_per_s"] if row["tokens_per_s"] else 0.0
            before = row["tokens"]
    return before / seconds if seconds else 0.0


def save_adapter(model: Any, tokenizer: Any, base: catalog.Base, folder: Path) -> None:
    """Save weights, config and tokenizer, with the base's public name instead of a path on this machine."""
    for config in model.peft_config.values():
        # Only the name of a local folder: push would publish its path.
        config.base_model_name_or_path = catalog.public_name(base.name, base.hub_id)
    # Explicit, because PEFT would otherwise ask the hub whether the vocabulary has grown.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # transformers saves in tokenizer.json how the last batch was padded: on the left, for the samples.
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(str(folder))


def peak_memory(device: str) -> int:
    """The peak memory of this process in bytes: on the GPU, or resident on a CPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_provenance(
    recipe: RunSettings, hardware: TrainHardware, precision: Precision, base: catalog.Base
) -> dict[str, Any]:
    """What provenance.json holds."""
    report = read_json(recipe.run_path / "data" / "report.json")
    return provenance() | {
        "seed": recipe.seed,
        "init_adapter": init_adapter.find_init_adapter(recipe).document() if recipe.init_adapter else None,
        "data_sha256": report["source_sha256"],
        "base": {"name": base.name, "hub_id": base.hub_id, "fingerprint": fingerprint(base.path)},
        "machine": asdict(hardware),
        "dtype": precision.dtype,
        "downgrades": [item._asdict() for item in precision.downgrades],
    }


def print_start(precision: Precision, hardware: TrainHardware, base: catalog.Base) -> None:
    """Say on stderr what is trained, in which precision, and what the machine lacks."""
    where = f"{hardware.device} ({hardware.name})"
    print(f"base         {base.hub_id} ({base.license}), {precision.dtype}, on {where}", file=sys.stderr)
    for item in precision.downgrades:
        print(f"note         {item}", file=sys.stderr)
