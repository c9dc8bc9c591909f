"""The adapter that a run continues from (`--from`): a version in the store, or a PEFT folder."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from counsel import adapter_check, store
from counsel.catalog import Base
from counsel.errors import UserError
from counsel.files import read_json, sha256_of
from counsel.fingerprint import fingerprint
from train.lora import lora_config
from train.recipe import Recipe
from train.settings import RunSettings

# What the scale and the shape of an update depend on: key of PEFT's config -> key of the recipe.
_SAME = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora"}


@dataclass(frozen=True)
class InitAdapter:
    """An adapter to continue from.

    name: `name@version`, or a folder's name without its path. base_fingerprint, run, system: what the store knows
    about it.
    """

    name: str
    folder: Path
    base_fingerprint: str | None = None
    run: str | None = None
    system: str = ""

    def document(self) -> dict[str, Any]:
        """What provenance.json says about it."""
        return {"name": self.name, "sha256": sha256_of(self.folder / adapter_check.WEIGHTS), "run": self.run}


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with a store's name replaced by the `name@version` that it means now; later it may mean another."""
    if not recipe.init_adapter:
        return recipe
    found = find_init_adapter(recipe)
    return recipe if found.base_fingerprint is None else replace(recipe, init_adapter=found.name)


def find_init_adapter(recipe: RunSettings) -> InitAdapter:
    """What a recipe with an init_adapter continues from. Raises UserError if there is no such adapter."""
    given = recipe.init_adapter
    folder = Path(given)
    if folder.is_dir() and (folder / adapter_check.CONFIG).is_file():
        return InitAdapter(folder.resolve().name, folder)
    if len(folder.parts) > 1 or not recipe.store:
        raise UserError(f"init_adapter is {given!r}, which is no folder with {adapter_check.CONFIG}; give a PEFT "
                        "folder, or a name in the store (--store)")  # fmt: skip
    manifest = store.find(Path(recipe.store), given)
    if reason := store.damage(Path(recipe.store), manifest):
        raise UserError(f"init_adapter is {manifest.id}, which is damaged: {reason}")
    place = store.version_dir(Path(recipe.store), manifest)
    return InitAdapter(manifest.id, place, manifest.base["fingerprint"], manifest.run, manifest.prompt["system"])


def check_sound(found: InitAdapter, base: Base) -> adapter_check.Facts:
    """The adapter is whole and for this base. Raises UserError if it is not."""
    if found.base_fingerprint not in (None, fingerprint(base.path)):
        raise UserError(
            f"{found.name} was trained on another base than {base.name}; choose that base, or another --from"
        )
    return adapter_check.check(found.folder, base.path, served=False)


def check_fits(found: InitAdapter, recipe: Recipe, base: Base, layers: Iterable[str]) -> str:
    """The adapter is sound, for this base, and of the recipe's LoRA shape. Raises UserError that says what to set."""
    facts = check_sound(found, base)
    config = read_json(found.folder / adapter_check.CONFIG)
    for pattern in ("rank_pattern", "alpha_pattern"):
        if config.get(pattern):
            raise UserError(f"{found.name} has a {pattern}, which a recipe cannot express; choose another --from")
    new = lora_config(recipe)
    differing = [key for theirs, key in _SAME.items() if (config.get(theirs) or False) != getattr(new, theirs)]
    wanted = {key: config.get(theirs) or False for theirs, key in _SAME.items() if key in differing}
    if trained := _modules(found.folder) ^ set(layers):
        differing.append("target_modules")
        wanted["target_modules"] = ",".join(facts.target_modules)
    if differing:
        advice = ", ".join(f"{key}: {wanted[key]}" for key in differing)
        detail = f" (they differ in {min(trained)})" if trained else ""
        raise UserError(f"{found.name} has another LoRA shape than the recipe{detail}; set {advice}")
    return f"continues from {found.name}, sha256 {sha256_of(found.folder / adapter_check.WEIGHTS)[:16]}"


def load_weights(found: InitAdapter, model: Any) -> None:
    """Copy the adapter's weights into a PEFT model. Raises UserError unless they are exactly those that it trains."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    trained = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if {f"base_model.model.{name}" for name in _modules(found.folder)} != trained:
        raise UserError(f"{found.name} has other layers than this run trains; choose another --from")
    set_peft_model_state_dict(model, load_file(found.folder / adapter_check.WEIGHTS))


def _modules(folder: Path) -> set[str]:
    """The modules of the base that the adapter changes."""
    from counsel.tensors import tensor_shapes

    keys = tensor_shapes(folder / adapter_check.WEIGHTS)
    return {key.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for key in keys}
