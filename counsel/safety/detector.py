"""Detects a crisis in the user's turns of a conversation. Reads; never answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.errors import UserError
from counsel.files import read_json, sha256_of
from counsel.safety.labels import ACTIVE, IMMINENT, LABELS, NONE, RISKS, SELF_HARM
from counsel.safety.units import Unit, conversation_units

if TYPE_CHECKING:
    from counsel.safety.classifier import Reader

Shares = NDArray[np.float64]

MODEL = Path(__file__).parent / "detector.npz"
CARD = MODEL.with_name("card.json")
# What the card must show before the detector may serve: the exact lower bound of recall of each of these classes, and
# the share of false positives. `counsel eval safety` judges by the targets, .95 and .05; docs/safety.md has both.
BOUNDED = (IMMINENT, ACTIVE, SELF_HARM)
LEAST_RECALL_BOUND, MOST_FALSE_POSITIVES = 0.80, 0.10
# Of the three sums of probabilities, each wider than the one before.
THRESHOLDS = ("urgent", "own", "any")
# The power of the number of passages by which the odds of a risk are divided. Of long letters put together of `dev`,
# .79 with an urgent sentence and .28 without are found at 0.75, .70 and .15 at 1.25,
# .62 and .11 at 1.5, with `urgent` at 0.3.
_DISCOUNT = 1.25
# Texts of earlier turns whose probabilities are kept, so that a conversation's newest turn is all that costs time.
_KEPT_TEXTS = 4096


class Assessment(NamedTuple):
    """What the detector makes of a conversation.

    label: one of LABELS. score: that label's probability. scores: the probability of each label.
    trigger: index of the turn that decided, in the sequence that was given; None where the label is `none`.
    """

    label: str
    score: float
    scores: dict[str, float]
    trigger: int | None


class Detector:
    """The fine-tuned encoder with calibrated thresholds.

    `card` holds the measured figures: `n`, `recall` by class and `false_positives` by slice, each with `value`, `low`,
    `high`, `hits` and `n`. thresholds: replace those of the card, by name.
    """

    def __init__(self, reader: "Reader", card: dict[str, Any], thresholds: Mapping[str, float] | None = None) -> None:
        self.card = card
        self._reader = reader
        self._thresholds = {**card["thresholds"], **(thresholds or {})}
        self._known: dict[tuple[str, bool], Shares] = {}

    @classmethod
    def load(cls, path: Path | None = None, thresholds: Mapping[str, float] | None = None) -> "Detector":
        """The shipped detector, or the one in the folder `path`. Raises UserError where it cannot be read."""
        from counsel.safety.classifier import REBUILD, Reader, read_classifier
        from counsel.safety.encoder import encoder_sha256

        model = (path or MODEL.parent) / MODEL.name
        classifier, card = read_classifier(model), read_json(model.with_name(CARD.name))
        if card.get("model_sha256") != sha256_of(model):
            raise UserError(f"the card beside {str(model)!r} was measured on another model; {REBUILD}")
        if card.get("encoder_sha256") != encoder_sha256():
            raise UserError(f"the crisis detector {str(model)!r} was built on another MiniLM encoder; {REBUILD}")
        return cls(Reader(classifier), card, thresholds)

    def check(self) -> None:
        """Raise UserError if a measured figure is below its bound for serving, or was never measured."""
        for label in BOUNDED:
            cell = self.card.get("recall", {}).get(label)
            if cell is None or cell["low"] < LEAST_RECALL_BOUND:
                found = "not measured" if cell is None else f"{cell['value']:.3f} (at least {cell['low']:.3f})"
                raise UserError(
                    f"the crisis detector's recall of {label} is {found}; serving needs at least {LEAST_RECALL_BOUND}: "
                    "python -m counsel.safety.build"
                )
        cell = self.card.get("false_positives", {}).get("all")
        if cell is None or cell["value"] > MOST_FALSE_POSITIVES:
            found = "not measured" if cell is None else f"{cell['value']:.3f}"
            raise UserError(
                f"the crisis detector's share of false positives is {found}; serving allows {MOST_FALSE_POSITIVES}: "
                "python -m counsel.safety.build"
            )

    def assess(self, user_turns: Sequence[str]) -> Assessment:
        """Judge the newest turn (the last one) in the light of those before it.

        Blocking, some tens of ms of one core: call it from a thread. Texts without words are `none`.
        """
        units = conversation_units(user_turns)
        if not units:
            return Assessment(NONE, 1.0, {**dict.fromkeys(LABELS, 0.0), NONE: 1.0}, None)
        rows = self.shares(units)
        # Among texts that are flagged the most urgent one decides; of equals, and else, the surest.
        over = np.flatnonzero(flags(rows[:, :-1], self._thresholds))
        kind, none = rows[:, :-1].argmax(axis=1), rows[:, -1]
        best = min(over, key=lambda at: (int(kind[at]), none[at])) if len(over) else int(none.argmin())
        label = RISKS[int(kind[best])] if len(over) else NONE
        scores = {name: float(share) for name, share in zip(LABELS, rows[best], strict=True)}
        return Assessment(label, scores[label], scores, units[best].turn if len(over) else None)

    def shares(self, units: Sequence[Unit]) -> Shares:
        """The probability of each of LABELS for each unit, (n, 6)."""
        known, keys = dict(self._known), [(unit.text, unit.siblings == 1) for unit in units]
        if new := {key: unit for key, unit in zip(keys, units, strict=True) if key not in known}:
            known |= zip(new, self._reader.read(list(new.values())), strict=True)
            # Replaced as a whole, so that threads never see it half written.
            self._known = known if len(known) <= _KEPT_TEXTS else {key: known[key] for key in keys}
        return discounted(np.array([known[key] for key in keys]), [unit.siblings for unit in units])


def discounted(rows: Shares, siblings: Sequence[int]) -> Shares:
    """`rows`, (n, 6) in the order of LABELS, with the odds of a risk divided by a power of the number of siblings.

    Of many passages, the most alarming one is alarming by accident more often.
    """
    none = rows[:, -1].clip(1e-9, 1 - 1e-9)
    odds = (1 - none) / none / np.asarray(siblings, dtype=np.float64) ** _DISCOUNT
    risk = odds / (1 + odds)
    return np.column_stack([rows[:, :-1] / (1 - none)[:, None] * risk[:, None], 1 - risk])


def flags(rows: Shares, thresholds: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which rows of probabilities, (n, 5) in the order of RISKS, are a finding.

    One of three sums must reach its threshold: imminent, active and self-harm (`urgent`); these and passive (`own`);
    all five (`any`). The wider the sum, the surer it must be.
    """
    sums = np.cumsum(rows, axis=1)[:, 2:]
    reached = sums >= np.array([thresholds[name] for name in THRESHOLDS])
    return np.asarray(reached.any(axis=1), dtype=np.bool_)
