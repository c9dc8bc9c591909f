"""A training loads each of its inputs once: what the checks loaded, the run uses."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from counsel import catalog
from counsel.files import write_jsonl
from tests.tiny import tiny_base
from tests.train_runs import recipe_for
from train.checklist import Finding
from train.data import load_rows
from train.experiments import equal_counts
from train.hardware import choose_precision, detect_training_hardware
from train.preflight import check_recipe

_opened: list[Path] = []
_watching = False


def _record_open(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(args[0], str | os.PathLike):
        _opened.append(Path(args[0]))


sys.addaudithook(_record_open)


@contextmanager
def opened_files() -> Iterator[list[Path]]:
    """The files that Python opens in this block, once per time."""
    global _watching
    _opened.clear()
    _watching = True
    try:
        yield _opened
    finally:
        _watching = False


def callers_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """A list that gets the calling module for each call of `owner.name` from the trainer."""
    callers: list[str] = []
    original = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith("train."):
            callers.append(caller)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)
    return callers


def test_a_training_loads_data_base_and_tokenizer_once(tmp_path, monkeypatch):
    """The checks load them, and neither the run directory nor the trainer loads them again."""
    from train.sft import train

    recipe = recipe_for(tiny_base(tmp_path / "base", "llama"), tmp_path, max_steps=2, evaluations=1, samples=0)
    calls = [
        callers_of(monkeypatch, owner, name)
        for owner, name in (
            (catalog, "resolve"),
            (AutoTokenizer, "from_pretrained"),
            (AutoConfig, "from_pretrained"),
        )
    ]

    with opened_files() as opened:
        train(recipe)

    assert opened.count(Path(recipe.data)) == 1
    assert calls == [["train.preflight"]] * 3


def test_a_check_returns_what_it_loaded_unless_it_failed(tmp_path):
    """The rows are those of the data file, which is opened once; after a failure nothing is returned."""
    recipe = recipe_for(tiny_base(tmp_path / "base", "llama"), tmp_path)
    hardware = detect_training_hardware()
    findings: list[Finding] = []

    with opened_files() as opened:
        prepared = check_recipe(recipe, choose_precision(recipe, hardware), hardware, findings.append)

    assert opened.count(Path(recipe.data)) == 1
    assert prepared is not None
    assert prepared.base.path == Path(recipe.base)
    assert sum(map(len, prepared.splits.values())) == prepared.report.rows_out == 80
    refused = replace(recipe, name="Not Allowed")
    assert check_recipe(refused, choose_precision(refused, hardware), hardware, findings.append) is None


def test_counting_the_rows_of_six_splits_reads_the_file_once(tmp_path):
    """Three seeds by two units are split from the same cleaned rows."""
    rows = [{"Context": f"question {n}", "Response": f"breathe and talk to friend {n} today"} for n in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = replace(recipe_for(tmp_path, tmp_path).data_config(), data=str(tmp_path / "rows.jsonl"))

    with opened_files() as opened:
        n_train, n_val = equal_counts(config, (1, 2, 3))

    assert opened.count(tmp_path / "rows.jsonl") == 1
    assert 0 < n_val < n_train < len(load_rows(config).cleaned.rows)
