"""What an adapter may be: the rules an adapter folder must keep before it can enter the store.

An engine that meets a bad adapter while serving either dies or, worse, quietly answers as the base: vLLM skips keys
that match no module. So everything is checked here, before anything is served: file kinds, PEFT config against what
vLLM 0.32 implements, every key and shape against the base's own weight files, and the values.
"""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.catalog import weight_files
from train.errors import UserError
from train.files import read_json

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
MAX_RANK = 512
MAX_WEIGHTS_BYTES = 4 << 30
MAX_TEXT_BYTES = 1 << 20

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Initialisations that only choose starting values. The others (PiSSA, OLoRA, LoftQ, ...) also rewrite the base.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# PEFT features that change what the adapter computes and that vLLM does not implement.
_UNSERVED = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora",
             "modules_to_save", "target_parameters", "trainable_token_indices", "megatron_config")  # fmt: skip

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """What a checked adapter is: its largest rank, its alpha, and the module names it changes."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


def check(folder: Path, base: Path) -> Facts:
    """Hold the adapter in `folder` against the rules and the model folder `base`; UserError at the first breach."""
    check_files(folder)
    config = read_json(folder / CONFIG)
    ranks = check_config(config)
    pairs = _pairs(tensor_shapes(folder / WEIGHTS))
    base_shapes: dict[str, Shape] = {}
    for file in weight_files(base):
        base_shapes.update(tensor_shapes(file))
    for module, (shape_a, shape_b) in pairs.items():
        _check_shapes(module, shape_a, shape_b, base_shapes, ranks)
    _check_values(folder / WEIGHTS)
    return Facts(
        rank=max(shape_a[0] for shape_a, _ in pairs.values()),
        alpha=float(config["lora_alpha"]),
        target_modules=tuple(sorted({module.rsplit(".", 1)[-1] for module in pairs})),
    )


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """The name and shape of every tensor in a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100 << 20:
                raise ValueError("its header is larger than 100 MB")
            header = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error}); save the adapter again") from error


def check_files(folder: Path) -> None:
    """Raise UserError unless `folder` holds plain files of the allowed kinds and sizes; no weights are read."""
    if not folder.is_dir():
        raise UserError(f"no adapter folder {str(folder)!r}; give the folder that holds {WEIGHTS} and {CONFIG}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if not (folder / WEIGHTS).exists() and pickles:
        raise UserError(
            f"{str(folder)!r} holds {pickles[0]}: a pickle can run code when it is read, so it was not read; "
            f"save the adapter as {WEIGHTS} (PEFT: save_pretrained(..., safe_serialization=True))"
        )
    for name, limit in ((WEIGHTS, MAX_WEIGHTS_BYTES), (CONFIG, MAX_TEXT_BYTES), (CARD, MAX_TEXT_BYTES)):
        file = folder / name
        if file.is_symlink():
            raise UserError(f"{str(file)!r} is a symbolic link; an adapter must hold its own files: copy it there")
        if not file.is_file():
            if name == CARD:
                continue
            raise UserError(f"{str(folder)!r} has no {name}; an adapter needs {WEIGHTS} and {CONFIG}")
        if file.stat().st_size > limit:
            raise UserError(f"{str(file)!r} has {file.stat().st_size:,} bytes; at most {limit:,} are allowed")


def check_config(config: dict[str, Any]) -> frozenset[int]:
    """Hold a PEFT config against what vLLM serves; return the ranks it declares."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{CONFIG}: peft_type is {kind!r}; only 'LORA' can be served")
    for key in _UNSERVED:
        if config.get(key):
            raise UserError(f"{CONFIG}: {key} is {config[key]!r}; vLLM does not serve it: train without it")
    if config.get("bias", "none") != "none":
        raise UserError(f"{CONFIG}: bias is {config['bias']!r}; vLLM serves only 'none'")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise UserError(
            f"{CONFIG}: init_lora_weights is {init!r}, which also changes the base; convert it to a plain LoRA "
            "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
            raise UserError(f"{CONFIG}: rank is {rank!r}; it must be a whole number from 1 to {MAX_RANK}")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not 0 < abs(alpha) < float("inf"):
        raise UserError(f"{CONFIG}: lora_alpha is {alpha!r}; it must be a number other than zero")
    return frozenset(ranks)


def _pairs(shapes: dict[str, Shape]) -> dict[str, tuple[Shape, Shape]]:
    """Group an adapter's tensors by module: {module: (shape of A, shape of B)}."""
    sides: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{WEIGHTS}: {key!r} is no LoRA tensor; keys look like base_model.model.<module>.lora_A.weight "
                "(embeddings and heads cannot be served: leave them out of target_modules)"
            )
        sides.setdefault(match["module"], {})[match["side"]] = shape
    if not sides:
        raise UserError(f"{WEIGHTS} holds no tensors: it would answer as the base")
    for module, found in sides.items():
        if len(found) != 2:
            raise UserError(f"{WEIGHTS}: {module} has lora_{next(iter(found))} without its other half")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _check_shapes(module: str, a: Shape, b: Shape, base: dict[str, Shape], ranks: frozenset[int]) -> None:
    """A must be (rank, inputs) and B (outputs, rank) of a linear layer (outputs, inputs) of the base."""
    if module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
        # Served, they would cost a vocabulary-sized product a row, and vLLM 0.32 can die on prompt log-probabilities.
        raise UserError(f"{WEIGHTS}: it changes {module}, which is not served; leave it out of target_modules")
    linear = base.get(f"{module}.weight")
    if linear is None or len(linear) != 2:
        raise UserError(f"{WEIGHTS}: the base has no linear layer {module}; the adapter is for another base")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise UserError(f"{WEIGHTS}: {module} has A {a} and B {b}, whose ranks do not meet")
    if (b[0], a[1]) != linear:
        raise UserError(f"{WEIGHTS}: {module} is {(b[0], a[1])} but {linear} in the base; it is for another base")
    if a[0] not in ranks:
        raise UserError(f"{WEIGHTS}: {module} has rank {a[0]}, but {CONFIG} says {', '.join(map(str, sorted(ranks)))}")


def _check_values(path: Path) -> None:
    """Refuse numbers that are not finite, and an adapter whose every product B @ A is zero."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            alive = False
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                values = tensors.get_tensor(key)
                if not values.isfinite().all():
                    raise UserError(f"{WEIGHTS}: {key} holds NaN or infinity; the training run diverged")
                if key.endswith("lora_B.weight"):
                    other = tensors.get_tensor(key.replace("lora_B.weight", "lora_A.weight"))
                    alive = alive or bool((values.float() @ other.float()).any())
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error}); save the adapter again") from error
    if not alive:
        raise UserError(f"{WEIGHTS}: every product B @ A is zero: the adapter would answer exactly as the base")
