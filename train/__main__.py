"""`python -m train`: fine-tune an adapter, check a recipe, merge, push."""

import os
import sys

from train.command import Command, Result, main
from train.recipe import RECIPES, Recipe


def run_train(recipe: Recipe) -> Result:
    from train.sft import train

    return Result(train(recipe))


COMMANDS = {
    "": Command(Recipe, run_train, "fine-tune a LoRA adapter and publish it into the adapter store", RECIPES),
}

if __name__ == "__main__":
    # What people tell such a model is private: nothing about a run is reported to anyone unless they ask for it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main("train", COMMANDS))
