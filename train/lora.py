"""The LoRA adapter of a recipe: its PEFT config, the layers it changes, and the rank a server needs for it."""

from typing import Any

from counsel.adapter_check import SERVED_RANKS
from counsel.errors import UserError
from train.recipe import Recipe

LayerSizes = dict[str, tuple[int, int]]


def lora_config(recipe: Recipe) -> Any:
    """A new PEFT config for the recipe's adapter. New each time, because PEFT writes the resolved layers into it."""
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.use_rslora,
        target_modules="all-linear" if recipe.target_modules == ("all-linear",) else list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )


def adapted_layers(recipe: Recipe, config: Any) -> LayerSizes:
    """{layer: (outputs, inputs)} of every layer the recipe adapts, found on a model of `config` without weights.

    Raises UserError if a target module matches no layer.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        names = sorted({name.rsplit(".", 1)[-1] for name in linear} - {"lm_head"})
        missing = [target for target in recipe.target_modules if target != "all-linear" and target not in names]
        if missing:
            raise UserError(
                f"target_modules has {missing[0]!r}, which matches no layer; the base has {', '.join(names)}"
            )
        peft_model = get_peft_model(model, lora_config(recipe))
    # The sizes come from the LoRA layers: the weight of GPT-2's linear layer, Conv1D, is transposed.
    return {
        name.removeprefix("base_model.model."): (
            module.lora_B["default"].out_features,
            module.lora_A["default"].in_features,
        )
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A")
    }


def count_parameters(recipe: Recipe, layers: LayerSizes) -> int:
    """Trainable parameters of the recipe's adapter on these layers."""
    return recipe.rank * sum(outputs + inputs for outputs, inputs in layers.values())


def needed_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds `rank`. Raises UserError above the largest."""
    for allowed in SERVED_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"rank is {rank}; vLLM serves at most {SERVED_RANKS[-1]}")
