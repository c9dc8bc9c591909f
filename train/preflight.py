"""`python -m train check RECIPE`: what would fail after hours, found in seconds and without loading weights.

Once for each base it also asks vLLM, for some 20 s, which layers of an adapter it would apply.
Each check is one line, ok or FAIL. `train` runs the same checks first and refuses where one fails.
"""

import dataclasses
import difflib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from counsel import adapter_check, catalog, store
from counsel.chat import prompt_messages
from counsel.errors import UserError
from counsel.lora_layers import served_layers
from train import data
from train.contacts import EMAIL, LINK, PHONE
from train.hardware import Precision, TrainHardware
from train.recipe import Recipe

# What vLLM 0.32 accepts as --max-lora-rank.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MIN_FREE_DISK_BYTES = 2 << 30
# Rows whose prompt alone fills max_length teach nothing. A few are left out; more means that max_length is wrong.
MAX_LEFT_OUT_SHARE = 0.01


class Finding(NamedTuple):
    """One check: its name, whether it holds, and what was seen."""

    check: str
    ok: bool
    seen: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.check:<10} {self.seen}"


@dataclass(frozen=True)
class Lengths:
    """Token counts of the training rows: of the whole row, and of its answer after cutting at max_length."""

    whole: list[int]
    scored: list[int]


def refuse_unless_ready(recipe: Recipe, how: Precision, here: TrainHardware) -> None:
    """Print each finding on stderr; raise UserError when one is a failure."""
    failed = []
    for finding in check(recipe, how, here):
        print(finding, file=sys.stderr, flush=True)
        failed += [] if finding.ok else [finding]
    if failed:
        raise UserError(f"{failed[0].check}: {failed[0].seen}; nothing was trained")


def check(recipe: Recipe, how: Precision, here: TrainHardware) -> Iterator[Finding]:
    """Run every check in turn; one that cannot go on because an earlier one failed is left out."""
    # bitsandbytes says, on import, that a kernel from the hub is missing; none is wanted.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    yield _guard("name", lambda: _name(recipe))
    yield _guard("system", lambda: _system(recipe))
    yield _guard("optimizer", lambda: optimizer(recipe, how))
    for item in how.downgrades:
        yield Finding("machine", True, str(item))
    found: dict[str, Any] = {}

    def base() -> str:
        found["base"] = catalog.resolve(recipe.base)
        if recipe.store and recipe.name == found["base"].name:
            raise UserError(f"name is {recipe.name!r}, under which the base is served; choose another --name")
        return f"{found['base'].hub_id} ({found['base'].license}) is at hand"

    def rows() -> str:
        found["splits"], report = data.prepare(recipe.data_config())
        found["report"] = report
        n, unit = report.rows, " (split by row)" if report.split == "row" else ""
        return (
            f"{report.rows_in} rows in, {report.rows_out} kept; train {n['train']}, val {n['val']}, test {n['test']}; "
            f"leak {report.leak} questions{unit}"
        )

    yield _guard("base", base)
    yield _guard("data", rows)
    if "report" in found:
        yield from _what_became_of_rows(found["report"])
    if "base" not in found:
        return
    folder = found["base"].path
    yield _guard("lora", lambda: lora_config(recipe, folder))
    yield _guard("targets", lambda: _count_targets(recipe, folder, found))
    if "adapted" in found:
        yield _guard("served", lambda: served(recipe, folder, found["adapted"]))
    yield _guard("attention", lambda: attention(recipe, folder))
    yield _guard("template", lambda: template(recipe, folder))
    if "splits" in found:
        yield _guard("rows", lambda: _measure_rows(recipe, folder, found))
    if "lengths" in found and "adapted" in found:
        yield _guard("memory", lambda: memory(recipe, how, here, folder, found["adapted"], found["lengths"]))
    yield _guard("disk", lambda: disk(Path(recipe.runs)))
    if recipe.store:
        yield _guard("store", lambda: writable("store", Path(recipe.store)))


def _what_became_of_rows(report: data.Report) -> Iterator[Finding]:
    """How the file was read, and of each reason to drop or mask the number of rows, and examples."""
    yield Finding("read as", True, report.read_as)
    for reason, n in report.dropped.items():
        choice = " (contacts: mask keeps these)" if reason in (EMAIL, LINK, PHONE) else ""
        yield Finding("dropped", True, f"{reason}: {n}{choice}, such as {'; '.join(report.examples[reason])}")
    for kind, n in report.masked.items():
        yield Finding("masked", True, f"{kind}: {n}")


