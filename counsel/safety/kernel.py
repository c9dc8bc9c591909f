"""What reads the plain encoder: a kernel machine for "any risk", and a linear one for which risk it is."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.safety.features import Matrix

Shares = NDArray[np.float64]


class KernelMachine(NamedTuple):
    """Plain arrays. Rows of features are (384 + p), projected to (d + p).

    mean, projection: of the embedding, (384,) and (384, d). support, scales: the machine's examples as int8, and what
    one step is worth in each column. weights: theirs. bias, gamma: of the machine. slopes, offset: from its score and
    the wording, (1 + p,), to the probability of a risk. kind_weights, kind_bias: which risk, in the order of RISKS.
    patterns: names of the wording features.
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

    def examples(self) -> Shares:
        """`support` in full, for `shares`: made once, because it is larger than what a message costs."""
        found: Shares = self.support.astype(np.float64) * self.scales
        return found

    def shares(self, features: Matrix, support: Shares) -> Shares:
        """The probability of each of LABELS, (n, 6), of rows of features (n, 384 + p). support: from `examples`."""
        rows = project(features, self.mean, self.projection).astype(np.float64)
        squared = (rows**2).sum(1)[:, None] + (support**2).sum(1)[None] - 2 * rows @ support.T
        score = np.exp(-self.gamma * np.maximum(squared, 0)) @ self.weights + self.bias
        columns = evidence(score, features[:, len(self.mean) :])
        risk = 1 / (1 + np.exp(-(columns @ self.slopes + self.offset)))
        kind = rows @ self.kind_weights.T + self.kind_bias
        kind = np.exp(kind - kind.max(axis=1, keepdims=True))
        return np.column_stack([risk[:, None] * kind / kind.sum(axis=1, keepdims=True), 1 - risk])


def evidence(score: Shares, wording: Matrix) -> Shares:
    """The columns that the probability of a risk is made of, (n, 1 + p)."""
    return np.column_stack([score, wording]).astype(np.float64)


def project(features: Matrix, mean: NDArray[np.float32], projection: NDArray[np.float16]) -> Matrix:
    """Project the embedding's columns and keep those of the wording."""
    size = len(mean)
    projected = (features[:, :size] - mean) @ projection.astype(np.float32)
    return np.hstack([projected, features[:, size:]]).astype(np.float32)
