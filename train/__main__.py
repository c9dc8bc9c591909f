"""`python -m train`: fine-tune an adapter; check a recipe; merge and push a run; measure the split's leak."""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from counsel import cli
from counsel.cli import Command, Result
from train.merge import Merge
from train.preferences.recipe import PreferenceRecipe
from train.push import Push
from train.recipe import RECIPES, Recipe


def run_train(recipe: Recipe) -> Result:
    from train.experiments import train_seeds
    from train.sft import train

    if recipe.seeds:
        return Result(train_seeds(recipe), next="compare the seeds with python -m eval --run RUN, one run at a time")
    summary = train(recipe)
    # Of several processes only the first has a summary.
    if not summary:
        return Result(summary)
    print(_overview(summary))
    served = f"python -m serve --model {shlex.quote(recipe.base)}"
    chat = f"python -m serve chat {recipe.name}"
    if summary["adapter"] is None:
        return Result(summary, next=f"python -m serve publish {recipe.name}, then {served} and {chat}")
    return Result(summary, next=f"{served}, and in another terminal {chat}, or python -m eval --run {recipe.name}")


def _overview(summary: dict[str, Any]) -> str:
    """The facts of a finished training, one per line."""
    lines = [("adapter", f"{summary['run']}/adapter")]
    if summary["adapter"]:
        lines.append(("published", summary["adapter"]))
    lines.append(("steps", f"{summary['steps']} in {summary['wall_s']:.0f} s, {summary['tokens_per_s']:.0f} tokens/s"))
    if summary["val_loss"] is None:
        lines.append(("train loss", f"{summary['train_loss_first']:.3f} to {summary['train_loss_last']:.3f}"))
    else:
        best = f"{summary['val_loss_base']:.3f} to {summary['val_loss']:.3f}, best at step {summary['best_step']}"
        lines.append(("val loss", best))
    lines.append(("loss curve", f"{summary['run']}/loss.png"))
    return "\n".join(f"{label:<12} {text}" for label, text in lines)


def run_dpo(recipe: PreferenceRecipe) -> Result:
    from counsel.report.tables import text_table
    from train.preferences.dpo import train_preferences
    from train.preferences.report import preference_cells, preference_finding

    summary = train_preferences(recipe)
    print(text_table(preference_cells(summary["preferences"])))
    print(preference_finding(summary["preferences"]))
    if summary["adapter"]:
        print(f"published    {summary['adapter']}")
    print(f"report       {summary['run']}/preferences.html")
    return Result(summary, next=f"python -m eval --run {recipe.name}, before people get it")


def run_check(recipe: Recipe) -> Result:
    from train.checklist import Finding
    from train.hardware import choose_precision, detect_training_hardware
    from train.preflight import check_recipe

    hardware = detect_training_hardware()
    findings: list[Finding] = []

    def show(finding: Finding) -> None:
        print(finding, flush=True)
        findings.append(finding)

    ready = check_recipe(recipe, choose_precision(recipe, hardware), hardware, show) is not None
    checks = [finding._asdict() for finding in findings]
    return Result({"ready": ready, "checks": checks}, 0 if ready else 1, _after_check() if ready else "")


def _after_check() -> str:
    """The command that starts the training which was just checked: the same arguments without `check`."""
    # Code that calls `main` has other arguments in sys.argv.
    given = sys.argv[sys.argv.index("check") + 1 :] if "check" in sys.argv else ["RECIPE"]
    return f"python -m train {shlex.join(word for word in given if word != '--json')}"


def run_merge(config: Merge) -> Result:
    from train.merge import merge

    document = merge(config)
    loaded = f"AutoModelForCausalLM.from_pretrained({document['merged']!r})"
    return Result(document, next=f"load it with {loaded}, or python -m serve --model {document['merged']}")


def run_push(config: Push) -> Result:
    from train.push import push

    return Result(push(config))


def run_leak(recipe: Recipe) -> Result:
    from train.experiments import leak_experiment

    return Result(leak_experiment(recipe))


COMMANDS = {
    "": Command(Recipe, run_train, "fine-tune a LoRA adapter and publish it to the adapter store", RECIPES),
    "dpo": Command(PreferenceRecipe, run_dpo, "train an adapter further on preference pairs, such as votes"),
    "check": Command(Recipe, run_check, "find in seconds what would fail later, without loading weights", RECIPES),
    "merge": Command(Merge, run_merge, "save base and adapter as one model for plain transformers"),
    "push": Command(Push, run_push, "put an adapter or merged model on the Hub; --dry-run sends nothing"),
    "leak-experiment": Command(Recipe, run_leak, "measure how much of a gain is leakage between splits", RECIPES),
}


def main(argv: Sequence[str] | None = None, launcher: str = "python -m") -> int:
    """Run one of COMMANDS; return the exit status."""
    # What people tell such a model is private: no library reports anything about a run unless the user allows it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Of several processes (accelerate launch) only the first prints results.
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (open for the life of the process)
    return cli.main("train", COMMANDS, argv, launcher)


if __name__ == "__main__":
    sys.exit(main())
