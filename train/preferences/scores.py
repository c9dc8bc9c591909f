"""What a preference training did, measured against the adapter that it started from.

Three numbers: how often the held-out choice is predicted, what people's own answers lost, and how lengths moved.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from counsel.chat import conversation
from train.cleaning import count_words
from train.prompts import UNSCORED, Tokens, encode, replies

REFERENCE, TRAINED = "ref", "default"


def answer_logps(model: Any, sequences: Sequence[Tokens], batch_size: int) -> list[float]:
    """The log-probability (nats) that the model's active adapter gives to the labels of each sequence."""
    import torch

    low_precision = model.dtype == torch.bfloat16
    model.eval()
    found: list[float] = []
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        width = max(len(one.ids) for one in batch)
        ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in batch], device=model.device)
        labels = torch.tensor([one.labels + [UNSCORED] * (width - len(one.labels)) for one in batch])[:, 1:]
        mask = torch.tensor([[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in batch], device=model.device)
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=low_precision):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, targets in zip(logits, labels, strict=True):
            at = (targets != UNSCORED).nonzero().flatten().to(row.device)
            scored = torch.log_softmax(row[at].float(), dim=-1)
            found.append(float(scored[torch.arange(len(at)), targets[at.cpu()].to(row.device)].double().sum()))
    return found


def both_logps(model: Any, sequences: Sequence[Tokens], batch_size: int) -> tuple[list[float], list[float]]:
    """`answer_logps` before (by the reference adapter) and after (by the trained one)."""
    model.set_adapter(REFERENCE)
    before = answer_logps(model, sequences, batch_size)
    model.set_adapter(TRAINED)
    return before, answer_logps(model, sequences, batch_size)


def preference_accuracy(model: Any, rows: Sequence[dict[str, Any]], max_length: int, batch_size: int) -> dict[str, Any]:
    """How often training made the chosen answer more likely, relative to the rejected one, than it was before.

    rows: tokenized pairs, as TRL's DPOTrainer has them; one per question, or the interval is too narrow. The interval
    is Clopper and Pearson's at 95 %. margin: mean change of the log-probability ratio, in nats.
    """
    from scipy.stats import binomtest

    sides = [
        logps
        for key in ("chosen_ids", "rejected_ids")
        for logps in both_logps(model, [_tokens(row, key, max_length) for row in rows], batch_size)
    ]
    margins = [
        (chosen - chosen_before) - (rejected - rejected_before)
        for chosen_before, chosen, rejected_before, rejected in zip(*sides, strict=True)
    ]
    correct = sum(margin > 0 for margin in margins)
    interval = binomtest(correct, len(rows)).proportion_ci(0.95, method="exact")
    return {
        "n": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows),
        "low": float(interval.low),
        "high": float(interval.high),
        "margin_nats": sum(margins) / len(rows),
    }


def people_bits_per_byte(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], system: str, max_length: int, batch_size: int
) -> dict[str, Any] | None:
    """Bits per byte of people's answers before and after (end of turn included), and the difference.

    The interval is a 95 % jackknife over questions. Rows that max_length would cut are left out; None without rows.
    """
    whole = [(row, encode(tokenizer, [row], system, max_length, "all")) for row in rows]
    whole = [(row, encoded) for row, encoded in whole if max(encoded.lengths) <= max_length]
    if not whole:
        return None
    sequences = [(row["question_id"], tokens) for row, encoded in whole for tokens in encoded.sequences]
    before, after = both_logps(model, [tokens for _, tokens in sequences], batch_size)
    n_bytes: dict[str, int] = defaultdict(int)
    bits_before: dict[str, float] = defaultdict(float)
    lost: dict[str, float] = defaultdict(float)
    for row, _ in whole:
        n_bytes[row["question_id"]] += _reply_bytes(row)
    for (question, _), old, new in zip(sequences, before, after, strict=True):
        bits_before[question] -= old / math.log(2)
        lost[question] += (old - new) / math.log(2)
    total = sum(n_bytes.values())
    low, high = ratio_interval(list(lost.values()), [n_bytes[question] for question in lost])
    difference = sum(lost.values()) / total
    first = sum(bits_before.values()) / total
    return {
        "rows": len(whole),
        "questions": len(n_bytes),
        "before": first,
        "after": first + difference,
        "lost": difference,
        "low": low,
        "high": high,
    }


def _reply_bytes(row: dict[str, Any]) -> int:
    messages = conversation(row)
    return sum(len(messages[at]["content"].encode()) for at in replies(messages))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of a ratio of sums, by leaving out one pair of terms at a time; (None, None) for one pair."""
    from scipy.stats import t

    n, total, size = len(numerators), sum(numerators), sum(denominators)
    if n < 2:
        return None, None
    left = [(total - a) / (size - b) for a, b in zip(numerators, denominators, strict=True)]
    mean = sum(left) / n
    half = float(t.ppf(0.975, n - 1)) * math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left))
    return total / size - half, total / size + half


def length_drift(before: Sequence[str], after: Sequence[str], max_tokens: int) -> dict[str, Any] | None:
    """Mean words of greedy answers (at most max_tokens) to the same prompts; None without any."""
    if not before:
        return None
    words = [sum(map(count_words, answers)) / len(answers) for answers in (before, after)]
    return {"prompts": len(before), "max_tokens": max_tokens, "words_before": words[0], "words_after": words[1]}


def _tokens(row: dict[str, Any], answer: str, max_length: int) -> Tokens:
    prompt, ids = row["prompt_ids"], row[answer]
    labels = [UNSCORED] * len(prompt) + ids
    return Tokens((prompt + ids)[:max_length], labels[:max_length])
