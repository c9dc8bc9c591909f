"""`python -m train check RECIPE`: find in seconds, without loading weights, what would fail after hours.

Each check is one line, ok or FAIL. `train` runs the same checks first, stops if one fails, and uses what they prepared.
The first check of a base takes about 20 s longer: it asks vLLM which layers it can adapt.
"""

import dataclasses
import difflib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from counsel import adapter_check, catalog, store
from counsel.chat import prompt_messages
from counsel.contacts import EMAIL, LINK, PHONE
from counsel.errors import UserError
from counsel.lora_layers import served_layers
from counsel.run import Run
from train import data, init_adapter
from train.checklist import Checklist, Finding
from train.disk import check_disk, check_writable
from train.hardware import Precision, TrainHardware, attention_for, score_cap
from train.lora import LayerSizes, adapted_layers, count_parameters, lora_config, needed_rank
from train.memory import estimate_memory
from train.prompts import TrainRows, encode, marks_replies
from train.recipe import FLASH, Recipe
from train.settings import RunSettings

# A row whose prompt alone fills max_length teaches nothing. A few are left out; more means that max_length is wrong.
MAX_LEFT_OUT_SHARE = 0.01


@dataclass(frozen=True)
class Prepared:
    """What the checks loaded, for the run to use, so that a training loads each of them once."""

    base: catalog.Base
    config: Any
    tokenizer: Any
    splits: data.Splits
    report: data.Report


def preflight(recipe: Recipe, precision: Precision, hardware: TrainHardware) -> Prepared:
    """Run every check, print the findings on stderr, and return what was loaded. Raises UserError if a check fails."""
    failed: list[Finding] = []

    def show(finding: Finding) -> None:
        print(finding, file=sys.stderr, flush=True)
        if not finding.ok:
            failed.append(finding)

    prepared = check_recipe(recipe, precision, hardware, show)
    if prepared is None:
        raise UserError(f"{failed[0].check}: {failed[0].seen}; nothing was trained")
    return prepared


def check_recipe(
    recipe: Recipe, precision: Precision, hardware: TrainHardware, on_finding: Callable[[Finding], None]
) -> Prepared | None:
    """Run every check and report each finding as it is made. Returns None if a check failed.

    A check that needs what an earlier one failed to load is skipped.
    """
    # On import, bitsandbytes warns that a hub kernel is missing. We use none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    checks = Checklist(on_finding)
    checks.run("name", check_run_name, recipe)
    checks.run("system", check_system, recipe)
    checks.run("optimizer", check_optimizer, recipe, precision)
    if recipe.report_to != ("none",):
        checks.run("trackers", check_trackers, recipe)
    for downgrade in precision.downgrades:
        checks.add(Finding("machine", True, str(downgrade)))
    base = checks.load("base", find_base, recipe)
    prepared_data = checks.load("data", prepare_data, recipe)
    if prepared_data is not None:
        for finding in _data_findings(prepared_data[1]):
            checks.add(finding)
    if base is None:
        return None
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(base.path)
    checks.run("lora", check_lora, recipe)
    layers = checks.load("targets", find_layers, recipe, config)
    if layers is not None:
        checks.run("served", check_served, recipe, base.path, layers)
        if recipe.init_adapter:
            checks.run("from", check_init_adapter, recipe, base, layers, prepared_data)
    checks.run("attention", check_attention, recipe, precision, config)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    checks.run("template", check_template, recipe, base.path, tokenizer)
    if prepared_data is not None:
        encoded = checks.load("rows", measure_rows, recipe, config, tokenizer, prepared_data[0])
        if encoded is not None and layers is not None:
            longest = max(encoded.lengths)
            checks.run("memory", check_memory, recipe, precision, hardware, base.path, config, layers, longest)
    checks.run("disk", check_disk, Path(recipe.runs))
    if recipe.store:
        checks.run("store", check_writable, "store", Path(recipe.store))
    if prepared_data is None or not checks.all_ok:
        return None
    return Prepared(base, config, tokenizer, *prepared_data)


