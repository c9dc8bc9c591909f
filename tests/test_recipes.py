"""The shipped recipes, and the checks before training."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Gemma2Config, LlamaConfig

from counsel.cli import load_config
from counsel.errors import UserError
from counsel.lora_layers import Layers, served_layers
from tests.tiny import tiny_base, tiny_gpt2
from train.checklist import Finding
from train.hardware import TrainHardware, attention_for, choose_precision, detect_training_hardware
from train.lora import needed_rank
from train.preflight import check_recipe
from train.recipe import RECIPES, Recipe

SHIPPED = sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)
CPU = TrainHardware("cpu", "two cores", bf16=True, memory_bytes=24 << 30)
GPU = TrainHardware("cuda", "a GPU", bf16=True, memory_bytes=24 << 30)
FLASH_GPU = replace(GPU, flash_attention=True)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_loads_and_starts_with_its_command(path):
    """Each shipped recipe is valid, has the name of its file, and its first line is the command that runs it."""
    recipe = load_config(Recipe, str(path), {})

    assert recipe.name == path.stem
    assert path.read_text().startswith(f"# python -m train {path.stem}")


def test_reference_holds_the_notebooks_numbers():
    """The reference recipe has the numbers of the notebook it came from."""
    recipe = load_config(Recipe, str(RECIPES / "reference.yaml"), {})

    assert (recipe.base, recipe.load_in_4bit, recipe.attn_implementation) == ("gemma-2-2b-it", True, "eager")
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.target_modules) == (64, 32, 0.05, ("all-linear",))
    assert (recipe.learning_rate, recipe.batch_size, recipe.gradient_accumulation_steps, recipe.epochs) == (
        2e-4,
        1,
        4,
        3.0,
    )
    assert (recipe.max_length, recipe.optim) == (2000, "paged_adamw_8bit")


def test_without_cuda_4_bits_are_dropped_and_reported():
    """On a CPU the base is bf16 and the optimizer plain, each reported with a reason; strict refuses."""
    recipe = load_config(Recipe, str(RECIPES / "reference.yaml"), {})

    precision = choose_precision(recipe, CPU)

    assert (precision.load_in_4bit, precision.optimizer, precision.dtype) == (False, "adamw_torch_fused", "bfloat16")
    assert [(d.asked, d.used) for d in precision.downgrades] == [
        ("a 4-bit base", "a bfloat16 base"),
        ("paged_adamw_8bit", "adamw_torch_fused"),
    ]
    assert choose_precision(recipe, GPU).downgrades == ()
    assert choose_precision(recipe, GPU).load_in_4bit
    with pytest.raises(UserError, match="--strict: asked a 4-bit base, used a bfloat16 base, because"):
        choose_precision(replace(recipe, strict=True), CPU)


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (2, 8), (16, 16), (48, 64), (64, 64), (512, 512)])
def test_the_rank_the_server_needs(rank, needed):
    """The smallest --max-lora-rank that vLLM accepts for a rank."""
    assert needed_rank(rank) == needed


def checked(recipe, hardware=CPU) -> list[Finding]:
    found: list[Finding] = []
    prepared = check_recipe(recipe, choose_precision(recipe, hardware), hardware, found.append)
    assert (prepared is not None) == all(finding.ok for finding in found)
    return found


def findings(base_folder, folder, hardware=CPU, **changes) -> dict[str, Finding]:
    recipe = replace(Recipe(base=str(base_folder), runs=str(folder), max_rows=8, system="listen"), **changes)
    return {finding.check: finding for finding in checked(recipe, hardware)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


def test_a_good_recipe_passes_every_check(llama, tmp_path):
    """Every check passes and reports details: 14 layers, the server's rank, no leak."""
    found = findings(llama, tmp_path, rank=4)

    assert [str(finding) for finding in found.values() if not finding.ok] == []
    assert "--max-lora-rank 8" in found["lora"].seen
    assert found["targets"].seen.startswith("14 layers")
    assert found["served"].seen == "vLLM applies each of these layers"
    assert "leak 0" in found["data"].seen