def needed_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds `rank`. Raises UserError above the largest."""
    for allowed in SERVED_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"rank is {rank}; vLLM serves at most {SERVED_RANKS[-1]}")


def lora_config(recipe: Recipe, folder: Path) -> str:
    """Hold the LoRA config that training will save against the rules of the adapter store."""
    from train.sft import adapter_config

    document = json.loads(json.dumps(adapter_config(recipe).to_dict(), default=list))
    adapter_check.check_config(document)
    return f"rank {recipe.rank}, alpha {recipe.alpha}: vLLM serves it with --max-lora-rank {needed_rank(recipe.rank)}"


def adapted_modules(recipe: Recipe, folder: Path) -> dict[str, tuple[int, int]]:
    """{module: (outputs, inputs)} that the recipe's targets resolve to, on a model without weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.sft import lora_targets

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        names = sorted({name.rsplit(".", 1)[-1] for name in linear} - {"lm_head"})
        missing = [target for target in recipe.target_modules if target != "all-linear" and target not in names]
        if missing:
            raise UserError(f"targets has {missing[0]!r}, which matches no layer; the base has {', '.join(names)}")
        peft_model = get_peft_model(model, LoraConfig(r=1, target_modules=lora_targets(recipe)))
    # Sizes as LoRA has them: the weight of a Conv1D, GPT-2's linear layer, is the other way round.
    return {
        name.removeprefix("base_model.model."): (
            module.lora_B["default"].out_features,
            module.lora_A["default"].in_features,
        )
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A")
    }


def served(recipe: Recipe, folder: Path, adapted: Iterable[str]) -> str:
    """Hold the adapted layers against those that vLLM applies; what is not published may be for another server."""
    try:
        layers = served_layers(folder)
    except UserError as error:
        return f"not tried: {error}"
    reason = layers.why_unserved(adapted)
    if reason and recipe.store:
        raise UserError(f"{reason}; or set store to '' to train without publishing")
    return f"it could not be published: {reason}" if reason else "vLLM applies each of these layers"


def attention(recipe: Recipe, folder: Path) -> str:
    """Refuse sdpa for a model that caps its attention scores: transformers' sdpa leaves the cap out, silently."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap and recipe.attn_implementation == "sdpa":
        raise UserError(f"the base caps attention scores at {cap}, which sdpa drops; use attn_implementation: eager")
    return recipe.attn_implementation


def template(recipe: Recipe, folder: Path) -> str:
    """The chat template renders, the prompt is a prefix of the whole, the turn's end is trained, one BOS leads."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise UserError(f"the base at {str(folder)!r} has no chat template; use an instruction-tuned base")
    messages = prompt_messages("How are you?", recipe.system)
    answer = {"role": "assistant", "content": "Well."}
    try:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*messages, answer], return_dict=False)
    except TemplateError as error:
        raise UserError(f"the chat template refuses our messages: {' '.join(str(error).split())}") from error
    if whole[: len(prompt)] != prompt:
        raise UserError("the rendered prompt is not a prefix of prompt and answer; training would see other prompts")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [token for token in whole[len(prompt) :] if token in special]
    if not ends:
        raise UserError("no end-of-turn token follows the answer: the model would not learn to stop")
    bos = tokenizer.bos_token_id
    if bos is not None and whole[:2] == [bos, bos]:
        raise UserError(f"the template puts {tokenizer.bos_token!r} twice at the start")
    end = tokenizer.convert_ids_to_tokens(ends[0])
    stops = "" if ends[0] in _stop_tokens(folder, tokenizer) else ", but is no stop token in generation_config.json"
    return f"prompt is a prefix, {len(prompt)} tokens around a short question; {end} ends the answer, trained{stops}"


def row_lengths(recipe: Recipe, folder: Path, rows: list[dict[str, Any]]) -> Lengths:
    """Tokenise the training rows as training will."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole, scored = [], []
    for row in rows:
        messages = prompt_messages(row["question"], recipe.system)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = {"role": "assistant", "content": row["answer"]}
        total = len(tokenizer.apply_chat_template([*messages, answer], return_dict=False))
        whole.append(total)
        scored.append(max(0, min(total, recipe.max_length) - len(prompt)))
    return Lengths(whole, scored)


def memory(
    recipe: Recipe,
    how: Precision,
    here: TrainHardware,
    folder: Path,
    adapted: dict[str, tuple[int, int]],
    lengths: Lengths,
) -> str:
    """A rough estimate of the most memory training will hold, beside what the machine has."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    weights = sum(file.stat().st_size for file in catalog.weight_files(folder))
    if how.dtype == "float32":
        weights *= 2
    if how.load_in_4bit:
        weights = round(weights * 0.28) + config.vocab_size * config.hidden_size * 2
    trainable = recipe.rank * sum(out + into for out, into in adapted.values())
    # fp32 weight, gradient and two moments; 8-bit moments are a quarter.
    optimizer = trainable * (8 + (2 if "8bit" in how.optimizer else 8))
    tokens = recipe.batch_size * min(max(lengths.whole), recipe.max_length)
    # Kept for the backward pass of one layer, in model-width rows of 2 bytes: about 34 without checkpointing, 2 with.
    kept = 2 if recipe.gradient_checkpointing else 34
    activations = tokens * config.hidden_size * config.num_hidden_layers * kept * (2 if how.dtype == "bfloat16" else 4)
    total = weights + optimizer + activations + (1 << 30)
    text = (
        f"about {_gib(total)}: weights {_gib(weights)}, optimizer {_gib(optimizer)} for {trainable:,} parameters, "
        f"activations {_gib(activations)}, libraries 1.0 GiB; the {here.device} has {_gib(here.memory_bytes)}"
    )
    if total > here.memory_bytes:
        raise UserError(f"{text}; lower batch_size or max_length, or set gradient_checkpointing")
    return text


