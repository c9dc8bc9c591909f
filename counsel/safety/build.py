"""Builds the crisis detector from its messages: `python -m counsel.safety.build`.

The thresholds come from `data/dev`, whose voices the training never saw. `data/test` is not read here. The card is
written last; it names the hash of the model.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from counsel.files import sha256_of, write_bytes, write_json
from counsel.safety.classifier import Classifier, to_bytes
from counsel.safety.corpus import Message, read_messages
from counsel.safety.detector import CARD, MODEL, Detector
from counsel.safety.encoder import encoder_sha256
from counsel.safety.finetune import finetune
from counsel.safety.fit_kernel import fit_kernel
from counsel.safety.labels import NONE, RISKS
from counsel.safety.measure import measure, say_figures
from counsel.safety.units import conversation_units

# Of the messages of `dev` without risk, the share that the threshold of `urgent` lets be flagged. They resemble what
# was learned; strangers' messages are flagged more often.
_FALSE_POSITIVES = 0.02
# Thresholds of the wider sums.
_OWN, _ANY = 0.65, 0.75
# How much the threshold of `urgent` is above what `dev` says: it was too kind (docs/safety.md).
_RAISED = 0.07


def build_detector() -> dict[str, Any]:
    """Learn from `train`; write the model and its card; return the card."""
    train = read_messages("train")
    _say(f"{len(train)} messages to learn from")
    return write_detector(Classifier(finetune(train), fit_kernel(train)), train)


def write_detector(classifier: Classifier, train: Sequence[Message]) -> dict[str, Any]:
    """Write the model, and its card with the thresholds that `dev` sets and its figures there; return the card."""
    write_bytes(MODEL, to_bytes(classifier))
    card: dict[str, Any] = {
        "format": 3,
        "model_sha256": sha256_of(MODEL),
        "encoder_sha256": encoder_sha256(),
        "thresholds": {"urgent": 1.0, "own": _OWN, "any": _ANY},
        "trained_on": {"messages": len(train), "templates": len({row.template for row in train}),
                       "voices": len({row.voice for row in train})},
    }  # fmt: skip
    write_json(CARD, card)
    card["thresholds"]["urgent"] = _urgent_threshold(Detector.load())
    write_json(CARD, card)
    return measure("dev")


def _urgent_threshold(detector: Detector) -> float:
    """Beside what the wider sums find, _FALSE_POSITIVES of the messages without risk reach it."""
    safe = [row for row in read_messages("dev") if row.label == NONE]
    shares = [detector.shares(conversation_units(row.turns))[:, : len(RISKS)] for row in safe]
    sums = np.array([share.cumsum(axis=1)[:, 2:].max(axis=0) for share in shares])
    surety = np.where((sums[:, 1] >= _OWN) | (sums[:, 2] >= _ANY), 1.0, sums[:, 0])
    return float(np.quantile(surety, 1 - _FALSE_POSITIVES)) + _RAISED


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    say_figures(build_detector())
