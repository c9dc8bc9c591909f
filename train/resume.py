"""A run directory before training: may it be made, replaced or continued, and from which checkpoint."""

import shutil
from pathlib import Path
from typing import Any

from train import data
from train.errors import UserError
from train.files import read_json, replaced_directory, write_json
from train.recipe import Recipe
from train.run import Run


def check_run_directory(recipe: Recipe) -> None:
    """Refuse, before anything is touched, a run that exists, or a --resume that would not continue the same run."""
    run = Run(recipe.run_path)
    if not recipe.resume:
        if run.path.exists() and not recipe.overwrite:
            raise UserError(
                f"run {str(run.path)!r} exists; go on with --resume, replace it with --overwrite, "
                "or choose another --name"
            )
        if run.path.exists():
            refuse_to_replace(recipe, ("config.json", "data/report.json"))
        return
    if run.complete:
        raise UserError(f"run {recipe.name!r} is finished: nothing to resume; --overwrite trains it again")
    if not (run.path / "config.json").is_file():
        raise UserError(f"no run to resume at {str(run.path)!r}; leave --resume out to start it")
    before, now = run.config(), _as_json(recipe.document())
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{key} is {now.get(key)!r}, but run {recipe.name!r} was started with {before.get(key)!r}; "
            "resume with the same settings, or start again with --overwrite"
        )


def refuse_to_replace(recipe: Recipe, marks: tuple[str, ...]) -> None:
    """Raise UserError unless --overwrite may remove what is at the recipe's path.

    marks: files that a folder of the kind always holds. Nor may the training need anything that lies in it.
    """
    path = recipe.run_path
    missing = [mark for mark in marks if not (path / mark).is_file()]
    if path.is_symlink() or missing:
        what = "a symbolic link" if path.is_symlink() else f"no earlier run (it has no {missing[0]})"
        raise UserError(
            f"{str(path)!r} is {what}, so --overwrite does not remove it; choose another --name, or move it away"
        )
    for key, value in (("base", recipe.base), ("data", recipe.data), ("store", recipe.store)):
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(path.resolve()):
            raise UserError(f"{key} is {value!r}, inside the run that --overwrite would remove; choose another --name, "
                            "or copy it elsewhere first")  # fmt: skip


def open_run_directory(recipe: Recipe) -> None:
    """Make the run's directory, config and data in place; a run that is resumed keeps what it has."""
    path = recipe.run_path
    if recipe.resume:
        return
    splits, report = data.prepare(recipe.data_config())
    with replaced_directory(path) as folder:
        write_json(folder / "config.json", recipe.document())
        data.write(folder, splits, report)
    print(report)


def last_checkpoint(run: Run) -> Path | None:
    """The newest whole checkpoint; those that a kill cut short are removed. trainer_state.json is written last."""
    whole = []
    for folder in (run.path / "checkpoints").glob("checkpoint-*"):
        try:
            whole.append((read_json(folder / "trainer_state.json")["global_step"], folder))
        except UserError:
            shutil.rmtree(folder)
    return max(whole)[1] if whole else None


def _as_json(document: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from config.json: tuples are lists there."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in document.items()}
