"""Fine-tunes the encoder on the messages: low-rank updates (PEFT's LoRA) and a linear head, learned together."""

import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from counsel.minilm import DIMENSIONS, load_minilm
from counsel.safety.augment import letter, varied
from counsel.safety.corpus import Message
from counsel.safety.encoder import MODULES, Updates, mean_hidden
from counsel.safety.labels import LABELS, NONE
from counsel.safety.normalize import normalize
from counsel.safety.units import sentences

_RANK, _ALPHA, _DROPOUT = 8, 16, 0.05
_EPOCHS, _BATCH = 4, 32
_LEARNING_RATE, _HEAD_LEARNING_RATE = 1.5e-3, 5e-3
_WARMUP, _LEAST_RATE = 0.1, 0.02
# Keeps probabilities from 0 and 1, so that thresholds can be set.
_SMOOTHING = 0.05
# Variants of one template in an epoch.
_VARIANTS = 2
# Texts of everyday sentences alone, as a share of the messages: among them, most messages with risk are seen.
_FILLED = 0.2
_MOST_TOKENS = 128
_EVERYDAY = ("everyday", "everyday-long", "everyday-cues", "general")


def finetune(train: Sequence[Message], seed: int = 0) -> Updates:
    """Learn from all messages of `train`; every epoch varies them anew."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    chance = random.Random(seed)
    tokenizer, model = load_minilm()
    paths = "|".join(module.replace(".", r"\.") for module in MODULES)
    config = LoraConfig(
        r=_RANK, lora_alpha=_ALPHA, lora_dropout=_DROPOUT, target_modules=rf".*encoder\.layer\.\d+\.(?:{paths})"
    )
    encoder = get_peft_model(model, config).train()
    head = torch.nn.Linear(DIMENSIONS, len(LABELS))
    torch.nn.init.zeros_(head.weight)
    learned = [weight for weight in encoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": learned, "lr": _LEARNING_RATE}, {"params": head.parameters(), "lr": _HEAD_LEARNING_RATE}
    ])  # fmt: skip
    templates: dict[str, list[Message]] = defaultdict(list)
    for row in train:
        templates[row.template].append(row)
    fillers = list(dict.fromkeys(line for row in train if row.slice in _EVERYDAY for line in sentences(row.text)))
    rows_per_epoch = sum(min(_VARIANTS, len(rows)) for rows in templates.values())
    steps = _EPOCHS * math.ceil(rows_per_epoch * (1 + _FILLED) / _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(_LEAST_RATE, min(step / steps / _WARMUP, (1 - step / steps) / (1 - _WARMUP)))
    )
    for epoch in range(_EPOCHS):
        rows = [row for group in templates.values() for row in chance.sample(group, min(_VARIANTS, len(group)))]
        texts = [(varied(row.text, row.label == NONE, fillers, chance), row.label) for row in rows]
        texts += [(letter(fillers, chance), NONE) for _ in range(int(len(rows) * _FILLED))]
        total = 0.0
        for batch in _batches(texts, chance):
            encoded = tokenizer(
                [normalize(text) for text, _ in batch],
                truncation=True, max_length=_MOST_TOKENS, padding=True, return_tensors="pt",
            )  # fmt: skip
            with torch.autocast("cpu", torch.bfloat16):
                pooled = mean_hidden(encoder, encoded)
            loss = torch.nn.functional.cross_entropy(
                head(pooled.float()),
                torch.tensor([LABELS.index(label) for _, label in batch]),
                label_smoothing=_SMOOTHING,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        print(f"epoch {epoch + 1} of {_EPOCHS}: loss {total / len(texts):.3f}", file=sys.stderr, flush=True)
    return _updates(encoder, head)


def _batches(texts: list[tuple[str, str]], chance: random.Random) -> Iterator[list[tuple[str, str]]]:
    """All texts in batches of about one length, in random order."""
    chance.shuffle(texts)
    batches: list[list[tuple[str, str]]] = []
    # Sorted in parts, so that a text meets others in each epoch.
    for start in range(0, len(texts), _BATCH * 16):
        part = sorted(texts[start : start + _BATCH * 16], key=lambda text: len(text[0]))
        batches += [part[at : at + _BATCH] for at in range(0, len(part), _BATCH)]
    chance.shuffle(batches)
    yield from batches


def _updates(encoder: Any, head: Any) -> Updates:
    """What was learned, as arrays."""
    layers = encoder.get_base_model().encoder.layer

    def stacked(side: str, module: str) -> Any:
        found = [getattr(layer.get_submodule(module), side)["default"].weight.detach().numpy() for layer in layers]
        return np.stack(found)

    down = {module: stacked("lora_A", module).astype(np.float16) for module in MODULES}
    up = {module: (_ALPHA / _RANK * stacked("lora_B", module)).astype(np.float16) for module in MODULES}
    return Updates(down, up, head.weight.detach().numpy(), head.bias.detach().numpy())
