"""The trained classifier as plain arrays: a kernel machine for "any risk", and a linear one for which risk it is."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.errors import UserError
from counsel.safety.features import Matrix, pattern_names
from counsel.safety.labels import RISKS

Scores = NDArray[np.float64]
REBUILD = "build it again: python -m counsel.safety.build"


class Classifier(NamedTuple):
    """All that judging needs. Rows of features are (384 + p), projected to (d + p).

    mean, projection: of the embedding, (384,) and (384, d). support, scales: the kernel machine's examples as int8,
    and what one step is worth in each column. weights: theirs. bias, gamma: of the machine. slopes, offset: from the
    columns of `evidence` to a probability. kind_weights, kind_bias: which risk, in the order of RISKS. patterns: names
    of the wording features. explicit: which of them say something of death or harm in so many words.
    """

    mean: NDArray[np.float32]
    projection: NDArray[np.float16]
    support: NDArray[np.int8]
    scales: NDArray[np.float32]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    gamma: NDArray[np.float32]
    slopes: NDArray[np.float32]
    offset: NDArray[np.float32]
    kind_weights: NDArray[np.float32]
    kind_bias: NDArray[np.float32]
    patterns: NDArray[np.str_]
    explicit: NDArray[np.int64]

    def readings(self, features: Matrix) -> "Readings":
        """What each text says alone; features are (n, 384 + p)."""
        rows = project(features, self.mean, self.projection).astype(np.float64)
        support = self.support.astype(np.float64) * self.scales
        squared = (rows**2).sum(1)[:, None] + (support**2).sum(1)[None] - 2 * rows @ support.T
        score = np.exp(-self.gamma * np.maximum(squared, 0)) @ self.weights + self.bias
        kind = rows @ self.kind_weights.T + self.kind_bias
        kind = np.exp(kind - kind.max(axis=1, keepdims=True))
        return Readings(score, features[:, len(self.mean) :], kind / kind.sum(axis=1, keepdims=True))

    def probabilities(self, readings: "Readings", passage: Scores, siblings: Sequence[int]) -> Scores:
        """Of each risk, in the order of RISKS: (n, 5). What is missing to 1 is that of no risk.

        passage: the score of the passage that each text stands in. siblings: into how many texts its message is cut.
        """
        columns = evidence(readings.score, readings.wording, passage, siblings, self.explicit)
        risk = 1 / (1 + np.exp(-(columns @ self.slopes + self.offset)))
        shares: Scores = risk[:, None] * readings.kind
        return shares


class Readings(NamedTuple):
    """Of n texts: the kernel machine's score (n,), the wording features (n, p), the share of each risk (n, 5)."""

    score: Scores
    wording: Matrix
    kind: Scores


def evidence(
    score: Scores,
    wording: Matrix,
    passage: Scores,
    siblings: Sequence[int] | NDArray[np.int64],
    explicit: Sequence[int] | NDArray[np.int64],
) -> Scores:
    """The columns that a probability is made of, (n, 4 + p).

    They let a sentence count for less where its passage reads harmless, where many were looked at to find it, and more
    so where no wording is explicit.
    """
    many = np.log(np.asarray(siblings, dtype=np.float64))
    silent = ~(wording[:, explicit] > 0).any(axis=1)
    columns: Scores = np.column_stack([score, passage, many, many * silent, wording])
    return columns


def project(features: Matrix, mean: NDArray[np.float32], projection: NDArray[np.float16]) -> Matrix:
    """Project the embedding's columns and keep those of the wording."""
    size = len(mean)
    projected = (features[:, :size] - mean) @ projection.astype(np.float32)
    return np.hstack([projected, features[:, size:]]).astype(np.float32)


def to_bytes(classifier: Classifier) -> bytes:
    """The file's content: an npz of plain arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **classifier._asdict())
    return buffer.getvalue()


def read_classifier(path: Path) -> Classifier:
    """Raises UserError where the file is absent, is not such a file, or was built for other wording features."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            classifier = Classifier(**{name: arrays[name] for name in Classifier._fields})
    except OSError as error:
        raise UserError(
            f"cannot read the crisis detector {str(path)!r}: {error.strerror or error}; {REBUILD}"
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{str(path)!r} is not a crisis detector: {error}; {REBUILD}") from error
    if list(classifier.patterns) != pattern_names() or classifier.kind_weights.shape[0] != len(RISKS):
        raise UserError(f"the crisis detector {str(path)!r} was built for other wording features; {REBUILD}")
    return classifier
