"""`python -m train`: fine-tune an adapter; check a recipe; merge and push a run; measure the split's leak."""

import os
import sys

from train.command import Command, Result, main
from train.merge import Merge
from train.push import Push
from train.recipe import RECIPES, Recipe


def run_train(recipe: Recipe) -> Result:
    from train.experiments import train_seeds
    from train.sft import train

    return Result(train_seeds(recipe) if recipe.seeds else train(recipe))


def run_check(recipe: Recipe) -> Result:
    from train.hardware import machine, plan
    from train.preflight import check

    here = machine()
    findings = []
    for finding in check(recipe, plan(recipe, here), here):
        print(finding, flush=True)
        findings.append(finding)
    ready = all(finding.ok for finding in findings)
    return Result({"ready": ready, "checks": [finding._asdict() for finding in findings]}, 0 if ready else 1)


def run_merge(config: Merge) -> Result:
    from train.merge import merge

    return Result(merge(config))


def run_push(config: Push) -> Result:
    from train.push import push

    return Result(push(config))


def run_leak(recipe: Recipe) -> Result:
    from train.experiments import leak_experiment

    return Result(leak_experiment(recipe))


COMMANDS = {
    "": Command(Recipe, run_train, "fine-tune a LoRA adapter and publish it into the adapter store", RECIPES),
    "check": Command(Recipe, run_check, "what would fail later, found in seconds, without loading weights", RECIPES),
    "merge": Command(Merge, run_merge, "base and adapter as one folder for plain transformers"),
    "push": Command(Push, run_push, "put an adapter or merged model on the Hub; --dry-run sends nothing"),
    "leak-experiment": Command(Recipe, run_leak, "how much of a gain is leak: split by row and by question", RECIPES),
}

if __name__ == "__main__":
    # What people tell such a model is private: nothing about a run is reported to anyone unless they ask for it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Of several processes (accelerate launch) only the first has results to print.
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (open for the life of the process)
    sys.exit(main("train", COMMANDS))
