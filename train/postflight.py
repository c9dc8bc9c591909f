"""Checks a trained adapter before it is published: every layer was trained, no pickles, and the answers changed."""

from pathlib import Path
from typing import Any

from counsel import adapter_check
from counsel.catalog import Base
from counsel.chat import prompt_messages
from counsel.errors import UserError
from counsel.tensors import tensor_shapes
from train.settings import RunSettings

PROBE = "I feel overwhelmed at work and I cannot sleep. What could help?"


def check_trained(folder: Path, base: Base, model: Any, tokenizer: Any, recipe: RunSettings) -> dict[str, Any]:
    """Check a saved adapter against the store's rules and the model in memory. Raises UserError at the first failure.

    Returns the rank, the number of adapted modules, and the largest change of a logit on a probe question.
    """
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        raise UserError(f"the adapter folder contains a pickle, {pickles[0]}; nothing was published")
    # `store.publish` checks again, on purpose: it checks the copy that will be served, and adapters from elsewhere too.
    # An adapter that is not published may be for another server.
    facts = adapter_check.check(folder, base.path, served=bool(recipe.store))
    saved = {key.rsplit(".lora_", 1)[0] for key in tensor_shapes(folder / adapter_check.WEIGHTS)}
    trained = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if saved != trained:
        differing = sorted(trained ^ saved)
        raise UserError(f"{len(differing)} adapted modules are not in both model and file, such as {differing[0]}")
    change = logit_change(model, tokenizer, recipe.system)
    if not change > 0:
        raise UserError("the adapter answers exactly like the base; train longer or with a higher learning rate")
    return {"rank": facts.rank, "modules": len(saved), "largest_logit_change": round(change, 4)}


def logit_change(model: Any, tokenizer: Any, system: str) -> float:
    """The largest absolute change of a next-token logit when the adapter is enabled, on `PROBE`."""
    import torch

    ids = tokenizer.apply_chat_template(
        prompt_messages(PROBE, system), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        tuned = model(**ids).logits[:, -1].float()
        with model.disable_adapter():
            plain = model(**ids).logits[:, -1].float()
    return float((tuned - plain).abs().max())
