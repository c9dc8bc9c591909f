"""The features of a text: its MiniLM embedding beside what its wording says."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from counsel.files import sha256_of
from counsel.minilm import WINDOW_TOKENS, load_minilm, minilm_folder
from counsel.safety.wording import wording_features, wording_patterns

Matrix = NDArray[np.float32]

# How far one pattern moves a text; embeddings have length 1.
_WORDING_WEIGHT = 0.25
_BATCH_TOKENS = 2048


class FeatureReader:
    """Turns normalized texts into rows of features; holds the encoder."""

    def __init__(self) -> None:
        self._tokenizer, self._model = load_minilm()

    def embed(self, texts: Sequence[str]) -> Matrix:
        """Unit vectors, (n, 384). Of a text beyond 254 word pieces, the rest is not read."""
        import torch

        if not texts:
            return np.zeros((0, 384), dtype=np.float32)
        encoded = self._tokenizer(list(texts), truncation=True, max_length=WINDOW_TOKENS + 2)["input_ids"]
        order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))
        rows = np.empty((len(encoded), 384), dtype=np.float32)
        for batch in _batches(order, [len(ids) for ids in encoded]):
            longest = max(len(encoded[at]) for at in batch)
            ids = torch.tensor([encoded[at] + [0] * (longest - len(encoded[at])) for at in batch])
            mask = torch.tensor([[1] * len(encoded[at]) + [0] * (longest - len(encoded[at])) for at in batch])
            with torch.inference_mode():
                hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
                pooled = (hidden * mask.unsqueeze(-1)).sum(1)
                rows[batch] = torch.nn.functional.normalize(pooled, dim=1).float().numpy()
        return rows


def encoder_sha256() -> str:
    """Of the encoder's weights, which a model is built on."""
    weights = sorted(path for path in minilm_folder().iterdir() if path.suffix in {".safetensors", ".bin"})
    return hashlib.sha256("".join(map(sha256_of, weights)).encode()).hexdigest()


def with_wording(embedded: Matrix, texts: Sequence[str]) -> Matrix:
    """The rows of `embedded` with the weighted wording features of `texts` beside them."""
    return np.hstack([embedded, _WORDING_WEIGHT * wording_features(texts)]).astype(np.float32)


def pattern_names() -> list[str]:
    """The wording features, in order: a model is good for these only."""
    return list(wording_patterns())


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut `order`, shortest first, into batches of at most _BATCH_TOKENS tokens with padding."""
    batches: list[list[int]] = []
    for at in order:
        if batches and (len(batches[-1]) + 1) * lengths[at] <= _BATCH_TOKENS:
            batches[-1].append(at)
        else:
            batches.append([at])
    return batches
