"""The features of a text: its plain MiniLM embedding beside what its wording says."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from counsel.safety.wording import wording_features, wording_patterns

Matrix = NDArray[np.float32]

# How far one pattern moves a text; embeddings have length 1.
_WORDING_WEIGHT = 0.25


def text_features(pooled: Matrix, texts: Sequence[str]) -> Matrix:
    """Unit vectors of `pooled`, with the weighted wording features of `texts` beside them: (n, 384 + p)."""
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True).clip(1e-12)
    return np.hstack([unit, _WORDING_WEIGHT * wording_features(texts)]).astype(np.float32)


def pattern_names() -> list[str]:
    """The wording features, in order: a model is good for these only."""
    return list(wording_patterns())
