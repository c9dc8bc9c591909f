"""Fits the kernel machine on the messages; it, the linear one and the calibration are scikit-learn's.

Voices take turns at being held out: the scores that a message gets while its voice is held out set the calibration.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counsel.safety.corpus import Message
from counsel.safety.encoder import PooledEncoder
from counsel.safety.features import Matrix, pattern_names, text_features
from counsel.safety.kernel import KernelMachine, Shares, evidence, project
from counsel.safety.labels import NONE, RISKS
from counsel.safety.normalize import normalize
from counsel.safety.units import passages, sentences

_COMPONENTS = 128
_GAMMA, _PENALTY = 1.0, 4.0
_FOLDS = 6


def fit_kernel(train: Sequence[Message]) -> KernelMachine:
    """Learn from all messages of `train`."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    texts, owners, judged = _texts(train)
    labels = np.array([row.label for row in train])
    features = text_features(PooledEncoder().pooled(texts), texts)
    size = features.shape[1] - len(pattern_names())
    pca = PCA(_COMPONENTS, random_state=0).fit(features[:, :size])
    mean, projection = pca.mean_.astype(np.float32), pca.components_.T.astype(np.float16)
    rows = project(features, mean, projection)
    scales = (np.abs(rows).max(axis=0).clip(1e-6) / 127).astype(np.float32)
    rows = np.round(rows / scales).clip(-127, 127) * scales

    score: Shares = np.empty(len(rows))
    folds = _voice_folds(train)
    for fold in range(_FOLDS):
        machine = _machine(rows, owners, labels, np.flatnonzero(folds != fold))
        score[folds[owners] == fold] = machine.decision_function(rows[folds[owners] == fold])
    deciding = _deciding(score, owners, judged)
    columns = evidence(score, features[:, size:])
    risk = LogisticRegression(C=1.0, max_iter=2000).fit(columns[deciding], labels[owners[deciding]] != NONE)
    risky = labels[owners] != NONE
    kind = LogisticRegression(C=3.0, max_iter=500, class_weight="balanced").fit(rows[risky], labels[owners[risky]])
    places = [list(kind.classes_).index(label) for label in RISKS]
    machine = _machine(rows, owners, labels, np.arange(len(train)))
    return KernelMachine(
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
    )


def _texts(train: Sequence[Message]) -> tuple[list[str], NDArray[np.int64], NDArray[np.bool_]]:
    """Texts, the message that each is of, and whether it is judged.

    Judged are passages; also sentences of messages without risk are learned from.
    """
    texts: list[str] = []
    owners: list[int] = []
    judged: list[bool] = []
    for at, row in enumerate(train):
        plain = normalize(row.text)
        mine = dict.fromkeys(passages(plain), True)
        if row.label == NONE:
            mine |= {sentence: False for sentence in sentences(plain) if sentence not in mine}
        texts += mine
        owners += [at] * len(mine)
        judged += mine.values()
    return texts, np.array(owners), np.array(judged)


def _voice_folds(train: Sequence[Message]) -> NDArray[np.int64]:
    """The fold of each message: all of a voice are in one."""
    from sklearn.model_selection import GroupKFold

    voices = [row.voice for row in train]
    folds = np.empty(len(train), dtype=np.int64)
    for number, (_, held) in enumerate(GroupKFold(_FOLDS, shuffle=True, random_state=0).split(voices, groups=voices)):
        folds[held] = number
    return folds


def _machine(rows: Matrix, owners: NDArray[np.int64], labels: NDArray[np.str_], learn: NDArray[np.int64]) -> Any:
    """Fit on the messages `learn`; of a message with risk in several passages, on the one that shows it most."""
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
    best = several[_deciding(score, owners[several], np.ones(len(several), dtype=bool))]
    return fit(np.concatenate([mine[plain], best]))


def _deciding(score: Shares, owners: NDArray[np.int64], judged: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each message, the place of the judged text with the highest score."""
    order = np.lexsort((score, judged, owners))
    places: NDArray[np.int64] = order[np.append(owners[order][1:] != owners[order][:-1], True)]
    return places
