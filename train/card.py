"""The model card of a run, written from its files: purpose, limits, training and scores."""

import json
import re
from pathlib import Path
from typing import Any

from counsel.catalog import is_hub_id
from counsel.chat import NOTICE, prompt_messages
from counsel.files import read_json
from counsel.run import Run

# Suffixes of data files, also compressed. A hub id (org/name) may contain a dot, but never one of these after it.
FILE_KINDS = ("csv", "tsv", "txt", "json", "jsonl", "ndjson", "parquet", "gz", "zip", "bz2", "xz", "zst")

_HEAD = """---
{base_model}library_name: {library}
license: {license}
{language}pipeline_tag: text-generation
tags: [lora, {method}, trl, supportive-conversation]
---
# {name}

{notice}

## Summary

{kind} of {base}, {learned}
Made with Counsel Stack.

## Direct use

Research on supportive conversation: comparing prompts, adapters and safety measures, offline or with informed adults.

## Downstream use

A starting point for further fine-tuning, or one adapter of several behind a server that adds its own safety layer.

## Out-of-scope use

- crisis management, or any use where someone in danger relies on the reply
- diagnosis, advice on medication, or replacing a qualified person
- use with minors, or with people who do not know that they are talking to a research model

## Bias, risks and limitations

- It can be wrong, generic or harmful, and it sounds confident in any case.
- It was trained on {rows:,} {examples}. Cultures and situations that they do not cover are handled poorly.
- It remembers nothing between conversations and cannot see, verify or act on anything.
- A small base model repeats itself and invents facts. Fine-tuning changes the tone more than the knowledge.

## Recommendations

Keep a person in charge. Show the notice above. Direct people in danger to local emergency services or a crisis line
(findahelpline.com). Do not log private text. Evaluate on your own questions before any use.
"""


_ANSWERS = {
    "method": "sft",
    "examples": "answers",
    "learned": "fine-tuned on questions about people's lives and answers to them.\n"
    "It replies at length, warmly and practically.",
}
_PREFERENCES = {
    "method": "dpo",
    "examples": "preference pairs",
    "learned": "trained on which of two answers was preferred (DPO).",
}


def card_text(run: Run, merged: bool = False, summary: dict[str, Any] | None = None) -> str:
    """The README.md of a run's adapter, or of its merged model. `summary` replaces train.json before that exists."""
    recipe, report, provenance = run.config(), read_json(run.path / "data" / "report.json"), _provenance(run)
    done = summary if summary is not None else run.summary()
    base = done["base"]
    hub_id = base["hub_id"] if is_hub_id(base["hub_id"]) else None
    rank = f" (rank {recipe['rank']})" if "rank" in recipe else ""
    head = _HEAD.format(
        # The hub rejects a card whose base is a path, and a path may contain a person's name.
        base_model=f"base_model: {hub_id}\n" if hub_id else "",
        base=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"{base['name']}, a local model",
        # The language of other data is unknown.
        language="language: en\n" if report["source"] == "sample" else "",
        license=_hub_license(base["license"]),
        **_PREFERENCES if "preferences" in done else _ANSWERS,
        # Runs of earlier versions had one reply per row.
        rows=done.get("replies", done["rows"]),
        library="transformers" if merged else "peft",
        kind="A merged copy" if merged else f"A LoRA adapter{rank}",
        name=run.name,
        notice=NOTICE,
    )
    parts = (_start(base, recipe, merged), _training(recipe, report, done, provenance), _scores(run, done))
    return "\n".join([head, *(line for part in parts for line in part)])


def _hub_license(name: str) -> str:
    """The license as the hub names it; `other` if it is unknown, which the hub accepts."""
    return name if re.fullmatch(r"[a-z0-9.-]+", name) and name != "unknown" else "other"


def _start(base: dict[str, str], recipe: dict[str, Any], merged: bool) -> list[str]:
    named = base["hub_id"] if is_hub_id(base["hub_id"]) else "<folder of the base>"
    load = (
        ['model = AutoModelForCausalLM.from_pretrained("<this folder>")']
        if merged
        else [
            f'model = AutoModelForCausalLM.from_pretrained("{named}")',
            'model = PeftModel.from_pretrained(model, "<this folder>")',
        ]
    )
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    return [
        "## How to start",
        "",
        "```python",
        *([] if merged else ["from peft import PeftModel"]),
        *imports,
        "",
        *load,
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
        f"messages = {json.dumps(prompt_messages('Work overwhelms me.', recipe['system']), ensure_ascii=False)}",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))",
        "```",
        "",
        "It was trained with this system prompt. Without it, the answers change."
        if recipe["system"]
        else "It was trained without a system prompt. With one, the answers change.",
        "",
    ]


