"""An adapter run once on its base, before it may be published: what it does to the log-probabilities of one text.

The text is read in float32 and in the base's own dtype, in which numbers that are finite on disk may overflow. What it
does in float32 is kept in the manifest: a server that loads the adapter holds what it does there against it.
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
    """`base` and `adapter`: the log-probability of each of `tokens` but the first, given those before it (nats)."""

    tokens: list[int]
    base: list[float]
    adapter: list[float]

    @classmethod
    def kept(cls, document: dict[str, list[float]]) -> "Trial":
        """The one that a manifest holds."""
        return cls([int(token) for token in document["tokens"]], document["base"], document["adapter"])

    def applied(self, base: Sequence[float], adapter: Sequence[float]) -> bool:
        """Whether another engine, which gives these log-probabilities, applies the adapter.

        The change that it shows, projected on the change that was seen here, is 1 where it does and 0 where it does
        not. In half precision a small change drowns in the engine's own rounding: then any change at all must do.
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

    One at a time in a process: transformers changes torch's own functions while it loads a model, and two threads that
    load at once leave weights unread and torch changed. Raises UserError where PEFT refuses it, a layer gives NaN or
    infinity with it, or no log-probability changes.
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
            with _watched(tuned):
                adapted = _log_probabilities(tuned, tokens)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(model.dtype)
        with _watched(tuned):
            _log_probabilities(tuned, tokens)
    if plain == adapted:
        raise UserError("the adapter changes no log-probability of the trial text: it would answer as the base")
    return Trial(tokens, plain, adapted)


def _attach(model: Any, folder: Path) -> Any:
    """The model with the adapter on it, in float32, and each B multiplied by its scaling beforehand, as vLLM does it.

    That may overflow where the product would not. Raises UserError for what PEFT refuses or leaves out.
    """
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    try:
        config = LoraConfig.from_pretrained(folder)
        # How the training began is of no account now, and some beginnings take long.
        config.init_lora_weights = True
        # Some write null for none.
        config.bias = config.bias or "none"
        config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
        with warnings.catch_warnings(action="ignore"):
            tuned = PeftModel.from_pretrained(model, folder, config=config).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise UserError(f"PEFT cannot put the adapter on its base: {' '.join(str(error).split())[:300]}") from error
    layers = {name: layer for name, layer in tuned.named_modules() if isinstance(layer, LoraLayer)}
    for key in tensor_shapes(folder / WEIGHTS):
        layer = key.rsplit(".lora_", 1)[0]
        if layer not in layers:
            raise UserError(
                f"{CONFIG}: target_modules leaves out {layer.removeprefix(PREFIX)}, which {WEIGHTS} changes"
            )
    for layer in layers.values():
        for name, linear in layer.lora_B.items():
            linear.weight.data.mul_(layer.scaling[name])
            layer.scaling[name] = 1.0
    return tuned


def _log_probabilities(model: Any, tokens: list[int]) -> list[float]:
    import torch

    ids = torch.tensor([tokens])
    found = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return [round(value, 6) for value in found.tolist()]


@contextlib.contextmanager
def _watched(model: Any) -> Iterator[None]:
    """Raise UserError for the first module whose output is not finite."""
    import torch

    def look(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.isfinite().all():
            kind = str(output.dtype).removeprefix("torch.")
            raise UserError(f"run once on its base in {kind}, the adapter gives NaN or infinity in {name}; "
                            "its weights are too large: the training run diverged")  # fmt: skip

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _in_float32(layers: Sequence[Any]) -> Iterator[None]:
    """Compute in float32 with one layer's weights at a time: a whole base may not fit the memory twice."""

    def widen(layer: Any, *_: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()

    hooks = []
    for layer in layers:
        kinds = {name: parameter.dtype for name, parameter in layer.named_parameters(recurse=False)}

        def narrow(layer: Any, *_: Any, kinds: "dict[str, torch.dtype]" = kinds) -> None:
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.data = parameter.data.to(kinds[name])

        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
