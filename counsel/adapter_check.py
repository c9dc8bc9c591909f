"""The rules that an adapter folder must satisfy before it enters the store.

A bad adapter either crashes a serving engine or, worse, silently answers as the base: vLLM skips keys that match no
module. So everything is checked before anything is served: file kinds, the PEFT config against what vLLM 0.32
implements, every key and shape against the base's weight files and the layers that vLLM adapts, and the values.
counsel/trial.py then runs the adapter once.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.catalog import weight_files
from counsel.errors import UserError
from counsel.files import read_json
from counsel.lora_layers import Layers, served_layers
from counsel.tensors import Shape, tensor_shapes

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
# The values that vLLM 0.32 accepts for --max-lora-rank.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_RANK = SERVED_RANKS[-1]
MAX_WEIGHTS_BYTES = 4 << 30
MAX_TEXT_BYTES = 1 << 20

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Initializations that only choose starting values. The others (PiSSA, OLoRA, LoftQ, ...) also change the base.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Fields of PEFT 0.21 that say where an adapter comes from or how it was trained. They do not change what it computes.
_IGNORED_FIELDS = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
    *("runtime_config", "enable_lora"),
)
# Fields with a rule of their own below. Any other field that is set is refused: it may change what the adapter
# computes, and vLLM would ignore it.
_CHECKED_FIELDS = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "bias", "use_rslora"),
    "init_lora_weights",
)
# Prefixes of fields that other trainers add.
_IGNORED_PREFIXES = ("unsloth_", "axolotl_", "llamafactory_", "swift_")
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Facts:
    """Of a checked adapter: the largest rank it declares, its alpha, and the names of the modules it changes."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


def check(folder: Path, base: Path, *, served: bool = True) -> Facts:
    """Check the adapter in `folder` against the rules and the model folder `base`.

    Raises UserError for the first rule it breaks. With served=False it may also change layers that vLLM does not adapt.
    """
    check_files(folder)
    config = read_json(folder / CONFIG)
    ranks = check_config(config)
    pairs = _pairs(tensor_shapes(folder / WEIGHTS))
    layers = _layers(base) if served else None
    base_shapes: dict[str, Shape] = {}
    for file in weight_files(base):
        base_shapes.update(tensor_shapes(file))
    for module, (shape_a, shape_b) in pairs.items():
        _check_shapes(module, shape_a, shape_b, base_shapes, ranks)
    _check_values(folder / WEIGHTS)
    if layers is not None and (reason := layers.why_unserved(pairs)):
        raise UserError(f"{WEIGHTS}: {reason}")
    return Facts(
        # As vLLM counts: a rank that appears only in the config also reserves its memory.
        rank=max(ranks),
        alpha=float(config["lora_alpha"]),
        target_modules=tuple(sorted({module.rsplit(".", 1)[-1] for module in pairs})),
    )


