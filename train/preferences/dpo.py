"""`counsel train dpo`: trains an adapter on preference pairs with TRL's DPOTrainer, measures, publishes.

The reference model is the adapter that the run continues from. TRL makes a frozen copy of it, named `ref`, when it gets
a model that already has an adapter; with a new adapter, the reference would be the base. So the loss begins at log 2.
"""

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from counsel import catalog, store
from counsel.errors import UserError
from counsel.files import read_jsonl, write_json, write_jsonl
from counsel.run import PREFERENCES, Run
from train import init_adapter
from train.arguments import common_arguments
from train.data import SPLITS, evenly_spaced
from train.hardware import Precision, TrainHardware, choose_precision, detect_training_hardware
from train.init_adapter import InitAdapter
from train.preferences.pairs import Preference, PreferenceReport, one_per_question, read_preferences, split
from train.preferences.recipe import PreferenceRecipe
from train.resume import check_run_directory, opened_folder
from train.sft import (
    keep_tensorboard,
    load_base,
    peak_memory,
    print_start,
    quiet_libraries,
    run_provenance,
    run_steps,
    save_run,
    tokens_per_s,
)

SAMPLE_TOKENS = 128
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


def train_preferences(recipe: PreferenceRecipe) -> dict[str, Any]:
    """Train one adapter on preference pairs, check it, publish it; return the summary that train.json holds."""
    from accelerate import PartialState

    started = time.monotonic()
    store.check_name(recipe.name)
    hardware = detect_training_hardware()
    if hardware.processes > 1:
        raise UserError(
            f"train dpo runs in one process, not in {hardware.processes}; start it without accelerate launch"
        )
    found = init_adapter.find_init_adapter(recipe)
    # A name in the store may mean another version later.
    recipe = replace(
        recipe,
        init_adapter=recipe.init_adapter if found.base_fingerprint is None else found.name,
        system=recipe.system or found.system,
    )
    precision = choose_precision(recipe, hardware)
    processes = PartialState(cpu=precision.device == "cpu")
    check_run_directory(recipe)
    base, tokenizer = check_preferences(recipe, precision, hardware, found)
    run = Run(recipe.run_path)
    with contextlib.ExitStack() as stack:
        if recipe.resume:
            stack.enter_context(opened_folder(recipe, None))
        else:
            pairs, report = read_preferences(recipe.data, recipe.revision)
            source = Run(Path(recipe.runs) / found.run) if found.run else None
            never = held_out_questions(source) if source else set()
            train, held_out = split(pairs, recipe.held_out_share, recipe.split_seed, never)
            stack.enter_context(opened_folder(recipe, lambda folder: _write(folder, train, held_out, report, source)))
            print(report)
            questions = len(one_per_question(held_out))
            print(f"  train      {len(train):>7,}\n  held out   {len(held_out):>7,}  on {questions} questions")
        write_json(run.path / "provenance.json", run_provenance(recipe, hardware, precision, base))
        print_start(precision, hardware, base)
        trainer, progress, n_held_out = build_trainer(recipe, precision, base, run, found, tokenizer)
        run_steps(recipe, run, trainer, progress, processes)
        return _finish(recipe, precision, base, run, trainer, progress, n_held_out, started)


def check_preferences(
    recipe: PreferenceRecipe, precision: Precision, hardware: TrainHardware, found: InitAdapter
) -> tuple[catalog.Base, Any]:
    """What would fail later: the checks of fine-tuning that apply. Returns base and tokenizer; raises UserError."""
    from transformers import AutoConfig, AutoTokenizer

    from train.preflight import (
        check_attention,
        check_disk,
        check_optimizer,
        check_system,
        check_template,
        check_trackers,
        check_writable,
        find_base,
    )

    base, _ = find_base(recipe)
    init_adapter.check_sound(found, base)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    config = AutoConfig.from_pretrained(base.path)
    check_system(recipe)
    check_optimizer(recipe, precision)
    check_attention(recipe, precision, config)
    check_template(recipe, base.path, tokenizer)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if recipe.max_length > positions:
        raise UserError(f"max_length is {recipe.max_length}, but the base has {positions:,} positions; lower it")
    if recipe.report_to != ("none",):
        check_trackers(recipe)
    check_disk(Path(recipe.runs))
    if recipe.store:
        check_writable("store", Path(recipe.store))
    return base, tokenizer


