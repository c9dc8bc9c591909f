"""Packs a batch into one sequence: the prompt that its rows share is computed once, and there is no padding.

Every row starts with the same system prompt. In a causal model the hidden states of a shared prefix do not depend on
what follows, so one copy serves the whole batch, and its gradient is the sum over the rows: the same numbers for
fewer tokens. Linear layers and norms see real tokens only. Attention runs per row: the shared prefix, then the row.

Each layer's mask is the one that transformers makes for a single row: full, sliding or chunked. A layer that mixes
tokens in another way than by attention would mix the rows; train/cpu/proof.py detects that.
"""

from typing import Any, NamedTuple

import torch

ATTENTION = "packed_rows"


class RowSpans(NamedTuple):
    """Where the rows are in a packed sequence: the shared prefix is [0, shared_prefix), row i [ends[i-1], ends[i])."""

    shared_prefix: int
    ends: tuple[int, ...]

    def spans(self) -> list[tuple[int, int]]:
        starts = (self.shared_prefix, *self.ends[:-1])
        return list(zip(starts, self.ends, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, with the shared prefix."""
        return self.shared_prefix + max(end - start for start, end in self.spans())


class PackedBatch(NamedTuple):
    """A batch as one sequence: ids, positions and targets are (1, T). A target of -100 is not scored."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: RowSpans


def pack(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> PackedBatch:
    """Pack a right-padded batch (B, L).

    A target is the next token of the same row. The shared prefix ends before the first token that predicts an answer.
    """
    lengths = mask.sum(dim=1).tolist()
    shared_prefix = 0
    if len(lengths) > 1:
        same = (ids == ids[0]).all(dim=0) & (labels == -100).all(dim=0) & (mask == 1).all(dim=0)
        # One less: the target of the last token before an answer is the first token of that answer.
        shared_prefix = max(0, int(same.int().cumprod(dim=0).sum()) - 1)
    next_labels = torch.full_like(labels, -100)
    next_labels[:, :-1] = labels[:, 1:]
    positions = torch.arange(ids.shape[1]).expand_as(ids)

    def packed(table: torch.Tensor) -> torch.Tensor:
        parts = [table[0, :shared_prefix], *(table[i, shared_prefix:end] for i, end in enumerate(lengths))]
        return torch.cat(parts).unsqueeze(0)

    ends, end = [], shared_prefix
    for length in lengths:
        end += length - shared_prefix
        ends.append(end)
    return PackedBatch(packed(ids), packed(positions), packed(next_labels), RowSpans(shared_prefix, tuple(ends)))


class PackedAttention(torch.autograd.Function):
    """Causal attention of each row to the shared prefix and to itself.

    query (K, G, T, D): G query heads for each of K key heads; key (K, T, D), value (K, T, V). Returns (K, G, T, V).
    bias (L, L), for the longest row: 0 where a token may look, minus infinity elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, scale: float, rows: RowSpans, bias: Any) -> Any:
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        saved_weights = []
        for start, end, prefix in _blocks(rows):
            n = end - start
            keys, values = _with_prefix(key, start, end, prefix), _with_prefix(value, start, end, prefix)
            scores = (_heads(query, start, end) @ keys.transpose(1, 2)).float().mul_(scale)
            scores = scores.view(*query.shape[:2], n, prefix + n)
            # Token i of a row is at position prefix + i. Adding the bias runs on all cores; filling a mask does not.
            scores.add_(bias[prefix : prefix + n, : prefix + n])
            weights = torch.softmax(scores, dim=-1).to(query.dtype).flatten(1, 2)
            out[:, :, start:end] = (weights @ values).view(*query.shape[:2], n, -1)
            saved_weights.append(weights)
        ctx.save_for_backward(query, key, value, *saved_weights)
        ctx.scale, ctx.rows = scale, rows
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        query, key, value, *saved_weights = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        for (start, end, prefix), weights in zip(_blocks(ctx.rows), saved_weights, strict=True):
            n = end - start
            keys, values = _with_prefix(key, start, end, prefix), _with_prefix(value, start, end, prefix)
            grad_output = _heads(grad_outputs[0], start, end)
            grad_scores = (grad_output @ values.transpose(1, 2)).float()
            weights_fp32 = weights.float()
            # Gradient of softmax: weight * (gradient - weighted mean of the gradients).
            grad_scores.sub_((grad_scores * weights_fp32).sum(dim=-1, keepdim=True)).mul_(weights_fp32).mul_(ctx.scale)
            grad_scores = grad_scores.to(query.dtype)
            grad_query[:, :, start:end] = (grad_scores @ keys).view(*query.shape[:2], n, -1)
            for total, part in (
                (grad_key, grad_scores.transpose(1, 2) @ _heads(query, start, end)),
                (grad_value, weights.transpose(1, 2) @ grad_output),
            ):
                total[:, :prefix] += part[:, :prefix]
                total[:, start:end] += part[:, prefix:]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def register() -> None:
    """Register `packed_rows` as an attention of transformers. It is sdpa unless a call passes `rows`.

    A call with `rows` raises ValueError if the layer needs what is not supported: another mask, or dropout.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        rows: RowSpans | None = None,
        **kwargs: Any,
    ) -> Any:
        mask = attention_mask
        if rows is None:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        if mask is None or mask.dtype != torch.bool or mask.shape != (1, 1, rows.longest, rows.longest):
            raise ValueError("a layer makes its own attention mask")
        if kwargs.get("dropout"):
            raise ValueError("it has attention dropout")
        _, heads, length, size = query.shape
        grouped = query.reshape(key.shape[1], -1, length, size)
        bias = torch.zeros(mask.shape[2:]).masked_fill_(~mask[0, 0], float("-inf"))
        scale = kwargs.get("scaling") or size**-0.5
        out = PackedAttention.apply(grouped, key[0], value[0], scale, rows, bias)
        return out.view(1, heads, length, -1).transpose(1, 2), None

    def row_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
        # Only a packed batch has more queries than keys: transformers counts the keys in the 2-D mask, and ours covers
        # the longest row.
        if q_length < kv_length:
            return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(batch_size=batch_size, q_length=kv_length, kv_length=kv_length, **kwargs)

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, row_mask)


def _blocks(rows: RowSpans) -> list[tuple[int, int, int]]:
    """(start, end, tokens of the shared prefix before it): first the shared prefix itself, then each row."""
    prefix = [(0, rows.shared_prefix, 0)] if rows.shared_prefix else []
    return prefix + [(start, end, rows.shared_prefix) for start, end in rows.spans()]


def _heads(table: Any, start: int, end: int) -> Any:
    """(K, G, T, D) -> (K, G * tokens, D) of one block."""
    return table[:, :, start:end].flatten(1, 2)


def _with_prefix(table: Any, start: int, end: int, prefix: int) -> Any:
    row = table[:, start:end]
    return torch.cat((table[:, :prefix], row), dim=1) if prefix else row