def check_run_name(recipe: Recipe) -> str:
    names = [recipe.with_seed(seed).name for seed in recipe.seeds] or [recipe.name]
    for name in names:
        store.check_name(name)
        if recipe.store:
            store.check_no_canary(store.read_versions(Path(recipe.store), name))
    return f"{', '.join(map(repr, names))}, allowed as an adapter name"


def check_system(recipe: RunSettings) -> str:
    if recipe.store and len(recipe.system) > store.MAX_SYSTEM_CHARS:
        raise UserError(
            f"the system prompt has {len(recipe.system):,} characters, but an adapter is published with at most "
            f"{store.MAX_SYSTEM_CHARS:,}; shorten it, or set store to '' to train without publishing"
        )
    return f"{len(recipe.system):,} characters" if recipe.system else "no system prompt"


def check_optimizer(recipe: RunSettings, precision: Precision) -> str:
    """transformers has the optimizer, and the packages that it needs are installed."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    known = [name.value for name in OptimizerNames]
    if recipe.optim not in known:
        raise UserError(
            f"optim is {recipe.optim!r}, which transformers does not have; "
            f"did you mean {_most_similar(recipe.optim, known)!r}?"
        )
    # Only the fields that are read here: a real TrainingArguments would set up the devices of this process again.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    arguments: Any = SimpleNamespace(**defaults | {"optim": OptimizerNames(precision.optimizer)})
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"optimizer {precision.optimizer!r} does not work here ({reason}); try adamw_torch_fused"
        ) from error
    return precision.optimizer


def check_trackers(recipe: RunSettings) -> str:
    """The package of each experiment tracker is installed."""
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    if missing := [name for name in recipe.report_to if name not in available]:
        raise UserError(
            f"report_to has {missing[0]}, which is not installed; pip install {missing[0]}, or leave it out"
        )
    return f"settings and metrics go to {', '.join(recipe.report_to)}"


def _most_similar(word: str, names: list[str]) -> str:
    """The name most similar to `word`, as a whole or by its beginning: `adamm` gives `adamw_torch`."""

    def similarity(name: str) -> float:
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in (name, name[: len(word)]))

    return max(names, key=similarity)


def find_base(recipe: RunSettings) -> tuple[catalog.Base, str]:
    base = catalog.resolve(recipe.base)
    if recipe.store and recipe.name == base.name:
        raise UserError(f"name is {recipe.name!r}, the name under which the base is served; choose another --name")
    return base, f"{base.hub_id} ({base.license}) is on disk"


def prepare_data(recipe: Recipe) -> tuple[tuple[data.Splits, data.Report], str]:
    splits, report = data.prepare(recipe.data_config())
    n, unit = report.rows, "" if report.split == "question" else f" (split by {report.split})"
    return (splits, report), (
        f"{report.rows_in} rows in, {report.rows_out} kept; train {n['train']}, val {n['val']}, test {n['test']}; "
        f"leak {report.leak} questions{unit}"
    )


def _data_findings(report: data.Report) -> Iterator[Finding]:
    """How the file was read, what was dropped, masked or changed, and what conversations share."""
    yield Finding("read as", True, report.read_as)
    for reason, n in report.dropped.items():
        hint = " (contacts: mask keeps these)" if reason in (EMAIL, LINK, PHONE) else ""
        yield Finding("dropped", True, f"{reason}: {n}{hint}, such as {'; '.join(report.examples[reason])}")
    for kind, n in report.masked.items():
        yield Finding("masked", True, f"{kind}: {n}")
    for kind, n in report.changed.items():
        yield Finding("changed", True, f"{kind}: {n}")
    if report.conversations:
        stats, shared = report.exchanges, report.shared
        yield Finding("turns", True, f"{report.conversations} conversations; replies: median {stats['median']:g}, max "
                                     f"{stats['max']:g}; {shared['exact']} share a user turn with another row, "
                                     f"{shared['near']} more a near copy")  # fmt: skip
    overlap = report.overlap
    yield Finding("overlap", True, f"{overlap['exact']} held-out rows share a user turn with training, "
                                   f"{overlap['near']} more a near copy")  # fmt: skip


def check_lora(recipe: Recipe) -> str:
    """The adapter store would accept the LoRA config that training will save."""
    document = json.loads(json.dumps(lora_config(recipe).to_dict(), default=list))
    adapter_check.check_config(document)
    return f"rank {recipe.rank}, alpha {recipe.alpha}: vLLM serves it with --max-lora-rank {needed_rank(recipe.rank)}"


def find_layers(recipe: Recipe, config: Any) -> tuple[LayerSizes, str]:
    layers = adapted_layers(recipe, config)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
    parameters = count_parameters(recipe, layers)
    return layers, f"{len(layers)} layers ({', '.join(kinds)}), {parameters:,} trainable parameters"


def check_served(recipe: Recipe, base: Path, layers: Iterable[str]) -> str:
    """vLLM applies every adapted layer. An adapter that is not published may be for another server."""
    try:
        known = served_layers(base)
    except UserError as error:
        return f"not checked: {error}"
    reason = known.why_unserved(layers)
    if reason and recipe.store:
        raise UserError(f"{reason}; or set store to '' to train without publishing")
    return f"it could not be published: {reason}" if reason else "vLLM applies each of these layers"


def check_init_adapter(
    recipe: Recipe, base: catalog.Base, layers: Iterable[str], prepared_data: tuple[data.Splits, data.Report] | None
) -> str:
    """The adapter to continue from fits, and how many of the held-out questions its own run trained on."""
    found = init_adapter.find_init_adapter(recipe)
    details = init_adapter.check_fits(found, recipe, base, layers)
    run = Run(Path(recipe.runs) / found.run) if found.run else None
    if run is None or not (run.path / "data" / "train.jsonl").is_file() or prepared_data is None:
        return f"{details}; whether it was trained on held-out questions is unknown"
    trained = {row["question_id"] for row in run.split("train")}
    held_out = {row["question_id"] for name in ("val", "test") for row in prepared_data[0][name]}
    return f"{details}; it was trained on {len(trained & held_out)} of {len(held_out)} held-out questions"


def check_attention(recipe: RunSettings, precision: Precision, config: Any) -> str:
    """Neither sdpa on a base that caps its scores, since it drops the cap, nor packing without FlashAttention.

    Rows packed with sdpa or eager were measured to end at a higher loss: https://github.com/huggingface/trl/issues/3910
    """
    cap = score_cap(config)
    if cap and recipe.attn_implementation == "sdpa":
        raise UserError(
            f"the base caps attention scores at {cap}, which sdpa drops; use attn_implementation: eager, or {FLASH}"
        )
    if recipe.packing and recipe.attn_implementation != FLASH:
        raise UserError(
            f"packing with {recipe.attn_implementation} costs loss; use attn_implementation: {FLASH}, or packing: false"
        )
    return attention_for(precision, config) + (", rows packed" if precision.packing else "")


def check_template(recipe: RunSettings, base: Path, tokenizer: Any) -> str:
    """The chat template renders, the prompt is a prefix of the whole, the end of turn is trained, one leading BOS."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(f"the base at {str(base)!r} has no chat template; use an instruction-tuned base")
    messages = prompt_messages("How are you?", recipe.system)
    answer = {"role": "assistant", "content": "Well."}
    try:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*messages, answer], return_dict=False)
    except TemplateError as error:
        raise UserError(f"the chat template rejects our messages: {' '.join(str(error).split())}") from error
    if whole[: len(prompt)] != prompt:
        raise UserError(
            "the rendered prompt is not a prefix of prompt and answer; training would see different prompts than the "
            "server sends: use a base whose template renders both alike"
        )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [token for token in whole[len(prompt) :] if token in special]
    if not ends:
        raise UserError(
            "no end-of-turn token follows the answer, so the model would not learn to stop; use another base"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and whole[:2] == [bos, bos]:
        raise UserError(
            f"the template puts {tokenizer.bos_token!r} at the start twice; use a base with another chat template"
        )
    end = tokenizer.convert_ids_to_tokens(ends[0])
    stops = "" if ends[0] in _stop_tokens(base, tokenizer) else ", but is not a stop token in generation_config.json"
    marks = "; the template marks what to train on" if marks_replies(tokenizer) else ""
    return f"the prompt is a prefix ({len(prompt)} tokens); {end} ends the answer and is trained{stops}{marks}"


def _stop_tokens(base: Path, tokenizer: Any) -> set[int]:
    """The tokens at which a server stops: the tokenizer's end of sequence, and those of generation_config.json."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    if (base / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(base).eos_token_id
        stops |= set(listed if isinstance(listed, list) else [listed])
    return stops - {None}


def measure_rows(recipe: Recipe, config: Any, tokenizer: Any, splits: data.Splits) -> tuple[TrainRows, str]:
    """The training rows as tokens. Raises UserError if too many rows have no room left for an answer."""
    val, train = (
        encode(tokenizer, data.evenly_spaced(splits[name], limit), recipe.system, recipe.max_length,
               recipe.train_on_turns)
        for name, limit in (("val", recipe.max_val_rows), ("train", recipe.max_rows))
    )  # fmt: skip
    if val.rows and not val.sequences:
        raise UserError(
            f"each of the {val.rows} validation rows has a prompt that alone fills {recipe.max_length} tokens; "
            "raise max_length"
        )
    cut = sum(n > recipe.max_length for n in train.lengths)
    empty, ordered = train.rows_left_out, sorted(train.lengths)
    details = (
        f"{train.rows} rows, {ordered[len(ordered) // 2]} tokens in the median and {ordered[-1]} at most; "
        f"{cut} cut at {recipe.max_length}, {empty} left out because the prompt alone fills that"
    )
    if train.replies > train.rows:
        split = len(train.lengths) > train.rows
        why = ", one for each reply whose history the chat template renders in another way" if split else ""
        details += (
            f"; {train.replies} replies in {len(train.lengths)} sequences{why}, {train.replies_lost} lost by cutting"
        )
    longest = min(ordered[-1], recipe.max_length)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if longest > positions:
        raise UserError(f"{details}; the base has {positions:,} positions: set max_length to at most that")
    if empty > MAX_LEFT_OUT_SHARE * train.rows:
        raise UserError(f"{details}: more than {MAX_LEFT_OUT_SHARE:.0%} of the rows; raise max_length")
    if train.replies_lost and recipe.strict:
        raise UserError(f"{details}; --strict allows none: raise max_length, or drop --strict")
    return train, details


def check_memory(
    recipe: Recipe,
    precision: Precision,
    hardware: TrainHardware,
    base: Path,
    config: Any,
    layers: LayerSizes,
    longest: int,
) -> str:
    """A rough estimate of training's peak memory fits in the machine's."""
    weight_bytes = sum(file.stat().st_size for file in catalog.weight_files(base))
    needed = estimate_memory(recipe, precision, weight_bytes, config, layers, longest)
    details = (
        f"about {_gib(needed.total)}: weights {_gib(needed.weights)}, optimizer {_gib(needed.optimizer)} for "
        f"{needed.trainable:,} parameters, activations {_gib(needed.activations)}, libraries {_gib(needed.libraries)}; "
        f"the {hardware.device} has {_gib(hardware.memory_bytes)}"
    )
    if needed.total > hardware.memory_bytes:
        raise UserError(f"{details}; lower batch_size or max_length, or set gradient_checkpointing")
    return details


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
