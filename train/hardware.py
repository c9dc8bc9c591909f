"""What this machine does with a recipe: precision, quantization, optimizer, and every downgrade, which is reported."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from counsel.errors import UserError
from counsel.processor import processor
from train.recipe import FLASH
from train.settings import RunSettings


@dataclass(frozen=True)
class TrainHardware:
    """What training can use here. memory_bytes: of the GPU, or of the machine on a CPU.

    sharded: accelerate launched this process with FSDP. flash_attention: the package flash-attn works here.
    """

    device: str
    name: str
    bf16: bool
    memory_bytes: int
    processes: int = 1
    sharded: bool = False
    flash_attention: bool = False


class Downgrade(NamedTuple):
    """One thing that the recipe asked for and did not get."""

    asked: str
    used: str
    because: str

    def __str__(self) -> str:
        return f"asked {self.asked}, used {self.used}, because {self.because}"


@dataclass(frozen=True)
class Precision:
    """How the recipe runs on this machine."""

    device: str
    dtype: str
    load_in_4bit: bool
    optimizer: str
    attention: str
    packing: bool
    downgrades: tuple[Downgrade, ...]


def detect_training_hardware() -> TrainHardware:
    """This machine as torch sees it."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        # Emulated, which is what older cards answer otherwise, it is slower than float32.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return TrainHardware(
            "cuda", properties.name, bf16, properties.total_memory, processes, sharded, is_flash_attn_2_available()
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The same choice as the server's, so that an adapter is trained in the precision in which it is served.
    cpu = processor()
    return TrainHardware("cpu", f"{cpu}, {torch.get_num_threads()} threads", cpu.bf16, memory, processes, sharded)


def choose_precision(recipe: RunSettings, hardware: TrainHardware) -> Precision:
    """Fit `recipe` to `hardware`. With `strict`, raise UserError instead of downgrading.

    On a CPU a 4-bit base is slower and less exact than bf16, so bf16 replaces it; force_4bit keeps it. Raises UserError
    for FSDP without CUDA: accelerate 1.15 would silently keep the whole model in each process.
    """
    if hardware.sharded and hardware.device != "cuda":
        raise UserError(
            f"FSDP was asked for on a {hardware.device}, but accelerate shards on GPUs only; "
            "use train/accelerate/ddp.yaml"
        )
    downgrades = []
    dtype = "bfloat16" if hardware.bf16 else "float32"
    if not hardware.bf16 and hardware.device == "cuda":
        downgrades.append(Downgrade("bfloat16", "float32", f"{hardware.name} has no bfloat16"))
    load_in_4bit, optimizer = recipe.load_in_4bit, recipe.optim
    if hardware.device != "cuda":
        if load_in_4bit and not recipe.force_4bit:
            load_in_4bit = False
            downgrades.append(
                Downgrade("a 4-bit base", f"a {dtype} base", "without CUDA 4 bits are slower (force_4bit keeps them)")
            )
        if ("paged" in optimizer or "8bit" in optimizer) and not recipe.force_4bit:
            optimizer = "adamw_torch_fused"
            downgrades.append(Downgrade(recipe.optim, optimizer, "paging and 8-bit states save CUDA memory only"))
    attention, packing = recipe.attn_implementation, recipe.packing
    if attention == FLASH and not (hardware.flash_attention and dtype == "bfloat16"):
        attention = "sdpa"
        why = (
            "FlashAttention needs a CUDA card with bfloat16"
            if hardware.device != "cuda" or dtype != "bfloat16"
            else "the package flash-attn is not installed"
        )
        downgrades.append(Downgrade(FLASH, "sdpa, or eager where the base caps its attention scores", why))
        if packing:
            packing = False
            because = (
                "packing without FlashAttention costs loss; a step has fewer rows: raise gradient_accumulation_steps"
            )
            downgrades.append(Downgrade("packing", "padded batches", because))
    if recipe.strict and downgrades:
        raise UserError(
            f"--strict: {'; '.join(map(str, downgrades))}; run on a CUDA machine, change the recipe, or drop --strict"
        )
    return Precision(hardware.device, dtype, load_in_4bit, optimizer, attention, packing, tuple(downgrades))


def score_cap(config: Any) -> float | None:
    """At what a base caps its attention scores, as Gemma 2 does; None if it does not."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def attention_for(precision: Precision, config: Any) -> str:
    """The attention that a base gets. sdpa drops a cap on the scores, so where sdpa only stands in, eager does."""
    return "eager" if precision.attention == "sdpa" and score_cap(config) else precision.attention