def held_out_questions(run: Run) -> set[str]:
    """The questions that a run held out, of conversations and of pairs: what continues from it trains on none."""
    files = [run.path / "data" / f"{name}.jsonl" for name in ("val", "test")] + [run.path / PREFERENCES / HELD_OUT]
    return {row["question_id"] for file in files if file.is_file() for row in read_jsonl(file)}


def _write(
    folder: Path,
    train: Sequence[Preference],
    held_out: Sequence[Preference],
    report: PreferenceReport,
    source: Run | None,
) -> None:
    """The run's data: the pairs, and the rows of the run before, on which `counsel eval` compares the two."""
    for name, pairs in ((TRAIN, train), (HELD_OUT, held_out)):
        write_jsonl(folder / PREFERENCES / name, [pair.document() for pair in pairs])
    # Without them, which eval needs, the run has no questions that people answered.
    if source and all((source.path / "data" / f"{name}.jsonl").is_file() for name in SPLITS):
        for name in SPLITS:
            write_jsonl(folder / "data" / f"{name}.jsonl", source.split(name))
    write_json(
        folder / "data" / "report.json",
        asdict(report) | {"rows": {"train": len(train), "held_out": len(held_out)}},
    )


def read_pairs(run: Run, name: str) -> list[Preference]:
    """The pairs of a run in one of its files, TRAIN or HELD_OUT."""
    return [
        Preference(row["question_id"], row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in read_jsonl(run.path / PREFERENCES / name)
    ]


def build_trainer(
    recipe: PreferenceRecipe, precision: Precision, base: catalog.Base, run: Run, found: InitAdapter, tokenizer: Any
) -> tuple[Any, Any, int]:
    """The trainer, ready to start, the callback that reports its progress, and the number of held-out pairs."""
    quiet_libraries()
    import transformers
    from peft import PeftModel

    from train.preferences.trainer import PreferenceTrainer
    from train.progress import TrainingProgress

    transformers.set_seed(recipe.seed)
    model = PeftModel.from_pretrained(load_base(recipe, precision, base), str(found.folder), is_trainable=True)
    # When it saves, PEFT looks here for the vocabulary of the base, and would ask the hub for a public name.
    model.peft_config["default"].base_model_name_or_path = str(base.path)
    train = read_pairs(run, TRAIN)
    held_out = one_per_question(read_pairs(run, HELD_OUT))
    progress = TrainingProgress(run, tokenizer, {})
    trainer = PreferenceTrainer(
        model=model,
        arguments=common_arguments(recipe, precision, run),
        beta=recipe.beta,
        training=[pair.with_system(recipe.system) for pair in train],
        held_out=[pair.with_system(recipe.system) for pair in held_out],
        tokenizer=tokenizer,
        progress=progress,
    )
    keep_tensorboard(trainer, run)
    for kind, given, kept in (
        ("training", len(train), len(trainer.train_dataset)), ("held-out", len(held_out), len(trainer.eval_dataset))
    ):  # fmt: skip
        if not kept:
            raise UserError(f"each of the {given} {kind} pairs has a prompt that alone fills {recipe.max_length} "
                            "tokens; raise max_length")  # fmt: skip
        if kept < given:
            print(f"pairs        {given - kept} of {given} {kind} pairs left out: their prompt alone fills "
                  f"{recipe.max_length} tokens", file=sys.stderr)  # fmt: skip
    pairs_per_step = recipe.batch_size * recipe.gradient_accumulation_steps
    steps = recipe.max_steps or math.ceil(math.ceil(len(trainer.train_dataset) / pairs_per_step) * recipe.epochs)
    trainer.args.save_steps = math.ceil(steps / recipe.checkpoints)
    return trainer, progress, len(held_out)


def _finish(
    recipe: PreferenceRecipe, precision: Precision, base: catalog.Base, run: Run, trainer: Any, progress: Any,
    n_held_out: int, started: float,
) -> dict[str, Any]:  # fmt: skip
    """Measure, save the adapter, check it, publish it, write the report and the summary."""
    from train.preferences.report import preference_page
    from train.preferences.scores import REFERENCE

    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    results, samples = _measure(recipe, run, trainer)
    rows = read_jsonl(run.path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    n_train = len(read_pairs(run, TRAIN))
    summary: dict[str, Any] = {
        "run": str(run.path),
        "adapter": None,
        "version": None,
        "base": {"name": base.name, "hub_id": base.hub_id, "license": base.license},
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 4),
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "val_loss": None,
        "rows": len(trainer.train_dataset),
        "rows_left_out": n_train - len(trainer.train_dataset),
        "held_out_left_out": n_held_out - len(trainer.eval_dataset),
        "preferences": results,
        "tokens": progress.tokens,
        "tokens_per_s": round(tokens_per_s(rows), 1),
        "wall_s": round(time.monotonic() - started, 1),
        "peak_memory_bytes": peak_memory(precision.device),
        "trainable_parameters": trainable,
        "downgrades": [item._asdict() for item in precision.downgrades],
    }
    if results["held_out"]["margin_nats"] == 0:
        raise UserError(f"the adapter answers exactly like {recipe.init_adapter}; train longer or with a higher "
                        "learning rate")  # fmt: skip
    trainer.model.delete_adapter(REFERENCE)
    write_json(run.path / "preferences.json", results)
    page = preference_page(recipe, results, samples)
    (run.path / "preferences.html").write_text(page, encoding="utf-8")
    save_run(recipe, base, run, trainer, rows, summary)
    return summary


def _measure(recipe: PreferenceRecipe, run: Run, trainer: Any) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The results that preferences.json holds, and the sample answers before and after."""
    from train.preferences.scores import (
        REFERENCE,
        TRAINED,
        length_drift,
        people_bits_per_byte,
        preference_accuracy,
    )
    from train.progress import greedy_answers

    model, tokenizer = trainer.model, trainer.processing_class
    print("measuring    held-out pairs, people's answers, lengths", file=sys.stderr)
    held_out = list(trainer.eval_dataset)
    people = [row for name in ("val", "test") if (run.path / "data" / f"{name}.jsonl").is_file()
              for row in run.split(name)]  # fmt: skip
    accuracy = preference_accuracy(model, held_out, recipe.max_length, recipe.batch_size)
    lost = people_bits_per_byte(
        model, tokenizer, evenly_spaced(people, recipe.max_people_rows), recipe.system, recipe.max_length,
        recipe.batch_size,
    )  # fmt: skip
    asked = evenly_spaced(held_out, recipe.samples)
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in asked]
    answers = {}
    for adapter in (REFERENCE, TRAINED):
        model.set_adapter(adapter)
        answers[adapter] = greedy_answers(model, tokenizer, prompts, SAMPLE_TOKENS) if prompts else []
    samples = [
        {"question": row["prompt"][-1]["content"], "before": before, "after": after}
        for row, before, after in zip(asked, answers[REFERENCE], answers[TRAINED], strict=True)
    ]
    write_jsonl(run.path / "samples.jsonl", samples)
    lengths = length_drift(answers[REFERENCE], answers[TRAINED], SAMPLE_TOKENS)
    return {"held_out": accuracy, "people_bits_per_byte": lost, "length": lengths}, samples