def optimizer(recipe: Recipe, how: Precision) -> str:
    """The optimizer is one of transformers', and what it needs is installed."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    known = [name.value for name in OptimizerNames]
    if recipe.optim not in known:
        raise UserError(
            f"optim is {recipe.optim!r}, which transformers does not have; "
            f"did you mean {_most_like(recipe.optim, known)!r}?"
        )
    # As much of TrainingArguments as is read here: made whole, they would set up this process's devices again.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    arguments: Any = SimpleNamespace(**defaults | {"optim": OptimizerNames(how.optimizer)})
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"optimizer {how.optimizer!r} does not work here ({reason}); try adamw_torch_fused") from error
    return how.optimizer


def _most_like(word: str, names: list[str]) -> str:
    """The name most like `word`, as a whole or by its beginning: `adamm` is most like `adamw_torch`."""

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in (name, name[: len(word)]))

    return max(names, key=likeness)


def disk(runs: Path) -> str:
    """At least 2 GiB where the run will be, and leave to write there."""
    writable("runs", runs)
    free = shutil.disk_usage(_nearest_folder(runs)).free
    if free < MIN_FREE_DISK_BYTES:
        raise UserError(f"{_gib(free)} free at {str(runs)!r}; a run needs {_gib(MIN_FREE_DISK_BYTES)}")
    return f"{_gib(free)} free"


def writable(option_name: str, folder: Path) -> str:
    """`folder` is a folder in which files may be made, or may become one. Raises UserError, naming the option."""
    existing = _nearest_folder(folder)
    if not existing.is_dir():
        raise UserError(f"{option_name} is {str(folder)!r}, but {str(existing)!r} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option_name} is {str(folder)!r}, but nothing can be written in {str(existing)!r}; "
                        "change its permissions or give another folder")  # fmt: skip
    return f"{str(folder)!r} can be written"


def _nearest_folder(path: Path) -> Path:
    """`path`, or the first of its parents that exists."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))


def _guard(name: str, run: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, run())
    except UserError as error:
        return Finding(name, False, str(error))


def _name(recipe: Recipe) -> str:
    names = [recipe.with_seed(seed).name for seed in recipe.seeds] or [recipe.name]
    for name in names:
        store.check_name(name)
    return f"{', '.join(map(repr, names))} may name an adapter"


def _system(recipe: Recipe) -> str:
    if recipe.store and len(recipe.system) > store.MAX_SYSTEM_CHARS:
        raise UserError(
            f"the system prompt has {len(recipe.system):,} characters, and an adapter is published with at most "
            f"{store.MAX_SYSTEM_CHARS:,}; shorten it, or set store to '' to train without publishing"
        )
    return f"{len(recipe.system):,} characters" if recipe.system else "no system prompt"


def _count_targets(recipe: Recipe, folder: Path, found: dict[str, Any]) -> str:
    found["adapted"] = adapted_modules(recipe, folder)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in found["adapted"]})
    parameters = recipe.rank * sum(out + into for out, into in found["adapted"].values())
    return f"{len(found['adapted'])} layers ({', '.join(kinds)}), {parameters:,} trainable parameters"


def _measure_rows(recipe: Recipe, folder: Path, found: dict[str, Any]) -> str:
    from train.sft import evenly_spaced

    val = row_lengths(recipe, folder, evenly_spaced(found["splits"]["val"], recipe.max_val_rows))
    if val.scored and not any(val.scored):
        raise UserError(
            f"each of the {len(val.scored)} validation rows has a prompt that alone fills {recipe.max_length} tokens; "
            "raise max_length"
        )
    lengths = found["lengths"] = row_lengths(recipe, folder, evenly_spaced(found["splits"]["train"], recipe.max_rows))
    cut = sum(n > recipe.max_length for n in lengths.whole)
    empty = sum(n == 0 for n in lengths.scored)
    ordered = sorted(lengths.whole)
    text = (
        f"{len(ordered)} rows of {ordered[len(ordered) // 2]} tokens (median), {ordered[-1]} at most; "
        f"{cut} cut at {recipe.max_length}, {empty} left out, whose prompt alone fills that"
    )
    longest, positions = min(ordered[-1], recipe.max_length), _positions(folder)
    if longest > positions:
        raise UserError(f"{text}; the base has {positions:,} positions: set max_length to at most that")
    if empty > MAX_LEFT_OUT_SHARE * len(ordered):
        raise UserError(f"{text}: more than {MAX_LEFT_OUT_SHARE:.0%} of the rows; raise max_length")
    if empty and recipe.strict:
        raise UserError(f"{text}; --strict allows none: raise max_length, or drop --strict")
    return text


def _positions(folder: Path) -> float:
    """The longest text that the base was made for, in tokens; no bound where its config names none."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None) or math.inf


def _stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """The tokens on which a server stops: the tokenizer's end of sequence, and those of generation_config.json."""
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
        ends |= set(listed if isinstance(listed, list) else [listed])
    return ends - {None}


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
