"""Builds the crisis detector from its messages and measures it: `python -m counsel.safety.build`.

The kernel machine, the linear one and the calibration are scikit-learn's. Voices of the training part take turns at
being held out; the scores that a message gets while its voice is held out set the calibration and the thresholds. So do
long posts put together of a held-out everyday letter and a held-out message with risk. The test part is only measured.
The files are replaced together, the card last; it names the hash of the other one.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.files import sha256_of, write_bytes, write_json
from counsel.safety.classifier import Classifier, Scores, evidence, project, to_bytes
from counsel.safety.corpus import Message, read_messages
from counsel.safety.detector import CARD, MODEL, Detector
from counsel.safety.features import FeatureReader, Matrix, encoder_sha256, pattern_names, with_wording
from counsel.safety.labels import ACTIVE, IMMINENT, NONE, RISKS, SELF_HARM
from counsel.safety.measure import Judged, detection_figures
from counsel.safety.normalize import normalize
from counsel.safety.units import sentences, text_parts
from counsel.safety.wording import explicit_columns

_COMPONENTS = 128
_GAMMA, _PENALTY = 1.0, 4.0
_FOLDS = 6
# Of the messages of held-out voices that say imminent, active or self-harm, the share that the thresholds let be found.
_TARGET_RECALL = 0.95
# Thresholds of the wider sums. At 0.5 and 0.6, .85 of other-at-risk of held-out voices are found instead of .75, and
# .164 of their messages without risk are flagged instead of .157.
_OWN, _ANY = 0.6, 0.7
# Letters with risk, and as many without.
_LETTERS = 400
URGENT = (IMMINENT, ACTIVE, SELF_HARM)


def build_detector(folder: Path) -> dict[str, Any]:
    """Write the model and its card to `folder`; return the card."""
    train, test = read_messages("train"), read_messages("test")
    _say(f"{len(train)} messages to learn from, {len(test)} to measure")
    folds = voice_folds(train)
    messages = [*train, *_letters(train, folds)]
    folds = np.append(folds, [folds[[row.voice for row in train].index(row.voice)] for row in messages[len(train) :]])
    reader = FeatureReader()
    texts = _texts(messages)
    embedded = reader.embed(texts.parts)
    _say(f"{len(texts.parts)} texts embedded")
    classifier, thresholds = _fit(messages, len(train), folds, embedded, texts)
    write_bytes(folder / MODEL.name, to_bytes(classifier))
    card: dict[str, Any] = {
        "format": 2,
        "model_sha256": sha256_of(folder / MODEL.name),
        "encoder_sha256": encoder_sha256(),
        "thresholds": thresholds,
        "trained_on": {"messages": len(train), "templates": len({row.template for row in train}),
                       "voices": len({row.voice for row in train})},
    }  # fmt: skip
    detector = Detector(reader, classifier, card)
    card |= detection_figures([Judged(row.label, row.slice, detector.assess(row.turns).label) for row in test])
    write_json(folder / CARD.name, card)
    return card


class _Texts(NamedTuple):
    """All texts of all messages, message by message.

    parts, owners, passages, siblings: the text, the row that it is of, where its passage is, and how many the row has.
    """

    parts: list[str]
    owners: NDArray[np.int64]
    passages: NDArray[np.int64]
    siblings: NDArray[np.int64]


def voice_folds(train: Sequence[Message]) -> NDArray[np.int64]:
    """The fold of each message: all of a voice are in one."""
    from sklearn.model_selection import GroupKFold

    voices = [row.voice for row in train]
    folds = np.empty(len(train), dtype=np.int64)
    for number, (_, held) in enumerate(GroupKFold(_FOLDS, shuffle=True, random_state=0).split(voices, groups=voices)):
        folds[held] = number
    return folds


def _letters(train: Sequence[Message], folds: NDArray[np.int64]) -> list[Message]:
    """Everyday letters with one more message among their sentences, both of one fold; never learned from.

    As many have an urgent message as have one without risk, so that the length itself says nothing.
    """
    chance = random.Random(0)
    letters: list[Message] = []
    for fold in range(_FOLDS):
        members = [row for row, of in zip(train, folds, strict=True) if of == fold]
        everyday = [row for row in members if row.slice == "everyday-long"]
        short = [row for row in members if len(row.turns) == 1 and len(row.text.split()) < 25]
        if not everyday:
            continue
        for wanted in (URGENT, (NONE,)):
            for row in chance.sample([row for row in short if row.label in wanted], _LETTERS // _FOLDS):
                lines = sentences(chance.choice(everyday).text)
                lines.insert(chance.randrange(len(lines) + 1), row.text.rstrip(".") + ".")
                letters.append(row._replace(turns=(" ".join(lines),), slice="letter"))
    return letters


def _texts(messages: Sequence[Message]) -> _Texts:
    """As they are judged; also all other sentences of messages without risk, to learn from."""
    parts: list[str] = []
    owners: list[int] = []
    passages: list[int] = []
    siblings: list[int] = []
    for at, row in enumerate(messages):
        plain = normalize(row.text)
        judged = text_parts(plain)
        places = {part.text: len(parts) + place for place, part in enumerate(judged)}
        for part in judged:
            passages.append(places[part.passage])
        parts += places
        if row.label == NONE:
            more = [sentence for sentence in dict.fromkeys(sentences(plain)) if sentence not in places]
            passages += range(len(parts), len(parts) + len(more))
            parts += more
        owners += [at] * (len(parts) - len(owners))
        # Those not judged have 0 siblings, and take no part in the calibration.
        siblings += [len(judged)] * len(judged) + [0] * (len(parts) - len(siblings) - len(judged))
    return _Texts(parts, np.array(owners), np.array(passages), np.array(siblings))


def _fit(
    messages: Sequence[Message], learned: int, folds: NDArray[np.int64], embedded: Matrix, texts: _Texts
) -> tuple[Classifier, dict[str, float]]:
    """Learn from the first `learned` messages; calibrate on all."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    labels, owners = np.array([row.label for row in messages]), texts.owners
    mine = owners < learned
    pca = PCA(_COMPONENTS, random_state=0).fit(embedded[mine])
    mean, projection = pca.mean_.astype(np.float32), pca.components_.T.astype(np.float16)
    features = with_wording(embedded, texts.parts)
    rows = project(features, mean, projection)
    scales = (np.abs(rows[mine]).max(axis=0).clip(1e-6) / 127).astype(np.float32)
    rows = np.round(rows / scales).clip(-127, 127) * scales

    def kind_of(learn: NDArray[np.bool_]) -> Any:
        chosen = learn & mine & (labels[owners] != NONE)
        return LogisticRegression(C=3.0, max_iter=500, class_weight="balanced").fit(
            rows[chosen], labels[owners][chosen]
        )

    # Scores that each text gets while its voice is held out.
    score: Scores = np.empty(len(rows))
    kinds: Scores = np.empty((len(rows), len(RISKS)))
    for fold in range(_FOLDS):
        of_held = folds[owners] == fold
        learn = np.flatnonzero((folds != fold) & (np.arange(len(messages)) < learned))
        score[of_held] = _kernel_machine(rows, owners, labels, learn).decision_function(rows[of_held])
        kind = kind_of(~of_held)
        kinds[of_held] = kind.predict_proba(rows[of_held])[:, [list(kind.classes_).index(label) for label in RISKS]]
        _say(f"fold {fold + 1} of {_FOLDS}")
    judged = texts.siblings > 0
    columns = evidence(
        score, features[:, len(mean) :], score[texts.passages], np.maximum(texts.siblings, 1), explicit_columns()
    )
    # Of each message, the text that decides.
    order = np.lexsort((score, judged, owners))
    deciding = np.zeros(len(rows), dtype=bool)
    deciding[order[np.append(owners[order][1:] != owners[order][:-1], True)]] = True

    def risk_of(learn: NDArray[np.bool_]) -> Any:
        chosen = learn & deciding
        return LogisticRegression(C=1.0, max_iter=2000).fit(columns[chosen], labels[owners][chosen] != NONE)

    shares: Scores = np.empty_like(kinds)
    for fold in range(_FOLDS):
        of_held = folds[owners] == fold
        shares[of_held] = risk_of(~of_held).predict_proba(columns[of_held])[:, 1:] * kinds[of_held]
    thresholds = _thresholds(shares[judged], owners[judged], messages)

    machine = _kernel_machine(rows, owners, labels, np.arange(learned))
    kind, risk = kind_of(mine), risk_of(np.ones(len(rows), dtype=bool))
    _say(f"weights of score, passage, texts and texts without explicit wording: {risk.coef_[0, :4].round(2)}")
    places = [list(kind.classes_).index(label) for label in RISKS]
    classifier = Classifier(
        mean=mean,
        projection=projection,
        support=np.round(machine.support_vectors_ / scales).astype(np.int8),
        scales=scales,
        weights=machine.dual_coef_[0].astype(np.float32),
        bias=machine.intercept_.astype(np.float32),
        gamma=np.array([_GAMMA], dtype=np.float32),
        slopes=risk.coef_[0].astype(np.float32),
        offset=risk.intercept_.astype(np.float32),
        kind_weights=kind.coef_[places].astype(np.float32),
        kind_bias=kind.intercept_[places].astype(np.float32),
        patterns=np.array(pattern_names()),
        explicit=np.array(explicit_columns()),
    )
    return classifier, thresholds


