"""The sentence encoder with or without its updates: texts to the mean of their last hidden states."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.files import sha256_of
from counsel.minilm import DIMENSIONS, WINDOW_TOKENS, load_minilm, minilm_folder

Matrix = NDArray[np.float32]

# The linear layers of a BERT layer, by their path in it.
MODULES = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
_BATCH_TOKENS = 2048


class Updates(NamedTuple):
    """What fine-tuning adds to the encoder, as plain arrays.

    down, up: by module of MODULES, low-rank factors for each of the 6 layers: (6, rank, in) and (6, out, rank). Their
    product, (out, in), is added to the layer's weight. head, bias: from the mean of the last hidden states to one
    logit per label, (6, 384) and (6,).
    """

    down: Mapping[str, NDArray[np.float16]]
    up: Mapping[str, NDArray[np.float16]]
    head: NDArray[np.float32]
    bias: NDArray[np.float32]

    def shares(self, pooled: Matrix) -> NDArray[np.float64]:
        """The probability of each of LABELS, (n, 6), of pooled hidden states (n, 384)."""
        logits = (pooled @ self.head.T + self.bias).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = odds / odds.sum(axis=1, keepdims=True)
        return shares


class PooledEncoder:
    """MiniLM, with `updates` added to its weights if there are any."""

    def __init__(self, updates: Updates | None = None) -> None:
        import torch

        self._tokenizer, self._model = load_minilm()
        if updates is None:
            return
        with torch.no_grad():
            for number, layer in enumerate(self._model.encoder.layer):
                for module in MODULES:
                    up, down = (side[module][number].astype(np.float32) for side in (updates.up, updates.down))
                    layer.get_submodule(module).weight += torch.from_numpy(up @ down)

    def pooled(self, texts: Sequence[str]) -> Matrix:
        """The mean of the last hidden states, (n, 384). Of a text beyond 254 word pieces, the rest is not read."""
        import torch

        rows = np.empty((len(texts), DIMENSIONS), dtype=np.float32)
        if not texts:
            return rows
        encoded = self._tokenizer(list(texts), truncation=True, max_length=WINDOW_TOKENS + 2)["input_ids"]
        order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))
        for batch in _batches(order, [len(ids) for ids in encoded]):
            padded = self._tokenizer.pad({"input_ids": [encoded[at] for at in batch]}, return_tensors="pt")
            with torch.inference_mode():
                rows[batch] = mean_hidden(self._model, padded).numpy()
        return rows


def mean_hidden(model: Any, encoded: Mapping[str, Any]) -> Any:
    """The mean of the last hidden states over the tokens of each text, (n, 384)."""
    mask = encoded["attention_mask"]
    hidden = model(input_ids=encoded["input_ids"], attention_mask=mask).last_hidden_state
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def encoder_sha256() -> str:
    """Of the encoder's own weights."""
    weights = sorted(path for path in minilm_folder().iterdir() if path.suffix in {".safetensors", ".bin"})
    return hashlib.sha256("".join(map(sha256_of, weights)).encode()).hexdigest()


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut `order`, shortest first, into batches of at most _BATCH_TOKENS tokens with padding."""
    batches: list[list[int]] = []
    for at in order:
        if batches and (len(batches[-1]) + 1) * lengths[at] <= _BATCH_TOKENS:
            batches[-1].append(at)
        else:
            batches.append([at])
    return batches
