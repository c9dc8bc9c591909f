"""Builds the crisis detector from its messages and measures it: `python -m counsel.safety.build`.

The kernel machine, the linear one and the calibration are scikit-learn's. Voices of the training part take turns at
being held out; the scores that a message gets while its voice is held out set the calibration and the thresholds. The
test part is only measured. The files are replaced together, the card last; it names the hash of the other one.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counsel.files import sha256_of, write_bytes, write_json
from counsel.minilm import minilm_folder
from counsel.safety.classifier import Classifier, project, to_bytes
from counsel.safety.corpus import Message, read_messages
from counsel.safety.detector import CARD, MODEL, Detector
from counsel.safety.features import FeatureReader, Matrix, pattern_names, with_wording
from counsel.safety.labels import ACTIVE, IMMINENT, NONE, RISKS, SELF_HARM
from counsel.safety.measure import Judged, detection_figures
from counsel.safety.normalize import normalize
from counsel.safety.units import sentences, text_units

_COMPONENTS = 128
_GAMMA, _PENALTY = 1.0, 4.0
_FOLDS = 6
# Of the messages of held-out voices that say imminent, active or self-harm, the share that the threshold lets be found.
_TARGET_RECALL = 0.96
URGENT = (IMMINENT, ACTIVE, SELF_HARM)

Scores = NDArray[np.float64]


def build_detector(folder: Path) -> dict[str, Any]:
    """Write the model and its card to `folder`; return the card."""
    train, test = read_messages("train"), read_messages("test")
    _say(f"{len(train)} messages to learn from, {len(test)} to measure")
    reader = FeatureReader()
    texts, owners = _training_units(train)
    embedded = reader.embed(texts)
    _say(f"{len(texts)} texts embedded")
    classifier, threshold = _fit(train, embedded, texts, np.array(owners))
    write_bytes(folder / MODEL.name, to_bytes(classifier))
    card: dict[str, Any] = {
        "format": 1,
        "model_sha256": sha256_of(folder / MODEL.name),
        "encoder_sha256": encoder_sha256(),
        "threshold": threshold,
        "trained_on": {"messages": len(train), "templates": len({row.template for row in train}),
                       "voices": len({row.voice for row in train})},
    }  # fmt: skip
    detector = Detector(reader, classifier, card)
    card |= detection_figures([Judged(row.label, row.slice, detector.assess(row.turns).label) for row in test])
    write_json(folder / CARD.name, card)
    return card


def encoder_sha256() -> str:
    """Of the encoder's weights, which the model was built on."""
    weights = sorted(path for path in minilm_folder().iterdir() if path.suffix in {".safetensors", ".bin"})
    return hashlib.sha256("".join(map(sha256_of, weights)).encode()).hexdigest()


def _training_units(train: Sequence[Message]) -> tuple[list[str], list[int]]:
    """Texts to learn from, and the row each belongs to: all parts of a message without risk, passages of the others."""
    texts: list[str] = []
    owners: list[int] = []
    for at, row in enumerate(train):
        plain = normalize(row.text)
        parts = [*text_units(plain), *sentences(plain)] if row.label == NONE else text_units(plain)
        parts = list(dict.fromkeys(parts))
        texts += parts
        owners += [at] * len(parts)
    return texts, owners


