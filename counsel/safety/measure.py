"""Recall by class and false positives by slice, with exact bounds.

`python -m counsel.safety.measure` judges the messages of `data/test` with the shipped detector and writes what it finds
to the card. A test set is good for one such run: who changes the detector after it needs a new one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from counsel.files import write_json
from counsel.safety.corpus import read_messages
from counsel.safety.detector import CARD, Detector
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


def measure(part: Literal["dev", "test"]) -> dict[str, Any]:
    """Write to the shipped detector's card how it judges one part of the corpus; return the card."""
    detector = Detector.load()
    rows = [Judged(row.label, row.slice, detector.assess(row.turns).label) for row in read_messages(part)]
    card = detector.card | {"measured_on": part} | detection_figures(rows)
    write_json(CARD, card)
    return card


def say_figures(card: Mapping[str, Any]) -> None:
    """Print the figures of a card."""
    print(f"measured on {card['measured_on']}, {card['n']} messages")
    for kind in ("recall", "same_class", "false_positives"):
        for name, cell in card[kind].items():
            print(f"{kind:16} {name:16} {cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f}, n {cell['n']})")


if __name__ == "__main__":
    say_figures(measure("test"))
