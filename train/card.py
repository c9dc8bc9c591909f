"""The model card of a run: what it is, what it is not for, how it was made, how it scored. Written from its files."""

import json
import re
from pathlib import Path
from typing import Any

from counsel.chat import NOTICE, prompt_messages
from counsel.files import read_json
from counsel.run import Run

# Endings of data files, compressed ones too: a hub id (org/name) may hold a dot, but none of these after it.
FILE_KINDS = ("csv", "tsv", "txt", "json", "jsonl", "ndjson", "parquet", "gz", "zip", "bz2", "xz", "zst")

_HEAD = """---
{base_model}library_name: {library}
license: {license}
{language}pipeline_tag: text-generation
tags: [lora, sft, trl, supportive-conversation]
---
# {name}

{notice}

## Summary

{kind} of {base}, fine-tuned on questions people ask about their lives and answers
to them, so that it replies at length, warmly and practically. Made with Counsel Stack.

## Direct use

Research on supportive conversation: comparing prompts, adapters and safety measures, offline or with informed adults.

## Downstream use

A starting point for further fine-tuning, or one adapter of several behind a server that adds its own safety layer.

## Out-of-scope use

- crisis management, or any use where someone in danger relies on the reply
- diagnosis, advice on medication, or replacing a qualified person
- use with people who have not been told that they talk to a research model, or with minors

## Bias, risks and limitations

- It can be wrong, generic or harmful, and sounds sure of itself either way.
- It learnt from {rows:,} answers; cultures and situations that are not among them are poorly covered.
- It remembers nothing between conversations and cannot see, verify or act on anything.
- A small base model repeats itself and invents facts. Fine-tuning changed its tone more than its knowledge.

## Recommendations

Keep a person in charge, show the notice above, route signs of danger to local emergency services or a crisis line
(findahelpline.com), log no private text, and evaluate on your own questions before any use.
"""


def card_text(run: Run, merged: bool = False, summary: dict[str, Any] | None = None) -> str:
    """The README.md of a run's adapter, or of its merged model. `summary` stands in for train.json before it exists."""
    recipe, report, provenance = run.config(), read_json(run.path / "data" / "report.json"), _provenance(run)
    done = summary if summary is not None else run.summary()
    base = done["base"]
    hub_id = base["hub_id"] if is_public(base) else None
    head = _HEAD.format(
        # The hub refuses a card whose base is a path, and a path may name people.
        base_model=f"base_model: {hub_id}\n" if hub_id else "",
        base=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"{base['name']}, a local model",
        # Of other data nobody has said the language.
        language="language: en\n" if report["source"] == "sample" else "",
        license=_hub_license(base["license"]),
        rows=done["rows"],
        library="transformers" if merged else "peft",
        kind="A merged copy" if merged else f"A LoRA adapter (rank {recipe['rank']})",
        name=run.name,
        notice=NOTICE,
    )
    parts = (_start(base, recipe, merged), _training(recipe, report, done, provenance), _scores(run, done))
    return "\n".join([head, *(line for part in parts for line in part)])


def is_public(base: dict[str, str]) -> bool:
    """Is the base known by a hub id (org/name)? Else its `hub_id` is a folder's path on the machine that trained."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base["hub_id"]) is not None


def _hub_license(name: str) -> str:
    """The licence as the hub names it; `other` where it is not known, which the hub's check takes."""
    return name if re.fullmatch(r"[a-z0-9.-]+", name) and name != "unknown" else "other"


def _start(base: dict[str, str], recipe: dict[str, Any], merged: bool) -> list[str]:
    named = base["hub_id"] if is_public(base) else "<folder of the base>"
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
        "It was trained with this system text; leave it out and the answers change."
        if recipe["system"]
        else "It was trained without a system text; add one and the answers change.",
        "",
    ]


