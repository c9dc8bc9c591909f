"""The trial: before an adapter is published, it runs once on its base, over one text.

It runs in float32 and in the base's own dtype, in which values that are finite on disk may overflow. The float32
log-probabilities go into the manifest, and a server that loads the adapter compares its own with them.
"""

import contextlib
import math
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counsel.adapter_check import CONFIG, WEIGHTS
from counsel.errors import UserError
from counsel.tensors import tensor_shapes

if TYPE_CHECKING:
    import torch

TEXT = (
    "I have not been sleeping well since we moved, and I do not know whom to talk to. "
    "It sounds as if the last weeks were hard on you. What would help most this evening?"
)
MAX_TOKENS = 48
PREFIX = "base_model.model."

_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Trial:
    """The log-probability (nats) of each of `tokens` except the first, given those before it, on base and adapter."""

    tokens: list[int]
    base: list[float]
    adapter: list[float]

    @classmethod
    def kept(cls, document: dict[str, list[float]]) -> "Trial":
        """The trial in a manifest."""
        return cls([int(token) for token in document["tokens"]], document["base"], document["adapter"])

    def applied(self, base: Sequence[float], adapter: Sequence[float]) -> bool:
        """Whether an engine that computes these log-probabilities applies the adapter.

        Its change from base to adapter, projected on the change in the trial, is 1 if it does and 0 if it does not. In
        half precision rounding can hide a small change: then any change counts.
        """
        if list(base) == list(adapter):
            return False
        expected = [after - before for before, after in zip(self.base, self.adapter, strict=True)]
        shown = [after - before for before, after in zip(base, adapter, strict=True)]
        rounding = math.dist(base, self.base)
        size = math.hypot(*expected)
        along = sum(one * other for one, other in zip(shown, expected, strict=True))
        return size < 4 * rounding or along > 0.5 * size**2


def run(folder: Path, base: Path) -> Trial:
    """Run the adapter in `folder` on the model folder `base`.

    Raises UserError when PEFT refuses it, a layer's output is NaN or infinite, or no log-probability changes.

    Trials in one process run one after the other: transformers patches torch functions while it loads a model, and two
    threads that load at once leave weights unread and torch patched.
    """
    with _ONE_AT_A_TIME:
        return _run(folder, base)


def _run(folder: Path, base: Path) -> Trial:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokens = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"][:MAX_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    tuned = _attach(model, folder)
    with torch.no_grad():
        with _in_float32(layers):
            with tuned.disable_adapter():
                plain = _log_probabilities(tuned, tokens)
            with _refuse_overflow(tuned):
                adapted = _log_probabilities(tuned, tokens)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(model.dtype)
        with _refuse_overflow(tuned):
            _log_probabilities(tuned, tokens)
    if plain == adapted:
        raise UserError(
            "the adapter changes no log-probability of the trial text, so it would answer as the base; train longer or "
            "with a higher learning rate"
        )
    return Trial(tokens, plain, adapted)


def _attach(model: Any, folder: Path) -> Any:
    """The model with the adapter in float32, each B multiplied by its scaling beforehand.

    vLLM does the same, and B may then overflow where the product would not. Raises UserError when PEFT refuses the
    adapter or skips a part of it.
    """
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    try:
        config = LoraConfig.from_pretrained(folder)
        # The initialization does not matter any more, and some are slow.
        config.init_lora_weights = True
        # Some trainers write null for "none".
        config.bias = config.bias or "none"
        config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
        with warnings.catch_warnings(action="ignore"):
            tuned = PeftModel.from_pretrained(model, folder, config=config).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise UserError(f"PEFT cannot load the adapter on its base: {' '.join(str(error).split())[:300]}") from error
    layers = {name: layer for name, layer in tuned.named_modules() if isinstance(layer, LoraLayer)}
    for key in tensor_shapes(folder / WEIGHTS):
        layer = key.rsplit(".lora_", 1)[0]
        if layer not in layers:
            raise UserError(
                f"{CONFIG}: target_modules lacks {layer.removeprefix(PREFIX)}, which {WEIGHTS} changes; add it"
            )
    for layer in layers.values():
        for name, linear in layer.lora_B.items():
            linear.weight.data.mul_(layer.scaling[name])
            layer.scaling[name] = 1.0
    return tuned


def _log_probabilities(model: Any, tokens: list[int]) -> list[float]:
    import torch

    ids = torch.tensor([tokens])
    values = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return [round(value, 6) for value in values.tolist()]


@contextlib.contextmanager
def _refuse_overflow(model: Any) -> Iterator[None]:
    """Raise UserError for the first module whose output is not finite."""
    import torch

    def check(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.isfinite().all():
            dtype = str(output.dtype).removeprefix("torch.")
            raise UserError(
                f"in a trial run in {dtype}, the adapter gives NaN or infinity in {name}; its weights are too large: "
                "the training run diverged, so train with a lower learning rate"
            )

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: check(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _in_float32(layers: Sequence[Any]) -> Iterator[None]:
    """Compute in float32, converting one layer's weights at a time: a second copy of the base may not fit in memory."""

    def widen(layer: Any, *_: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()

    hooks = []
    for layer in layers:
        dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters(recurse=False)}

        def narrow(layer: Any, *_: Any, dtypes: "dict[str, torch.dtype]" = dtypes) -> None:
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.data = parameter.data.to(dtypes[name])

        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
