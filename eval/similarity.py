"""Semantic similarity with a fixed encoder that is not one of the compared models: all-MiniLM-L6-v2.

The encoder reads at most 256 word pieces, and a quarter of counselors' answers are longer. A longer text is cut into
equal windows, and its vector is the token-weighted mean of theirs.

The metric rewards staying on topic: repeating the question scores about as high as a counselor's answer. So the reports
print echo, a canned reply, another question's answer and the human value next to every model.

Why not `SentenceTransformer.encode`: it takes text, not ids, so a window that starts within a word is tokenized
differently (9 of 108 long answers differ, by up to 0.01; short ones are equal). It also starts more slowly.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.minilm import WINDOW_TOKENS, load_minilm, minilm_folder

_BATCH_TOKENS = 4096

Vectors = NDArray[np.float32]


class Encoded(NamedTuple):
    """The unit vectors of a text (384,) and of its t word pieces in context (t, 384), without special tokens."""

    text: Vectors
    tokens: Vectors


class Encoder:
    """Turns texts into unit vectors; each distinct text is encoded once."""

    def __init__(self) -> None:
        self.folder = minilm_folder()
        self._tokenizer, self._model = load_minilm()
        self._known: dict[str, Encoded] = {}

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """One `Encoded` per text. Raises ValueError for a text without word pieces."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        windows = [(text, window) for text in new for window in self._windows(text)]
        # Longest first: windows of similar length share a batch, and memory peaks at the start.
        order = sorted(range(len(windows)), key=lambda at: -len(windows[at][1]))
        vectors: list[Any] = [None] * len(windows)
        for batch in _batches(order, [len(window) for _, window in windows]):
            for at, states in zip(batch, self._forward([windows[at][1] for at in batch]), strict=True):
                vectors[at] = states
        parts: dict[str, list[Vectors]] = {}
        for (text, _), states in zip(windows, vectors, strict=True):
            parts.setdefault(text, []).append(states)
        for text, pieces in parts.items():
            # Special tokens match in any two texts, so they are left out.
            tokens = np.concatenate([piece[1:-1] for piece in pieces])
            # The means of the windows, weighted by length; with special tokens, as the encoder was trained.
            pooled = sum(len(piece) * _unit(piece.mean(axis=0)) for piece in pieces)
            self._known[text] = Encoded(_unit(np.asarray(pooled)), _unit(tokens))
        return [self._known[text] for text in texts]

    def _windows(self, text: str) -> list[list[int]]:
        """The word pieces in the fewest windows of near-equal length."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ValueError(f"no word pieces in {text!r}")
        return [part.tolist() for part in np.array_split(ids, -(-len(ids) // WINDOW_TOKENS))]

    def _forward(self, windows: Sequence[list[int]]) -> list[Vectors]:
        """The last hidden states of each window, special tokens included: (t + 2, 384)."""
        import torch

        framed = [[self._tokenizer.cls_token_id, *window, self._tokenizer.sep_token_id] for window in windows]
        longest = max(map(len, framed))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in framed])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in framed])
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float().numpy()
        return [row[: len(ids)] for row, ids in zip(hidden, framed, strict=True)]


def to_references(answer: Encoded, references: Sequence[Encoded]) -> tuple[float, float]:
    """The highest and the mean cosine of an answer to its references."""
    cosines = [float(reference.text @ answer.text) for reference in references]
    return max(cosines), sum(cosines) / len(cosines)


def greedy_match(answer: Encoded, references: Sequence[Encoded]) -> float:
    """Greedy matching F1 with the best reference: each word piece matches the most similar one on the other side.

    This is BERTScore's idea with this encoder, without idf weights or rescaling: not comparable with published values.
    """
    best = 0.0
    for reference in references:
        cosines = answer.tokens @ reference.tokens.T
        precision, recall = cosines.max(axis=1).mean(), cosines.max(axis=0).mean()
        best = max(best, float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0)
    return best


def _unit(vectors: Vectors) -> Vectors:
    """Scaled to length 1 along the last axis."""
    scaled: Vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut `order`, longest first, into batches of at most `_BATCH_TOKENS` tokens with padding."""
    batches: list[list[int]] = []
    for at in order:
        if batches and (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + 2) <= _BATCH_TOKENS:
            batches[-1].append(at)
        else:
            batches.append([at])
    return batches