def _fit(
    train: Sequence[Message], embedded: Matrix, texts: Sequence[str], owners: NDArray[np.int64]
) -> tuple[Classifier, float]:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    labels = np.array([row.label for row in train])
    pca = PCA(_COMPONENTS, random_state=0).fit(embedded)
    mean, projection = pca.mean_.astype(np.float32), pca.components_.T.astype(np.float16)
    rows = project(with_wording(embedded, texts), mean, projection)
    scales = (np.abs(rows).max(axis=0).clip(1e-6) / 127).astype(np.float32)
    rows = np.round(rows / scales).clip(-127, 127) * scales

    score: Scores = np.full(len(texts), -np.inf)
    voices = [row.voice for row in train]
    folds = GroupKFold(_FOLDS, shuffle=True, random_state=0)
    for number, (learn, held) in enumerate(folds.split(voices, groups=voices)):
        machine = _kernel_machine(rows, owners, labels, learn)
        of_held = np.isin(owners, held)
        score[of_held] = machine.decision_function(rows[of_held])
        _say(f"fold {number + 1} of {_FOLDS}")
    # Of each message, the text that decides: the machine's scores while its voice was held out, and the wording.
    order = np.lexsort((score, owners))
    deciding = order[np.append(owners[order][1:] != owners[order][:-1], True)]
    stacked = np.hstack([score[:, None], rows[:, _COMPONENTS:]])
    risk = LogisticRegression(C=1.0, max_iter=1000)
    logits = cross_val_predict(
        risk, stacked[deciding], labels != NONE, groups=voices, cv=folds, method="decision_function"
    )
    cut = float(np.quantile(logits[np.isin(labels, URGENT)], 1 - _TARGET_RECALL))
    _tell_trade_off(logits, labels, train)
    risk.fit(stacked[deciding], labels != NONE)

    machine = _kernel_machine(rows, owners, labels, np.arange(len(train)))
    risky = labels[owners] != NONE
    kind = LogisticRegression(C=3.0, max_iter=500, class_weight="balanced").fit(rows[risky], labels[owners][risky])
    kinds = [list(kind.classes_).index(label) for label in RISKS]
    classifier = Classifier(
        mean=mean,
        projection=projection,
        support=np.round(machine.support_vectors_ / scales).astype(np.int8),
        scales=scales,
        weights=machine.dual_coef_[0].astype(np.float32),
        bias=machine.intercept_.astype(np.float32),
        gamma=np.array([_GAMMA], dtype=np.float32),
        slope=risk.coef_[0, :1].astype(np.float32),
        wording_slopes=risk.coef_[0, 1:].astype(np.float32),
        offset=risk.intercept_.astype(np.float32),
        kind_weights=kind.coef_[kinds].astype(np.float32),
        kind_bias=kind.intercept_[kinds].astype(np.float32),
        patterns=np.array(pattern_names()),
    )
    return classifier, float(1 / (1 + np.exp(-cut)))


def _kernel_machine(rows: Matrix, owners: NDArray[np.int64], labels: NDArray[np.str_], learn: NDArray[np.int64]) -> Any:
    """Fit on the messages `learn`; of a message with risk in several texts, on the one that shows it most."""
    from sklearn.svm import SVC

    def fit(chosen: NDArray[np.int64]) -> Any:
        machine = SVC(C=_PENALTY, gamma=_GAMMA, class_weight="balanced", cache_size=500)
        return machine.fit(rows[chosen], labels[owners[chosen]] != NONE)

    mine = np.flatnonzero(np.isin(owners, learn))
    sizes = np.bincount(owners, minlength=len(labels))
    plain = (labels[owners[mine]] == NONE) | (sizes[owners[mine]] == 1)
    machine = fit(mine[plain])
    several = mine[~plain]
    if not len(several):
        return machine
    score = machine.decision_function(rows[several])
    best = [
        several[owners[several] == owner][np.argmax(score[owners[several] == owner])]
        for owner in np.unique(owners[several])
    ]
    return fit(np.concatenate([mine[plain], np.array(best)]))


def _tell_trade_off(logits: Scores, labels: NDArray[np.str_], train: Sequence[Message]) -> None:
    """Print what other thresholds would give on held-out voices."""
    slices = np.array([row.slice for row in train])
    urgent, none = logits[np.isin(labels, URGENT)], labels == NONE
    for recall in (0.93, 0.95, 0.96, 0.97, 0.98):
        cut = np.quantile(urgent, 1 - recall)
        shares = {name: np.mean(logits[none & (slices == name)] >= cut) for name in sorted(set(slices[none]))}
        _say(f"recall {recall} at {cut:.2f}: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    card = build_detector(MODEL.parent)
    for kind in ("recall", "same_class", "false_positives"):
        for name, cell in card[kind].items():
            print(f"{kind:16} {name:16} {cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f}, n {cell['n']})")
