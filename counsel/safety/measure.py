"""Recall by class and false positives by slice, with exact bounds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from counsel.safety.labels import LABELS, NONE

# Two-sided, as Clopper and Pearson's interval is usually given.
CONFIDENCE = 0.95


class Judged(NamedTuple):
    """One message with a known label, and what was made of it: one of LABELS."""

    label: str
    slice: str
    found: str


def share_with_bounds(hits: int, n: int) -> dict[str, Any]:
    """A share with its exact (Clopper-Pearson) 95 % interval."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(CONFIDENCE, method="exact")
    return {"value": hits / n, "low": float(interval.low), "high": float(interval.high), "hits": hits, "n": n}


def detection_figures(rows: Sequence[Judged]) -> dict[str, Any]:
    """`recall` by class: any risk found counts, since each one gets an answer. `same_class`: the class itself found.

    `false_positives` by slice, over messages without risk, and under `all`.
    """
    recall: dict[str, Mapping[str, Any]] = {}
    same: dict[str, Mapping[str, Any]] = {}
    for label in LABELS:
        of_label = [row for row in rows if row.label == label]
        if label != NONE and of_label:
            recall[label] = share_with_bounds(sum(row.found != NONE for row in of_label), len(of_label))
            same[label] = share_with_bounds(sum(row.found == label for row in of_label), len(of_label))
    safe = [row for row in rows if row.label == NONE]
    slices = {name: [row for row in safe if row.slice == name] for name in sorted({row.slice for row in safe})}
    false_positives = {
        name: share_with_bounds(sum(row.found != NONE for row in members), len(members))
        for name, members in ({**slices, "all": safe} if safe else {}).items()
    }
    return {"n": len(rows), "recall": recall, "same_class": same, "false_positives": false_positives}
