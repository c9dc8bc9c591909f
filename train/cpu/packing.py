"""A batch of rows as one line of tokens: the prompt they share is computed once, and there is no padding.

Every row opens with the same system prompt. In a causal model the hidden states of a shared prefix do not depend on
what follows, so one copy serves the whole batch, and its gradient is the sum over the rows: the same numbers for
fewer tokens. Linear layers and norms see only real tokens; attention goes row by row, each row after the shared prefix.

What a token may see is transformers' own mask of one row, full, sliding or chunked, as the layer asks for it. A layer
that mixes tokens in another way than by attention would mix the rows: train/cpu/proof.py finds that.
"""

from typing import Any, NamedTuple

import torch

ATTENTION = "answer_rows"


class Rows(NamedTuple):
    """Where the rows lie in a line of tokens: the prefix is [0, shared_prefix), row i is [ends[i-1], ends[i])."""

    shared_prefix: int
    ends: tuple[int, ...]

    def spans(self) -> list[tuple[int, int]]:
        starts = (self.shared_prefix, *self.ends[:-1])
        return list(zip(starts, self.ends, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its shared_prefix included."""
        return self.shared_prefix + max(end - start for start, end in self.spans())


class PackedBatch(NamedTuple):
    """A batch as one line: ids, positions and targets are (1, T); target -100 is not scored."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: Rows


def as_line(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> PackedBatch:
    """Lay a right-padded batch (B, L) out as one line.

    A target is the token that follows in its own row. The shared prefix ends before the first token that predicts an
    answer.
    """
    lengths = mask.sum(dim=1).tolist()
    shared_prefix = 0
    if len(lengths) > 1:
        same = (ids == ids[0]).all(dim=0) & (labels == -100).all(dim=0) & (mask == 1).all(dim=0)
        # One back: the last token before an answer has that answer's first token as its target.
        shared_prefix = max(0, int(same.int().cumprod(dim=0).sum()) - 1)
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    positions = torch.arange(ids.shape[1]).expand_as(ids)

    def line(table: torch.Tensor) -> torch.Tensor:
        parts = [table[0, :shared_prefix], *(table[i, shared_prefix:end] for i, end in enumerate(lengths))]
        return torch.cat(parts).unsqueeze(0)

    ends, at = [], shared_prefix
    for length in lengths:
        at += length - shared_prefix
        ends.append(at)
    return PackedBatch(line(ids), line(positions), line(following), Rows(shared_prefix, tuple(ends)))


class RowAttention(torch.autograd.Function):
    """Causal attention of each row to the shared prefix and to itself.

    query (K, G, T, D): G query heads to each of K key heads; key (K, T, D), value (K, T, V). Returns (K, G, T, V).
    hidden (L, L), of the longest row: 0 where a token may look, minus infinity elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, scale: float, rows: Rows, hidden: Any) -> Any:
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        weights = []
        for start, end, shared_prefix in _blocks(rows):
            n = end - start
            keys, values = (
                _with_opening(key, start, end, shared_prefix),
                _with_opening(value, start, end, shared_prefix),
            )
            scores = (_heads(query, start, end) @ keys.transpose(1, 2)).float().mul_(scale)
            scores = scores.view(*query.shape[:2], n, shared_prefix + n)
            # A row goes on where the shared prefix ends: its token i is at position shared_prefix + i. Added, not
            # filled in: adding runs on all cores.
            scores.add_(hidden[shared_prefix : shared_prefix + n, : shared_prefix + n])
            share = torch.softmax(scores, dim=-1).to(query.dtype).flatten(1, 2)
            out[:, :, start:end] = (share @ values).view(*query.shape[:2], n, -1)
            weights.append(share)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scale, ctx.rows = scale, rows
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (grad_out,) = upstream
        query, key, value, *weights = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        for (start, end, shared_prefix), share in zip(_blocks(ctx.rows), weights, strict=True):
            n = end - start
            keys, values = (
                _with_opening(key, start, end, shared_prefix),
                _with_opening(value, start, end, shared_prefix),
            )
            grad_output = _heads(grad_out, start, end)
            grad_scores = (grad_output @ values.transpose(1, 2)).float()
            weight = share.float()
            # Softmax: each score's gradient is its weight times what it differs from the weighted mean by.
            grad_scores.sub_((grad_scores * weight).sum(dim=-1, keepdim=True)).mul_(weight).mul_(ctx.scale)
            grad_scores = grad_scores.to(query.dtype)
            grad_query[:, :, start:end] = (grad_scores @ keys).view(*query.shape[:2], n, -1)
            for total, part in (
                (grad_key, grad_scores.transpose(1, 2) @ _heads(query, start, end)),
                (grad_value, share.transpose(1, 2) @ grad_output),
            ):
                total[:, :shared_prefix] += part[:, :shared_prefix]
                total[:, start:end] += part[:, shared_prefix:]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def register() -> None:
    """Make `answer_rows` an attention of transformers: sdpa, except where a call brings `rows`.

    Such a call raises ValueError where the layer wants what is not done here: another mask, dropout.
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
        rows: Rows | None = None,
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
        hidden = torch.zeros(mask.shape[2:]).masked_fill_(~mask[0, 0], float("-inf"))
        scale = kwargs.get("scaling") or size**-0.5
        out = RowAttention.apply(grouped, key[0], value[0], scale, rows, hidden)
        return out.view(1, heads, length, -1).transpose(1, 2), None

    def mask_of_a_row(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
        # Only a line of rows has more queries than keys: its 2-D mask, from which keys are counted, is the longest row.
        if q_length < kv_length:
            return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(batch_size=batch_size, q_length=kv_length, kv_length=kv_length, **kwargs)

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, mask_of_a_row)


def _blocks(rows: Rows) -> list[tuple[int, int, int]]:
    """(start, end, tokens of the shared prefix seen): the shared prefix itself, then each row."""
    shared_prefix = [(0, rows.shared_prefix, 0)] if rows.shared_prefix else []
    return shared_prefix + [(start, end, rows.shared_prefix) for start, end in rows.spans()]


def _heads(table: Any, start: int, end: int) -> Any:
    """(K, G, T, D) -> (K, G * rows, D) of one block."""
    return table[:, :, start:end].flatten(1, 2)


def _with_opening(table: Any, start: int, end: int, shared_prefix: int) -> Any:
    own = table[:, start:end]
    return torch.cat((table[:, :shared_prefix], own), dim=1) if shared_prefix else own
