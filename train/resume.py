"""A run directory before training: whether it may be made, replaced or resumed, and from which checkpoint."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import new_directory, read_json, replaced_directory, sha256_of, write_json
from counsel.run import Run
from train import data
from train.settings import RunSettings

# Written into a checkpoint after its other files reached the disk: the SHA-256 of each of them.
SEAL = "whole.json"


def check_run_directory(recipe: RunSettings) -> None:
    """Raise UserError, before anything is written, if the run exists or --resume would not continue the same run."""
    run = Run(recipe.run_path)
    if not recipe.resume:
        if run.path.exists() and not recipe.overwrite:
            raise UserError(
                f"run {str(run.path)!r} exists; continue it with --resume, replace it with --overwrite, "
                "or choose another --name"
            )
        if run.path.exists():
            check_replaceable(recipe, ("config.json", "data/report.json"))
        return
    if run.complete:
        raise UserError(f"run {recipe.name!r} is finished: nothing to resume; --overwrite trains it again")
    if not (run.path / "config.json").is_file():
        raise UserError(f"no run to resume at {str(run.path)!r}; leave --resume out to start it")
    check_same_settings(recipe)


def check_same_settings(recipe: RunSettings) -> None:
    """Raise UserError if the run at the recipe's path was started with other settings."""
    before, now = Run(recipe.run_path).config(), as_json(recipe.document())
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{key} is {now.get(key)!r}, but run {recipe.name!r} was started with {before.get(key)!r}; "
            "resume with the same settings, or start again with --overwrite"
        )


def check_replaceable(recipe: RunSettings, required: tuple[str, ...]) -> None:
    """Raise UserError unless --overwrite may remove the folder at the recipe's path.

    It must hold the `required` files, as every folder of its kind does, and nothing that the new training reads.
    """
    path = recipe.run_path
    missing = [name for name in required if not (path / name).is_file()]
    if path.is_symlink() or missing:
        what = "a symbolic link" if path.is_symlink() else f"not an earlier run (it has no {missing[0]})"
        raise UserError(
            f"{str(path)!r} is {what}, so --overwrite does not remove it; choose another --name, or move it away"
        )
    for key, value in (
        ("base", recipe.base),
        ("data", recipe.data),
        ("store", recipe.store),
        ("from", recipe.init_adapter),
    ):
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(path.resolve()):
            raise UserError(f"{key} is {value!r}, inside the run that --overwrite would remove; choose another --name, "
                            "or copy it elsewhere first")  # fmt: skip


@contextlib.contextmanager
def opened_run(recipe: RunSettings, prepared: tuple[data.Splits, data.Report] | None) -> Iterator[None]:
    """`opened_folder` for a run on conversations. prepared: the data of a new run; None keeps what a run has."""

    def write(folder: Path) -> None:
        if prepared is not None:
            data.write(folder, *prepared)

    with opened_folder(recipe, write if prepared else None):
        if prepared is not None:
            print(prepared[1])
        yield


@contextlib.contextmanager
def opened_folder(recipe: RunSettings, write_data: Callable[[Path], None] | None) -> Iterator[None]:
    """Make the run's directory with its config and data, and lock it against other processes until the block ends.

    write_data: writes the data of a new run into its folder; None keeps what a resumed run has. Raises UserError if
    another process trains it.
    """
    path = recipe.run_path
    with contextlib.ExitStack() as stack:
        if path.exists():
            stack.enter_context(_lock(path, recipe.name))
        if write_data is not None:
            with (replaced_directory if recipe.overwrite else new_directory)(path) as folder:
                stack.enter_context(_lock(folder, recipe.name))
                write_json(folder / "config.json", recipe.document())
                write_data(folder)
        yield


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"run {name!r} is being trained by another process; wait for it to end, or choose another "
                            "--name") from error  # fmt: skip
        yield


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, after its files have reached the disk."""
    sums = {}
    for path in sorted(checkpoint.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sums[path.name] = sha256_of(path)
    write_json(checkpoint / SEAL, sums)


def last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint, named on stderr. Newer ones that a kill or a full disk damaged are removed."""
    folders = (run.path / "checkpoints").glob("checkpoint-*")
    for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        if reason := _damage(folder):
            print(f"resume       skipping {folder.name}: {reason}", file=sys.stderr)
            shutil.rmtree(folder)
            continue
        print(f"resume       from {folder.name}", file=sys.stderr)
        return folder
    print("resume       from the first step: there is no complete checkpoint", file=sys.stderr)
    return None


def _damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it is as it was written."""
    try:
        sums = read_json(checkpoint / SEAL)
        changed = [name for name, expected in sums.items() if sha256_of(checkpoint / name) != expected]
    except (UserError, OSError):
        return "it is incomplete"
    return f"{changed[0]} has changed since it was written" if changed else None


def as_json(document: dict[str, Any]) -> dict[str, Any]:
    """`document` as it reads back from config.json, where tuples are lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in document.items()}