def _training(
    recipe: dict[str, Any], report: dict[str, Any], done: dict[str, Any], provenance: dict[str, Any]
) -> list[str]:
    revision = f" at revision {report['revision']}" if report.get("revision") else ""
    rows = [
        ("data", f"{_public(report['source'])}{revision}, sha256 {report['source_sha256'][:16]}"),
        ("rows", f"{report['rows_in']} read, {report['rows_out']} kept; train {report['rows']['train']}, "
                 f"validation {report['rows']['val']}, test {report['rows']['test']}; trained on {done['rows']}"),
        ("split", f"by {report['split']}, seed {report['split_seed']}; {report['leak']} questions in two splits"),
        ("LoRA", f"rank {recipe['rank']}, alpha {recipe['alpha']}, dropout {recipe['dropout']}, "
                 f"targets {', '.join(recipe['targets'])}; {done['trainable_parameters']:,} trainable parameters"),
        ("optimiser", f"{recipe['optimizer']}, peak learning rate {recipe['learning_rate']:g}, {recipe['schedule']}"),
        ("batch", f"{recipe['batch_size']} rows x {recipe['gradient_accumulation_steps']}"),
        ("length", f"{done['steps']} steps, {done['epochs']:.2f} epochs, {done['tokens']:,} tokens"),
        ("precision", provenance["dtype"] + (", 4-bit base" if _kept_4bit(recipe, done) else "")),
        ("machine", f"{provenance['machine']['name']}; {done['tokens_per_s']:.0f} tokens/s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()
                               if name in ("torch", "transformers", "trl", "peft"))),
        ("seed", str(recipe["seed"])),
    ]  # fmt: skip
    notes = []
    if n := done.get("rows_left_out"):
        notes.append(f"Left out of training: {n} rows whose prompt alone fills {recipe['max_length']} tokens.")
    notes += [f"Asked {d['asked']}, used {d['used']}, because {d['because']}." for d in done["downgrades"]]
    table = [f"| {key} | {value} |" for key, value in rows]
    title = ["## Training details", "", "The loss counted answer tokens only.", "", "| | |", "|---|---|"]
    return [*title, *table, "", *notes, ""]


def _scores(run: Run, done: dict[str, Any]) -> list[str]:
    by_row = run.config()["split"] == "row"
    unseen = (
        "on rows that were not in training, though most of their questions were: the split is by row"
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
    found = sorted((run.path / "eval").glob("*/summary.json"))
    return [*lines, *(_answers(read_json(found[-1])) if found else ["No evaluation of generated answers was run."]), ""]


def _answers(summary: dict[str, Any]) -> list[str]:
    """An evaluation (its format is in eval/summary.py): metrics by arms, yardsticks left out, and its warnings."""
    arms = {name: arm for name, arm in summary["arms"].items() if arm["kind"] != "yardstick"}
    metrics = list(dict.fromkeys(metric for arm in arms.values() for metric in arm["metrics"]))
    table = [
        f"| {metric.replace('_', ' ')} | {' | '.join(_cell(arm['metrics'].get(metric)) for arm in arms.values())} |"
        for metric in metrics
    ]
    return [
        f"Answers to {summary['questions']} held-out questions (evaluation {summary['stamp']}): value and 95 % "
        "interval. The scores say how like human answers they are, not whether they help.",
        "",
        f"| metric | {' | '.join(arms)} |",
        "|---" * (len(arms) + 1) + "|",
        *table,
        "",
        *(f"- {warning}" for warning in summary["warnings"]),
    ]


def _cell(value: dict[str, Any] | None) -> str:
    """A value with its interval; an arm may lack a metric, and a single question has no interval."""
    if value is None:
        return "-"
    interval = "" if value["low"] is None else f" ({value['low']:.3g} to {value['high']:.3g})"
    return f"{value['value']:.3g}{interval}"


def _provenance(run: Run) -> dict[str, Any]:
    return read_json(run.path / "provenance.json")


def _kept_4bit(recipe: dict[str, Any], done: dict[str, Any]) -> bool:
    return bool(recipe["load_in_4bit"]) and not any("4-bit" in item["asked"] for item in done["downgrades"])


def _public(source: str) -> str:
    """A hub id as it is; of a file only its name, since folders may name people."""
    is_file = Path(source).suffix.lower().lstrip(".") in FILE_KINDS or source.startswith((".", "/", "~"))
    return Path(source).name if is_file else source
