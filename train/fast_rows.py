"""A batch of rows as one line of tokens: the prompt they share is computed once, and there is no padding.

Every row opens with the same system prompt. In a causal model the hidden states of a shared opening do not depend on
what follows, so one copy serves the whole batch, and its gradient is the sum over the rows: the same numbers for
fewer tokens. Linear layers and norms see only real tokens; attention goes row by row, each row after the opening.

What a token may see is transformers' own mask of one row, full, sliding or chunked, as the layer asks for it. A layer
that mixes tokens in another way than by attention would mix the rows: train/fast_proof.py finds that.
"""

from typing import Any, NamedTuple

import torch

ATTENTION = "answer_rows"


class Rows(NamedTuple):
    """Where the rows lie in a line of tokens: the shared opening is [0, opening), row i is [ends[i-1], ends[i])."""

    opening: int
    ends: tuple[int, ...]

    def spans(self) -> list[tuple[int, int]]:
        starts = (self.opening, *self.ends[:-1])
        return list(zip(starts, self.ends, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its opening included."""
        return self.opening + max(end - start for start, end in self.spans())


class Line(NamedTuple):
    """A batch as one line: ids, positions and targets are (1, T); target -100 is not scored."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: Rows


def as_line(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Line:
    """Lay a right-padded batch (B, L) out as one line.

    A target is the token that follows in its own row. The opening ends before the first token that predicts an answer.
    """
    lengths = mask.sum(dim=1).tolist()
    opening = 0
    if len(lengths) > 1:
        same = (ids == ids[0]).all(dim=0) & (labels == -100).all(dim=0) & (mask == 1).all(dim=0)
        # One back: the last token before an answer has that answer's first token as its target.
        opening = max(0, int(same.int().cumprod(dim=0).sum()) - 1)
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    positions = torch.arange(ids.shape[1]).expand_as(ids)

    def line(table: torch.Tensor) -> torch.Tensor:
        parts = [table[0, :opening], *(table[i, opening:end] for i, end in enumerate(lengths))]
        return torch.cat(parts).unsqueeze(0)

    ends, at = [], opening
    for length in lengths:
        at += length - opening
        ends.append(at)
    return Line(line(ids), line(positions), line(following), Rows(opening, tuple(ends)))


class RowAttention(torch.autograd.Function):
    """Causal attention of each row to the opening and to itself.

    query (K, G, T, D): G query heads to each of K key heads; key (K, T, D), value (K, T, V). Returns (K, G, T, V).
    hidden (L, L), of the longest row: 0 where a token may look, minus infinity elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, scale: float, rows: Rows, hidden: Any) -> Any:
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        weights = []
        for start, end, opening in _blocks(rows):
            n = end - start
            keys, values = _with_opening(key, start, end, opening), _with_opening(value, start, end, opening)
            scores = (_heads(query, start, end) @ keys.transpose(1, 2)).float().mul_(scale)
            scores = scores.view(*query.shape[:2], n, opening + n)
            # A row goes on where the opening ends: its token i is at position opening + i. Added, not filled in:
            # adding runs on all cores.
            scores.add_(hidden[opening : opening + n, : opening + n])
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
        for (start, end, opening), share in zip(_blocks(ctx.rows), weights, strict=True):
            n = end - start
            keys, values = _with_opening(key, start, end, opening), _with_opening(value, start, end, opening)
            above = _heads(grad_out, start, end)
            slope = (above @ values.transpose(1, 2)).float()
            weight = share.float()
            # Softmax: each score's gradient is its weight times what it differs from the weighted mean by.
            slope.sub_((slope * weight).sum(dim=-1, keepdim=True)).mul_(weight).mul_(ctx.scale)
            slope = slope.to(query.dtype)
            grad_query[:, :, start:end] = (slope @ keys).view(*query.shape[:2], n, -1)
            for total, part in (
                (grad_key, slope.transpose(1, 2) @ _heads(query, start, end)),
                (grad_value, share.transpose(1, 2) @ above),
            ):
                total[:, :opening] += part[:, :opening]
                total[:, start:end] += part[:, opening:]
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
    """(start, end, tokens of the opening seen): the opening itself, then each row."""
    opening = [(0, rows.opening, 0)] if rows.opening else []
    return opening + [(start, end, rows.opening) for start, end in rows.spans()]


def _heads(table: Any, start: int, end: int) -> Any:
    """(K, G, T, D) -> (K, G * rows, D) of one block."""
    return table[:, :, start:end].flatten(1, 2)


def _with_opening(table: Any, start: int, end: int, opening: int) -> Any:
    own = table[:, start:end]
    return torch.cat((table[:, :opening], own), dim=1) if opening else own
