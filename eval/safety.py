"""Measure crisis detection on labelled messages: the project's held-out ones, or other people's files.

    python -m eval safety
    python -m eval safety prompts.csv --text prompt --label category --labels "suicidal=active,benign=none"

A file is JSONL, or CSV with a header. Its text column holds a text, in JSONL also a list of the user's turns. Rows
whose label is not in `--labels` (default: our own names) are left out and counted. Without a label column, all
rows have the label that `--labels` names as `=LABEL`.

The rubric has one boolean per class and kind of message: is the share what it must be? Exit status: 0 if all hold, 3 if
one does not, 4 if there was no message to judge any by.
"""

import csv
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counsel.cli import CANNOT_BE_JUDGED, MISSED, Result
from counsel.errors import UserError
from counsel.files import read_jsonl, write_jsonl
from counsel.report.tables import markdown_table
from counsel.safety.corpus import read_messages
from counsel.safety.detector import BOUNDED, Detector
from counsel.safety.keywords import has_keyword
from counsel.safety.labels import LABELS, NONE
from counsel.safety.measure import Judged, detection_figures
from counsel.values import nearest
from eval.config import SafetyConfig

_WHAT = {"recall": "recall", "same_class": "found as this class", "false_positives": "false positives"}


class _Row(NamedTuple):
    turns: tuple[str, ...]
    label: str
    slice: str


def safety(config: SafetyConfig) -> Result:
    """Judge every message with the detector and with a list of keywords; print both."""
    import torch

    rows, skipped = _rows(config)
    detector = Detector.load()
    # A server lends the detector one core.
    torch.set_num_threads(1)
    detector.assess(["warm up"])
    found, seconds = [], []
    for row in rows:
        start = time.perf_counter()
        found.append(detector.assess(row.turns).label)
        seconds.append(time.perf_counter() - start)
    ours = detection_figures([Judged(row.label, row.slice, label) for row, label in zip(rows, found, strict=True)])
    words = detection_figures([Judged(row.label, row.slice, _by_keyword(row)) for row in rows])
    rubric = _rubric(ours, config)
    p50, p99 = (float(value) * 1e3 for value in np.quantile(seconds, (0.5, 0.99)))
    print(_table(ours, words))
    print(f"latency of one message on one core: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    for check, holds in rubric.items():
        print(f"{'pass' if holds else 'FAIL'}  {check}")
    if config.misses:
        wrong = [
            {"turns": list(row.turns), "label": row.label, "slice": row.slice, "found": label}
            for row, label in zip(rows, found, strict=True)
            if (row.label == NONE) != (label == NONE)
        ]
        write_jsonl(Path(config.misses), wrong)
    status = CANNOT_BE_JUDGED if not rubric else 0 if all(rubric.values()) else MISSED
    document = {
        "detector": ours, "keywords": words, "latency_ms": {"p50": p50, "p99": p99}, "rubric": rubric,
        "left_out": skipped, "model_sha256": detector.card["model_sha256"],
    }  # fmt: skip
    return Result(document, status)


def _by_keyword(row: _Row) -> str:
    """The baseline knows no classes: what it finds counts as the class that the message has, or as any."""
    return (row.label if row.label != NONE else BOUNDED[0]) if any(map(has_keyword, row.turns)) else NONE


def _rubric(ours: Mapping[str, Any], config: SafetyConfig) -> dict[str, bool]:
    """Booleans by what they say."""
    checks = {
        f"recall of {label} >= {config.min_recall:g}": ours["recall"][label]["value"] >= config.min_recall
        for label in BOUNDED
        if label in ours["recall"]
    }
    for name, cell in ours["false_positives"].items():
        # Of a slice of a few messages, one would decide.
        if cell["n"] >= 1 / config.max_false_positives or name == "all":
            checks[f"false positives, {name} <= {config.max_false_positives:g}"] = (
                cell["value"] <= config.max_false_positives
            )
    return checks


def _table(ours: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    """One line per class or slice: the share with its exact interval, and the keyword list's."""
    lines = [["measure", "of", "n", "detector", "95 % interval", "keyword list"]]
    for key, title in _WHAT.items():
        for name, cell in ours[key].items():
            baseline = "" if key == "same_class" else f"{words[key][name]['value']:.3f}"
            interval = f"{cell['low']:.3f} to {cell['high']:.3f}"
            lines.append([title, name, str(cell["n"]), f"{cell['value']:.3f}", interval, baseline])
    return markdown_table(lines)


def _rows(config: SafetyConfig) -> tuple[list[_Row], dict[str, int]]:
    """The labelled messages, and how many rows were left out by their label."""
    if not config.files:
        return [_Row(row.turns, row.label, row.slice) for row in read_messages("test")], {}
    mapping = _mapping(config.labels)
    rows: list[_Row] = []
    skipped: Counter[str] = Counter()
    for name in config.files:
        for number, record in enumerate(_records(Path(name)), start=1):
            given = str(_cell(record, config.label, name, number)) if config.label else ""
            if given not in mapping:
                skipped[given] += 1
                continue
            text = _cell(record, config.text, name, number)
            turns = tuple(map(str, text)) if isinstance(text, list) else (str(text),)
            part = str(_cell(record, config.slice, name, number)) if config.slice else Path(name).stem
            rows.append(_Row(turns, mapping[given], part))
    if not rows:
        raise UserError(
            f"no row of {', '.join(config.files)} has a label of {sorted(mapping)}; its labels are "
            f"{sorted(skipped)[:10]}: map them with --labels"
        )
    return rows, dict(skipped)


def _mapping(pairs: Sequence[str]) -> dict[str, str]:
    """Their label to ours; ours to itself where nothing is given."""
    mapping = {}
    for pair in pairs:
        theirs, equals, label = pair.rpartition("=")
        if not equals or label not in LABELS:
            raise UserError(f"labels has {pair!r}; write THEIRS=OURS, and {nearest(label, LABELS)}")
        mapping[theirs.strip()] = label
    return mapping or {label: label for label in LABELS}


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix != ".csv":
        yield from read_jsonl(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {str(path)!r} as CSV: {getattr(error, 'strerror', None) or error}") from error


def _cell(record: Mapping[str, Any], column: str, name: str, number: int) -> Any:
    if record.get(column) is None:
        known = ", ".join(str(key) for key in record)
        raise UserError(f"row {number} of {name!r} has no {column!r}; its columns are {known}")
    return record[column]
