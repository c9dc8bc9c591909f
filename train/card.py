"""The model card of an adapter: what it is, what it is not for, how it was made and how it scored."""

from pathlib import Path
from typing import Any

from train.catalog import Base
from train.chat import NOTICE
from train.recipe import Recipe


def write_card(folder: Path, recipe: Recipe, base: Base, summary: dict[str, Any]) -> None:
    """Write README.md in `folder`, over whatever PEFT left there."""
    (folder / "README.md").write_text(f"# {recipe.name}\n\n{NOTICE}\n", encoding="utf-8")