def _training(
    recipe: dict[str, Any], report: dict[str, Any], done: dict[str, Any], provenance: dict[str, Any]
) -> list[str]:
    revision = f" at revision {report['revision']}" if report.get("revision") else ""
    rows = [
        ("data", f"{_public(report['source'])}{revision}, sha256 {report['source_sha256'][:16]}"),
        *(_pairs if "preferences" in done else _rows)(recipe, report, done),
        ("optimizer", f"{recipe['optim']}, peak learning rate {recipe['learning_rate']:g}, "
                      f"{recipe['lr_scheduler_type']}"),
        ("batch", f"{recipe['batch_size']} rows x {recipe['gradient_accumulation_steps']}"),
        ("length", f"{done['steps']} steps, {done['epochs']:.2f} epochs, {done['tokens']:,} tokens"),
        ("precision", provenance["dtype"] + (", 4-bit base" if _kept_4bit(recipe, done) else "")),
        ("machine", f"{provenance['machine']['name']}; {done['tokens_per_s']:.0f} tokens/s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()
                               if name in ("torch", "transformers", "trl", "peft"))),
        ("seed", str(recipe["seed"])),
    ]  # fmt: skip
    if start := provenance.get("init_adapter"):
        rows.insert(3, ("continues from", f"{start['name']}, sha256 {start['sha256'][:16]}"))
    notes = []
    if start:
        notes.append(f"Training continued from {start['name']}, which may have seen held-out questions in its own.")
    if n := done.get("rows_left_out"):
        notes.append(f"Left out of training: {n} rows whose prompt alone fills {recipe['max_length']} tokens.")
    if (n := done.get("replies_lost", 0)) > done.get("rows_left_out", 0):
        notes.append(f"Lost to training: {n} replies that begin after {recipe['max_length']} tokens.")
    notes += [f"Asked {d['asked']}, used {d['used']}, because {d['because']}." for d in done["downgrades"]]
    table = [f"| {key} | {value} |" for key, value in rows]
    title = ["## Training details", "", _loss(recipe, done), "", "| | |", "|---|---|"]
    return [*title, *table, "", *notes, ""]


def _rows(recipe: dict[str, Any], report: dict[str, Any], done: dict[str, Any]) -> list[tuple[str, str]]:
    """How a fine-tuning chose its rows, and the adapter that it made."""
    return [
        ("rows", f"{report['rows_in']} read, {report['rows_out']} kept; train {report['rows']['train']}, "
                 f"validation {report['rows']['val']}, test {report['rows']['test']}; trained on {done['rows']}"),
        ("split", f"by {report['split']}, seed {report['split_seed']}; {report['leak']} questions in two splits"),
        ("LoRA", f"rank {recipe['rank']}, alpha {recipe['alpha']}{_scale(recipe)}, dropout {recipe['dropout']}, "
                 f"target modules {', '.join(recipe['target_modules'])}; "
                 f"{done['trainable_parameters']:,} trainable parameters"),
    ]  # fmt: skip


def _pairs(recipe: dict[str, Any], report: dict[str, Any], done: dict[str, Any]) -> list[tuple[str, str]]:
    """How a preference training chose its pairs. Its adapter has the shape of the one that it continues from."""
    rows = report["rows"]
    return [
        ("pairs", f"{report['rows_in']} rows read, {report['pairs']} pairs; train {rows['train']}, held out "
                  f"{rows['held_out']}; trained on {done['rows']}"),
        ("split", f"by question, seed {recipe['split_seed']}; no question in both"),
        ("LoRA", f"{done['trainable_parameters']:,} trainable parameters"),
        ("DPO", f"sigmoid loss, beta {recipe['beta']:g}; the reference is the adapter that training continued from"),
    ]  # fmt: skip