def check_files(folder: Path) -> None:
    """Raise UserError unless `folder` holds regular files of the allowed kinds and sizes. Weights are not read."""
    if not folder.is_dir():
        raise UserError(f"no adapter folder {str(folder)!r}; give a folder with {WEIGHTS} and {CONFIG}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if not (folder / WEIGHTS).exists() and pickles:
        raise UserError(
            f"{str(folder)!r} holds {pickles[0]}: a pickle can run code when it is loaded, so it was not loaded; "
            f"save the adapter as {WEIGHTS} (PEFT: save_pretrained(..., safe_serialization=True))"
        )
    for name, limit in ((WEIGHTS, MAX_WEIGHTS_BYTES), (CONFIG, MAX_TEXT_BYTES), (CARD, MAX_TEXT_BYTES)):
        file = folder / name
        if file.is_symlink():
            raise UserError(f"{str(file)!r} is a symbolic link; the adapter needs the file itself: copy it there")
        if not file.is_file():
            if name == CARD:
                continue
            raise UserError(f"{str(folder)!r} has no {name}; an adapter needs {WEIGHTS} and {CONFIG}")
        if file.stat().st_size > limit:
            raise UserError(f"{str(file)!r} has {file.stat().st_size:,} bytes; at most {limit:,} are allowed")


def check_config(config: dict[str, Any]) -> frozenset[int]:
    """Check a PEFT config against what vLLM serves; return the ranks it declares."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{CONFIG}: peft_type is {kind!r}; only 'LORA' can be served")
    known = (*_IGNORED_FIELDS, *_CHECKED_FIELDS)
    for key, value in config.items():
        if key.startswith("vllm_"):
            raise UserError(f"{CONFIG}: {key} is {value!r}; only vLLM may set it: remove it")
        if value and key not in known and not key.startswith(_IGNORED_PREFIXES):
            raise UserError(f"{CONFIG}: {key} is {value!r}; vLLM does not serve it: train without it")
    if config.get("bias") not in (None, "none"):
        raise UserError(f"{CONFIG}: bias is {config['bias']!r}; vLLM serves only 'none'")
    if config.get("use_rslora") not in (None, True, False):
        raise UserError(f"{CONFIG}: use_rslora is {config['use_rslora']!r}; it must be true or false")
    _check_init(config.get("init_lora_weights", True))
    targets = config.get("target_modules")
    is_list_of_names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not targets or not (is_list_of_names or isinstance(targets, str)):
        raise UserError(f"{CONFIG}: target_modules is {targets!r}; it must name the layers that the adapter changes")
    ranks = _numbers(config, "r", "rank_pattern")
    for field, rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
            shown = "rank" if field == "r" else field
            raise UserError(f"{CONFIG}: {shown} is {rank!r}; it must be a whole number from 1 to {MAX_RANK}")
    for field, alpha in _numbers(config, "lora_alpha", "alpha_pattern"):
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not 0 < abs(alpha) < float("inf"):
            raise UserError(f"{CONFIG}: {field} is {alpha!r}; it must be a finite number other than zero")
    return frozenset(rank for _, rank in ranks)


def _check_init(init: object) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        return
    raise UserError(
        f"{CONFIG}: init_lora_weights is {init!r}, which also changes the base; convert it to a plain LoRA "
        "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
    )


def _numbers(config: dict[str, Any], field: str, pattern_field: str) -> list[tuple[str, Any]]:
    """(field, value) of a number and of its exceptions, an object of layer-name patterns and values."""
    exceptions = config.get(pattern_field) or {}
    if not isinstance(exceptions, dict):
        raise UserError(f"{CONFIG}: {pattern_field} is {exceptions!r}; it must be an object of layer names and numbers")
    for pattern in exceptions:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{CONFIG}: {pattern_field} holds {pattern!r}, which is not a regular expression: {error}"
            ) from error
    return [(field, config.get(field)), *((f"{pattern_field}[{key!r}]", value) for key, value in exceptions.items())]


def _pairs(shapes: dict[str, Shape]) -> dict[str, tuple[Shape, Shape]]:
    """Group an adapter's tensors by module: {module: (shape of A, shape of B)}."""
    sides: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{WEIGHTS}: {key!r} is not a LoRA tensor; keys look like base_model.model.<module>.lora_A.weight "
                "(embeddings and heads cannot be served: leave them out of target_modules)"
            )
        sides.setdefault(match["module"], {})[match["side"]] = shape
    if not sides:
        raise UserError(f"{WEIGHTS} holds no tensors, so it would answer as the base; save the adapter again")
    for module, pair in sides.items():
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise UserError(f"{WEIGHTS}: {module} has no lora_{missing}; save the adapter again")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_shapes(module: str, a: Shape, b: Shape, base: dict[str, Shape], ranks: frozenset[int]) -> None:
    """A must be (rank, inputs) and B (outputs, rank) of a linear layer (outputs, inputs) of the base."""
    if module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
        # They would cost a vocabulary-sized product per row, and vLLM 0.32 can crash on prompt log-probabilities.
        raise UserError(f"{WEIGHTS}: it changes {module}, which is not served; leave it out of target_modules")
    linear = base.get(f"{module}.weight")
    if linear is None or len(linear) != 2:
        raise UserError(f"{WEIGHTS}: the base has no linear layer {module}; the adapter is for another base")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise UserError(f"{WEIGHTS}: {module} has A {a} and B {b}, whose ranks differ")
    if (b[0], a[1]) != linear:
        raise UserError(f"{WEIGHTS}: {module} is {(b[0], a[1])} but {linear} in the base; it is for another base")
    if a[0] not in ranks:
        raise UserError(f"{WEIGHTS}: {module} has rank {a[0]}, but {CONFIG} says {', '.join(map(str, sorted(ranks)))}")


def _layers(base: Path) -> Layers | None:
    """What vLLM can adapt in the base; None when that is unknown."""
    try:
        layers = served_layers(base)
    except UserError as error:
        # A server checks again when it loads the adapter.
        print(f"skipped the check for layers that vLLM does not adapt: {error}", file=sys.stderr)
        return None
    if layers.refusal:
        raise UserError(layers.why_unserved(()))
    return layers


def _check_values(path: Path) -> None:
    """Refuse values that are not finite, and an adapter in which every product B @ A is zero."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            changes_something = False
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                dtype = tensors.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise UserError(f"{WEIGHTS}: {key} is {dtype}; only {', '.join(_DTYPES)} can be served: convert it")
                values = tensors.get_tensor(key)
                if not values.isfinite().all():
                    raise UserError(f"{WEIGHTS}: {key} holds NaN or infinity; the training run diverged")
                if key.endswith("lora_B.weight"):
                    other = tensors.get_tensor(key.replace("lora_B.weight", "lora_A.weight"))
                    changes_something = changes_something or bool((values.float() @ other.float()).any())
    except SafetensorError as error:
        raise UserError(
            f"{str(path)!r} is not a complete safetensors file ({error}); save the adapter again"
        ) from error
    if not changes_something:
        raise UserError(
            f"{WEIGHTS}: every product B @ A is zero, so the adapter would answer exactly as the base; "
            "train longer or with a higher learning rate"
        )
