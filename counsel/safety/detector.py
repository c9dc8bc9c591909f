"""Detects a crisis in the user's turns of a conversation. Reads; never answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.errors import UserError
from counsel.files import read_json, sha256_of
from counsel.safety.labels import ACTIVE, IMMINENT, LABELS, NONE, RISKS, SELF_HARM
from counsel.safety.units import Part, conversation_units

if TYPE_CHECKING:
    from counsel.safety.classifier import Classifier
    from counsel.safety.features import FeatureReader

MODEL = Path(__file__).parent / "detector.npz"
CARD = MODEL.with_name("card.json")
# What the card must show before the detector may serve: the exact lower bound of recall of each of these classes, and
# the share of false positives. `counsel eval safety` judges by the targets, .95 and .05; docs/safety.md has both.
BOUNDED = (IMMINENT, ACTIVE, SELF_HARM)
LEAST_RECALL_BOUND, MOST_FALSE_POSITIVES = 0.80, 0.10
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
    """A classifier with calibrated thresholds.

    `card` holds the measured figures: `n`, `recall` by class and `false_positives` by slice, each with `value`, `low`,
    `high`, `hits` and `n`.
    """

    def __init__(self, reader: "FeatureReader", classifier: "Classifier", card: dict[str, Any]) -> None:
        self.card = card
        self._reader, self._classifier = reader, classifier
        self._known: dict[str, tuple[Any, ...]] = {}

    @classmethod
    def load(cls, path: Path | None = None) -> "Detector":
        """The shipped detector, or the one in the folder `path`. Raises UserError where it cannot be read."""
        from counsel.safety.classifier import REBUILD, read_classifier
        from counsel.safety.features import FeatureReader, encoder_sha256

        model = (path or MODEL.parent) / MODEL.name
        classifier, card = read_classifier(model), read_json(model.with_name(CARD.name))
        if card.get("model_sha256") != sha256_of(model):
            raise UserError(f"the card beside {str(model)!r} was measured on another model; {REBUILD}")
        if card.get("encoder_sha256") != encoder_sha256():
            raise UserError(f"the crisis detector {str(model)!r} was built on another MiniLM encoder; {REBUILD}")
        return cls(FeatureReader(), classifier, card)

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
        rows = self._probabilities([unit.part for unit in units])
        # Among texts that are flagged the most urgent one decides; of equals, and else, the surest.
        over = np.flatnonzero(flags(rows, self.card["thresholds"]))
        risk = rows.sum(axis=1)
        best = min(over, key=lambda at: (int(rows[at].argmax()), -risk[at])) if len(over) else int(risk.argmax())
        scores = {label: float(share) for label, share in zip(RISKS, rows[best], strict=True)}
        scores[NONE] = max(0.0, 1.0 - float(risk[best]))
        label = RISKS[int(rows[best].argmax())] if len(over) else NONE
        return Assessment(label, scores[label], scores, units[best].turn if len(over) else None)

    def _probabilities(self, parts: Sequence[Part]) -> NDArray[np.float64]:
        """Of each risk for each part, (n, 5)."""
        from counsel.safety.classifier import Readings
        from counsel.safety.features import with_wording

        known = dict(self._known)
        texts = list(dict.fromkeys(text for part in parts for text in (part.text, part.passage)))
        if new := [text for text in texts if text not in known]:
            readings = self._classifier.readings(with_wording(self._reader.embed(new), new))
            known |= zip(new, zip(*readings, strict=True), strict=True)
            # Replaced as a whole, so that threads never see it half written.
            self._known = known if len(known) <= _KEPT_TEXTS else {text: known[text] for text in texts}
        columns = zip(*(known[part.text] for part in parts), strict=True)
        passage = np.array([known[part.passage][0] for part in parts])
        return self._classifier.probabilities(
            Readings(*map(np.array, columns)), passage, [part.siblings for part in parts]
        )


def flags(rows: NDArray[np.float64], thresholds: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which rows of probabilities, (n, 5) in the order of RISKS, are a finding.

    One of three sums must reach its threshold: imminent, active and self-harm (`urgent`); these and passive (`own`);
    all five (`any`). The wider the sum, the surer it must be.
    """
    sums = np.cumsum(rows, axis=1)
    reached: NDArray[np.bool_] = (
        (sums[:, 2] >= thresholds["urgent"]) | (sums[:, 3] >= thresholds["own"]) | (sums[:, 4] >= thresholds["any"])
    )
    return reached