def test_layers_that_the_server_would_ignore_are_refused_before_training(llama, tmp_path, monkeypatch):
    """The error names each kind of layer and says what to do; an unpublished adapter may have them."""
    layers = served_layers(llama)
    fewer = {layer: place for layer, place in layers.places.items() if "mlp" in layer}
    monkeypatch.setattr("train.preflight.served_layers", lambda base: Layers(fewer, layers.targets))

    refused = findings(llama, tmp_path)["served"]
    assert not refused.ok
    assert {f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"} == set(re.findall(r"model[\w.]+", refused.seen))
    assert "train on some of these: down_proj, gate_proj, up_proj" in refused.seen
    assert findings(llama, tmp_path, target_modules=("gate_proj", "up_proj"))["served"].ok

    unpublished = findings(llama, tmp_path, store="")["served"]
    assert unpublished.ok
    assert "could not be published: it changes model.layers.0.self_attn" in unpublished.seen


def test_a_base_on_which_no_adapter_is_served_is_refused_before_training(tmp_path):
    """vLLM serves GPT-2 only without adapters."""
    refused = findings(tiny_gpt2(tmp_path / "gpt2"), tmp_path)["served"]

    assert not refused.ok
    assert "vLLM serves no LoRA on GPT2LMHeadModel" in refused.seen


def test_without_vllm_the_layers_are_not_checked(llama, tmp_path, monkeypatch):
    """A machine that only trains reports that, and trains."""
    monkeypatch.setattr("counsel.lora_layers._vllm_versions", list)

    found = findings(llama, tmp_path)["served"]
    assert found.ok
    assert found.seen.startswith("not checked: vLLM is not installed here")


def test_check_shows_what_was_read_and_examples_of_what_is_dropped(llama, tmp_path):
    """The format of the file, and for each reason some dropped rows, with the text that caused it."""
    rows = [
        {"Context": f"How do I rest, {n}?", "Response": f"Take one small step today, number {n}."} for n in range(60)
    ]
    rows[4]["Response"] += " See https://help.example.com/x for more."
    path = tmp_path / "t.csv"
    path.write_bytes(
        "".join(f"{a};{b}\r\n" for a, b in [("context", "Response"), *(r.values() for r in rows)]).encode()
    )
    recipe = Recipe(base=str(llama), runs=str(tmp_path), data=str(path), system="listen")

    lines = [str(finding) for finding in checked(recipe)]
    masked = [str(finding) for finding in checked(replace(recipe, contacts="mask"))]

    assert "ok    read as    a table, semicolon between fields, UTF-8; 'context' used as 'Context'" in lines
    dropped = next(line for line in lines if "dropped" in line)
    assert dropped.startswith("ok    dropped    link: 1 (contacts: mask keeps these), such as row 5: ")
    assert "https://help.example.com/x" in dropped
    assert "ok    masked     link: 1" in masked


@pytest.mark.parametrize(
    ("changes", "failed", "message"),
    [
        ({"name": "Not Allowed"}, "name", "not allowed"),
        ({"base": "no-such-base"}, "base", "no base model"),
        ({"rank": 513}, "lora", "rank is 513"),
        ({"target_modules": ("q_proj", "query")}, "targets", "'query', which matches no layer"),
        ({"data": "absent.csv"}, "data", "absent.csv"),
        ({"question_column": "Question"}, "data", "no column 'Question'"),
        ({"max_length": 20}, "rows", "raise max_length"),
        ({"name": "a" * 60, "seeds": (1, 12345)}, "name", "'aaaa"),
        ({"name": "tiny-llama"}, "base", "under which the base is served"),
        (
            {"system": "x" * 8001},
            "system",
            "the system prompt has 8,001 characters, but an adapter is published with at",
        ),
        ({"optim": "adamm"}, "optimizer", "did you mean 'adamw_torch'?"),
        ({"optim": "paged_adamw_8bits"}, "optimizer", "did you mean 'paged_adamw_8bit'"),
        ({"optim": "schedule_free_adamw"}, "optimizer", "does not work here"),
        ({"optim": "galore_adamw"}, "optimizer", "does not work here"),
        ({"store": str(RECIPES / "smoke.yaml")}, "store", "is a file; give a folder"),
        ({"store": str(RECIPES / "smoke.yaml" / "store")}, "store", "is a file; give a folder"),
    ],
)
def test_what_would_fail_later_fails_now(llama, tmp_path, changes, failed, message):
    """Each error is found by its own check, and the message says what to do."""
    found = findings(llama, tmp_path, **changes)

    assert not found[failed].ok
    assert message in found[failed].seen


def test_paths_where_nothing_can_be_written_are_found(llama, tmp_path):
    """A run folder that is a file, or not writable. Without a store, the checks for publishing are skipped."""
    file, closed = tmp_path / "file", tmp_path / "closed"
    file.write_text("x")
    closed.mkdir(mode=0o500)

    assert "is a file; give a folder" in findings(llama, file / "runs")["disk"].seen
    assert findings(llama, tmp_path, store="", system="x" * 9000)["system"].ok
    assert "store" not in findings(llama, tmp_path, store="")
    if os.geteuid() != 0:  # root may write anywhere
        assert "is not writable" in findings(llama, closed / "runs")["disk"].seen
        assert "is not writable" in findings(llama, tmp_path, store=str(closed / "store"))["store"].seen


def test_rows_longer_than_the_base_are_found(llama, tmp_path):
    """Past its positions a base produces noise, or fails in the middle of training."""
    path = tmp_path / "long.jsonl"
    data = with_long_questions(path, 30)
    path.write_text(path.read_text().replace("and so on", "and so on and on"))

    seen = findings(llama, tmp_path, data=data, max_length=4000, max_rows=None)["rows"]

    assert "the base has 1,024 positions: set max_length to at most that" in seen.seen
    assert not seen.ok


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_rows": 0}, r"max_rows is 0; it must be at least 1 \(or none\)"),
        ({"max_rows": -1}, "max_rows is -1"),
        ({"max_steps": -5}, "max_steps is -5; it must be 0 or more"),
        ({"patience": -1}, "patience is -1"),
        ({"samples": -1}, "samples is -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"max_val_rows": 0}, "max_val_rows is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"warmup_ratio": -0.1}, "warmup_ratio is -0.1"),
        ({"val_share": -0.1}, "val_share is -0.1"),
        ({"test_share": float("nan")}, "test_share is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"split_seed": 2**32}, "split_seed is 4294967296"),
        ({"seeds": (1, -2)}, "seeds is -2"),
        ({"seeds": (1, 2, 1)}, "seeds is 1, 2, 1; each seed is one run: give each once"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ("all-linear", "q_proj")}, "give all-linear alone"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; allowed"),
        ({"contacts": "keep"}, "contacts is 'keep'; allowed: drop, mask"),
        ({"attn_implementation": "flash"}, "attn_implementation is 'flash'; allowed"),
        ({"data": ""}, "data is empty; leave it out for 'sample'"),
        ({"base": " "}, "base is empty"),
        ({"runs": ""}, "runs is empty"),
        ({"name": ""}, "name is empty"),
        ({"optim": ""}, "optim is empty"),
        ({"answer_column": "Context"}, "question_column and answer_column are both 'Context'"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_a_value_out_of_range_is_refused_at_once(changes, message):
    """Each number of a recipe has a range; a value outside would train something else, or fail after hours."""
    with pytest.raises(UserError, match=message):
        Recipe(**changes)


def test_the_ends_of_the_ranges_are_allowed():
    """Zero disables: max_steps, patience, samples, weight decay, clipping, dropout, warm-up and held-out rows."""
    Recipe(max_rows=1, max_steps=0, patience=0, samples=0, weight_decay=0.0, max_grad_norm=0.0, dropout=0.0,
           warmup_ratio=0.0, val_share=0.0, test_share=0.0, seed=0, split_seed=2**32 - 1, system="",
           store="")  # fmt: skip


def test_sharding_without_a_gpu_is_refused(monkeypatch):
    """FSDP from accelerate launch is detected; on a CPU, where nothing would be sharded, the run is refused."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert detect_training_hardware().sharded

    with pytest.raises(UserError, match=r"on GPUs only; use train/accelerate/ddp\.yaml"):
        choose_precision(Recipe(), replace(CPU, sharded=True))
    assert choose_precision(Recipe(), replace(GPU, sharded=True)).device == "cuda"


def with_long_questions(path: Path, n_long: int) -> str:
    """The path of 200 rows; `n_long` of them have questions of more than 200 tokens."""
    rows = [
        {
            "Context": f"question {n}" + " and so on" * 100 * (n < n_long),
            "Response": f"breathe and talk to friend {n}",
        }
        for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_few_rows_without_an_answer_are_left_out(llama, tmp_path):
    """Two rows in 200 whose prompt alone fills max_length are counted, and refused by --strict; three are too many."""
    shape = {"max_length": 200, "max_rows": None, "val_share": 0.0, "test_share": 0.0}
    two, three = (with_long_questions(tmp_path / f"{n}.jsonl", n) for n in (2, 3))

    passed = findings(llama, tmp_path, data=two, **shape)["rows"]
    assert passed.ok
    assert "2 left out" in passed.seen
    assert "--strict allows none" in findings(llama, tmp_path, data=two, strict=True, **shape)["rows"].seen
    refused = findings(llama, tmp_path, data=three, **shape)["rows"]
    assert not refused.ok
    assert "more than 1% of the rows; raise max_length" in refused.seen


def test_sdpa_is_refused_for_gemma_2(tmp_path):
    """Gemma 2 caps its attention scores, and sdpa drops the cap; the error asks for eager."""
    base = tiny_base(tmp_path / "tiny-gemma2", "gemma2")

    assert "eager" in findings(base, tmp_path, attn_implementation="sdpa")["attention"].seen
    assert findings(base, tmp_path, attn_implementation="eager")["attention"].ok


def test_packing_without_flash_attention_is_refused_where_asked_for_and_downgraded_where_missing(llama, tmp_path):
    """A recipe that packs with sdpa is wrong on every machine. One that asks for FlashAttention runs, padded."""
    for attention in ("sdpa", "eager"):
        refused = findings(llama, tmp_path, packing=True, attn_implementation=attention)["attention"]
        assert not refused.ok
        assert f"packing with {attention} costs loss; use attn_implementation: flash_attention_2" in refused.seen
    wanted = {"packing": True, "attn_implementation": "flash_attention_2"}
    assert findings(llama, tmp_path, **wanted)["attention"].seen == "sdpa"
    assert findings(llama, tmp_path, hardware=FLASH_GPU, **wanted)["attention"].seen == "flash_attention_2, rows packed"
    with pytest.raises(UserError, match="--strict: asked flash_attention_2, used sdpa"):
        choose_precision(Recipe(**wanted, strict=True), GPU)


@pytest.mark.parametrize(
    ("hardware", "why"),
    [
        (GPU, "the package flash-attn is not installed"),
        (replace(FLASH_GPU, bf16=False), "FlashAttention needs a CUDA card with bfloat16"),
        (CPU, "FlashAttention needs a CUDA card with bfloat16"),
    ],
)
def test_where_flash_attention_is_missing_each_base_gets_an_attention_that_is_right_for_it(hardware, why):
    """sdpa, but eager for Gemma 2, whose cap sdpa drops; what was asked for otherwise stays."""
    capped, plain = Gemma2Config(), LlamaConfig()
    packed = Recipe(attn_implementation="flash_attention_2", packing=True)
    precision = choose_precision(packed, hardware)

    assert (attention_for(precision, capped), attention_for(precision, plain)) == ("eager", "sdpa")
    assert [(d.asked, d.because) for d in precision.downgrades if d.asked == "flash_attention_2"] == [
        ("flash_attention_2", why)
    ]
    assert not precision.packing
    whole = choose_precision(packed, FLASH_GPU)
    assert (attention_for(whole, capped), whole.packing, whole.downgrades) == ("flash_attention_2", True, ())
    assert attention_for(choose_precision(Recipe(attn_implementation="eager"), FLASH_GPU), plain) == "eager"


def test_a_template_that_breaks_the_prompt_is_refused(tmp_path):
    """No end of turn after the answer, two BOS tokens, or a prompt that is not a prefix would train something else."""
    base = tiny_base(tmp_path / "base", "llama")
    template = base / "chat_template.jinja"
    whole = template.read_text()

    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "end-of-turn" in findings(base, tmp_path)["template"].seen

    template.write_text(whole.replace("{{- bos_token -}}", "{{- bos_token -}}{{- bos_token -}}"))
    assert "twice" in findings(base, tmp_path)["template"].seen

    template.write_text("{{ messages | length }}" + whole)
    assert "not a prefix" in findings(base, tmp_path)["template"].seen


def test_too_much_memory_is_refused(llama, tmp_path):
    """The estimate is compared with the memory of the machine."""
    small = TrainHardware("cpu", "a small machine", bf16=True, memory_bytes=1 << 30)

    assert "lower batch_size" in findings(llama, tmp_path, hardware=small)["memory"].seen


def test_a_check_started_by_code_ends_well(llama, tmp_path, monkeypatch, capsys):
    """The hint at the next command is made from sys.argv, which then has other words."""
    from train.__main__ import main

    monkeypatch.setattr("sys.argv", ["a-notebook"])
    words = ["check", "smoke", "--base", str(llama), "--runs", str(tmp_path), "--store", "", "--max-length", "1024"]
    assert main(words) == 0, capsys.readouterr()
