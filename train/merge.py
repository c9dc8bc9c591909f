"""`python -m train merge RUN`: merge base and adapter into one folder that AutoModelForCausalLM loads without PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from counsel import catalog
from counsel.cli import argument, option
from counsel.errors import UserError
from counsel.files import read_json, replaced_directory, write_json
from counsel.run import open_run
from train.card import card_text
from train.postflight import PROBE
from train.recipe import FLASH


@dataclass(frozen=True)
class Merge:
    """What to merge, and where to write it."""

    run: str = argument("finished run: its name under runs/, or its path")
    out: str = option("", "folder to write", shown="<run>/merged")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "precision of the merged weights")
    overwrite: bool = option(False, "replace the folder, if it is an earlier merge")


# In a merged folder: what it was merged from, and the names of its files.
RECORD = "merge.json"


def merge(config: Merge) -> dict[str, Any]:
    """Merge the adapter into the base's weights; save model, tokenizer and card; return how the result compares."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    run = open_run(config.run)
    out = Path(config.out) if config.out else run.path / "merged"
    check_out_folder(out, config.overwrite)
    recipe = run.config()
    base = catalog.resolve(recipe["base"])
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    # Added in fp32 whatever the final dtype, to round once instead of twice.
    # FlashAttention takes no float32; eager computes the same on every base.
    attention = "eager" if recipe["attn_implementation"] == FLASH else recipe["attn_implementation"]
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, attn_implementation=attention)
    adapted = PeftModel.from_pretrained(plain, str(run.adapter))
    before = next_logits(adapted, tokenizer, recipe["system"])
    merged = adapted.merge_and_unload().to(getattr(torch, config.dtype))
    document: dict[str, Any] = {"merged": str(out), "base": base.hub_id, "dtype": config.dtype}
    with replaced_directory(out) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(card_text(run, merged=True), encoding="utf-8")
        # Measured on the saved folder, as others will load it.
        written = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
        after = next_logits(written, tokenizer, recipe["system"])
        document |= {
            "same_next_token": bool(before.argmax() == after.argmax()),
            "largest_logit_difference": round(float((before - after).abs().max()), 5),
        }
        files = sorted(path.name for path in folder.iterdir())
        write_json(folder / RECORD, {"run": run.name, "base": base.hub_id, "dtype": config.dtype, "files": files})
    return document


def check_out_folder(out: Path, overwrite: bool) -> None:
    """Raise UserError unless `out` is free, or `overwrite` is set and everything in it came from a merge."""
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{str(out)!r} exists; replace it with --overwrite if it is an earlier merge, or choose "
                        "another --out")  # fmt: skip
    if out.is_symlink() or not (out / RECORD).is_file():
        raise UserError(f"{str(out)!r} is not an earlier merge (it has no {RECORD}), so it is not replaced; choose "
                        "another --out, or move it away yourself")  # fmt: skip
    others = {path.name for path in out.iterdir()} - {RECORD, *read_json(out / RECORD).get("files", [])}
    if others:
        raise UserError(f"{str(out)!r} also contains {min(others)!r}, which no merge wrote, so it is not replaced; "
                        "choose another --out, or move that file away")  # fmt: skip


def next_logits(model: Any, tokenizer: Any, system: str) -> Any:
    """The next-token logits (V,) for the probe question, in fp32."""
    import torch

    from counsel.chat import prompt_messages

    ids = tokenizer.apply_chat_template(
        prompt_messages(PROBE, system), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model.eval()
    with torch.no_grad():
        return model(**ids).logits[0, -1].float()