def _loss(recipe: dict[str, Any], done: dict[str, Any]) -> str:
    """What the loss counted. Only conversations have more than one reply per row."""
    if "preferences" in done:
        return "The loss counted answer tokens only, of both answers of a pair."
    if recipe.get("train_on_turns") == "last":
        return "The loss counted the tokens of each conversation's last reply only."
    if done.get("replies", done["rows"]) > done["rows"]:
        return f"The loss counted reply tokens only: {done['replies']:,} replies of {done['rows']:,} conversations."
    return "The loss counted answer tokens only."


def _scale(recipe: dict[str, Any]) -> str:
    return " / sqrt(rank) (rsLoRA)" if recipe.get("use_rslora") else ""


def _scores(run: Run, done: dict[str, Any]) -> list[str]:
    by_row = run.config().get("split") == "row"
    unseen = (
        "on rows that were not in training, but most of their questions were: the split is by row"
        if by_row
        else "on questions that were not in training"
    )
    lines = ["## Evaluation", ""]
    if done["val_loss"] is not None:
        lines += [
            f"Validation loss per answer token, in nats: {done['val_loss_base']:.4f} before, {done['val_loss']:.4f} "
            f"after (step {done['best_step']}), {unseen}.",
            "",
        ]
    if "preferences" in done:
        lines += [*_preferences(done["preferences"]), ""]
    summaries = sorted((run.path / "eval").glob("*/summary.json"))
    return [
        *lines,
        *(_answers(read_json(summaries[-1])) if summaries else ["No evaluation of generated answers was run."]),
        "",
    ]


def _preferences(results: dict[str, Any]) -> list[str]:
    """The results of a preference training (train/preferences/scores.py)."""
    held_out, people, length = results["held_out"], results["people_bits_per_byte"], results["length"]
    lines = [
        f"Of {held_out['n']} held-out pairs, {held_out['correct']} are told apart as people did: "
        f"{held_out['accuracy']:.3f}, 95 % interval {held_out['low']:.3f} to {held_out['high']:.3f}; chance is 0.5."
    ]
    if people:
        lines.append(f"People's answers went from {people['before']:.4f} to {people['after']:.4f} bits per byte.")
    if length:
        lines.append(f"Answers went from {length['words_before']:.1f} to {length['words_after']:.1f} words on average.")
    return lines


def _answers(summary: dict[str, Any]) -> list[str]:
    """An evaluation (eval/summary.py has its format): a table of metrics by arm, without yardsticks, and warnings."""
    arms = {name: arm for name, arm in summary["arms"].items() if arm["kind"] != "yardstick"}
    metrics = list(dict.fromkeys(metric for arm in arms.values() for metric in arm["metrics"]))
    table = [
        f"| {metric.replace('_', ' ')} | {' | '.join(_cell(arm['metrics'].get(metric)) for arm in arms.values())} |"
        for metric in metrics
    ]
    # Before format 4 the warnings were called alarms.
    warnings = summary["warnings"] if "warnings" in summary else summary["alarms"]
    return [
        f"Answers to {summary['questions']} held-out questions (evaluation {summary['stamp']}): value and 95 % "
        "interval. The scores measure similarity to human answers, not whether the answers help.",
        "",
        f"| metric | {' | '.join(arms)} |",
        "|---" * (len(arms) + 1) + "|",
        *table,
        "",
        *(f"- {warning}" for warning in warnings),
    ]


def _cell(value: dict[str, Any] | None) -> str:
    """A value with its interval. An arm may lack a metric, and a single question has no interval."""
    if value is None:
        return "-"
    interval = "" if value["low"] is None else f" ({value['low']:.3g} to {value['high']:.3g})"
    return f"{value['value']:.3g}{interval}"


def _provenance(run: Run) -> dict[str, Any]:
    return read_json(run.path / "provenance.json")


def _kept_4bit(recipe: dict[str, Any], done: dict[str, Any]) -> bool:
    return bool(recipe["load_in_4bit"]) and not any("4-bit" in item["asked"] for item in done["downgrades"])


def _public(source: str) -> str:
    """A hub id unchanged, or the name of a file without its folders, which may contain a person's name."""
    is_file = Path(source).suffix.lower().lstrip(".") in FILE_KINDS or source.startswith((".", "/", "~"))
    return Path(source).name if is_file else source