def _thresholds(shares: Scores, owners: NDArray[np.int64], messages: Sequence[Message]) -> dict[str, float]:
    """The threshold of `urgent` finds _TARGET_RECALL of the urgent messages, beside what the wider sums find."""
    labels, slices = np.array([row.label for row in messages]), np.array([row.slice for row in messages])
    sums = np.zeros((len(messages), len(RISKS)))
    np.maximum.at(sums, owners, np.cumsum(shares, axis=1))
    # What the wider sums find is found at any threshold of `urgent`.
    wider = (sums[:, 3] >= _OWN) | (sums[:, 4] >= _ANY)
    surety = np.where(wider, 1.0, sums[:, 2])
    urgent, letter = np.isin(labels, URGENT), slices == "letter"

    def least(recall: float) -> float:
        return float(np.quantile(surety[urgent & ~letter], 1 - recall))

    # What other targets would give on held-out voices.
    kinds = {label: (labels == label) & ~letter for label in RISKS}
    kinds |= {name: (labels == NONE) & (slices == name) for name in sorted(set(slices[labels == NONE]))}
    kinds |= {"urgent letter": urgent & letter, "letter": letter & ~urgent}
    for recall in (0.91, 0.93, 0.95, 0.97):
        found = surety >= least(recall)
        shown = ", ".join(f"{name} {found[chosen].mean():.3f}" for name, chosen in kinds.items())
        _say(f"recall {recall} at {least(recall):.3f}: {shown}")
    return {"urgent": least(_TARGET_RECALL), "own": _OWN, "any": _ANY}


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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    card = build_detector(MODEL.parent)
    for kind in ("recall", "same_class", "false_positives"):
        for name, cell in card[kind].items():
            print(f"{kind:16} {name:16} {cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f}, n {cell['n']})")
