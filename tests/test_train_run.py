"""A training run on a tiny random model: its files, rows, losses and precision."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.files import read_json, read_jsonl, write_jsonl
from counsel.store import find
from tests.tiny import tiny_base
from tests.train_runs import finished_run, flags_of, losses, recipe_for, run_command
from train.recipe import Recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Recipe, dict]:
    """One finished tiny run and its summary."""
    return finished_run(base, tmp_path_factory.mktemp("work"))


def test_a_run_writes_the_files_of_a_run_directory(finished):
    """Config, provenance, data, metrics, curve, adapter and summary are there; checkpoints and pickles are not."""
    recipe, summary = finished
    run = recipe.run_path

    assert read_json(run / "config.json")["rank"] == 4
    assert read_json(run / "provenance.json")["machine"]["device"] in ("cpu", "cuda")
    assert read_json(run / "train.json") == json.loads(json.dumps(summary))
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not (run / "checkpoints").exists()
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert not kinds & {".bin", ".pt", ".pth", ".pkl"}


def test_metrics_have_one_row_per_step_and_per_evaluation(finished):
    """Eight steps and five evaluations (one before the first step); tokens grow; the loss falls."""
    recipe, summary = finished
    rows = read_jsonl(recipe.run_path / "metrics.jsonl")
    steps, checks = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]

    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["step"] for row in checks] == [0, 2, 4, 6, 8]
    assert [r["tokens"] for r in steps] == sorted({r["tokens"] for r in steps})
    assert summary["tokens"] == steps[-1]["tokens"]
    assert summary["val_loss"] == min(row["val_loss"] for row in checks[1:]) < checks[0]["val_loss"]
    samples = read_jsonl(recipe.run_path / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 2, 4, 6, 8]


def test_the_adapter_is_published_with_its_prompt(finished):
    """The store holds the version that the summary names, with base, rank and system prompt."""
    recipe, summary = finished
    manifest = find(Path(recipe.store), "tiny")

    assert manifest.id == summary["adapter"]
    assert manifest.rank == 4
    assert manifest.prompt == {"system": recipe.system}
    assert manifest.run == "tiny"


def test_rows_without_an_answer_are_left_out_and_reported(base, tmp_path, capsys):
    """One prompt in a hundred fills max_length; the summary, the card and stderr report it."""
    from train.sft import train

    rows = [
        {
            "Context": f"question {n}" + " and so on" * 100 * (n == 7),
            "Response": f"breathe and talk to friend {n}",
        }
        for n in range(100)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(base, tmp_path, data=str(data), max_length=200, max_rows=None, val_share=0.0, test_share=0.0,
                        max_steps=2, store="")  # fmt: skip

    done = train(recipe)

    assert (done["rows"], done["rows_left_out"]) == (99, 1)
    assert "1 of 100 training rows left out" in capsys.readouterr().err
    assert "Left out of training: 1 rows" in (recipe.run_path / "adapter" / "README.md").read_text()


def test_early_stopping_keeps_the_best_checkpoint(base, tmp_path):
    """The model memorizes six rows: validation loss falls, then rises; two evaluations later the run keeps its best."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.training import mean_answer_loss
    from counsel.run import Run
    from train.data import evenly_spaced
    from train.prompts import examples
    from train.sft import train

    recipe = recipe_for(base, tmp_path, max_rows=6, max_val_rows=8, epochs=30.0, evaluations=15, patience=2,
                        learning_rate=0.02, samples=0, store="")  # fmt: skip
    done = train(recipe)

    logged = read_jsonl(recipe.run_path / "metrics.jsonl")
    val = {row["step"]: row["val_loss"] for row in logged if "val_loss" in row}
    best = min(val, key=val.get)
    # Two steps per epoch, sixty in total; an evaluation every four.
    assert 0 < best < done["steps"] == best + 8 < 60
    assert (done["best_step"], done["val_loss"]) == (best, val[best])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kept = PeftModel.from_pretrained(plain, str(recipe.run_path / "adapter"))
    rows = examples(evenly_spaced(Run(recipe.run_path).split("val"), 8), recipe.system)
    loss = mean_answer_loss(kept, AutoTokenizer.from_pretrained(base), rows, recipe.max_length)
    # Both losses have bfloat16 noise, but checkpoints differ by more.
    assert abs(loss - val[best]) < (val[done["steps"]] - val[best]) / 2


def test_bad_data_leaves_nothing(base, tmp_path):
    """A missing data file is a one-line error, and no run directory is made."""
    from train.sft import train

    with pytest.raises(UserError, match=r"data: .*absent\.csv"):
        train(recipe_for(base, tmp_path, data=str(tmp_path / "absent.csv")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_processes_train_one_adapter(base, tmp_path):
    """accelerate launch with two CPU processes: half the steps for the same rows, one adapter, one result line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.training import mean_answer_loss
    from counsel.run import Run
    from train.data import evenly_spaced
    from train.prompts import examples
    from train.sft import train

    # Seven validation rows in batches of three: two processes would fill the last round with five repeated rows.
    recipe = recipe_for(base, tmp_path, samples=0, max_val_rows=7, val_share=0.2)
    process = run_command("-m", "accelerate.commands.launch", "--config_file", "train/accelerate/ddp.yaml",
                          "--main_process_port", "0",
                          "-m", "train", *flags_of(recipe), OMP_NUM_THREADS="1")  # fmt: skip
    out, err = process.communicate(timeout=1800)

    assert process.returncode == 0, err[-2000:]
    document = json.loads(out.splitlines()[-1])
    assert document["steps"] == 4
    assert find(tmp_path / "store", "tiny").id == document["adapter"]
    assert len(re.findall(r'"adapter": "tiny@', out)) == 1
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, read_json(recipe.run_path / "provenance.json")["dtype"])
    )
    rows = examples(evenly_spaced(Run(recipe.run_path).split("val"), 7), recipe.system)
    assert len(rows) == 7
    expected = mean_answer_loss(plain, AutoTokenizer.from_pretrained(base), rows, recipe.max_length)
    assert document["val_loss_base"] == pytest.approx(expected, rel=1.5e-3)  # bfloat16
    # Two processes with a batch each make the steps of one process with two batches.
    one = replace(recipe, runs=str(tmp_path / "one"), store="", gradient_accumulation_steps=2)
    assert train(one)["val_loss"] == pytest.approx(document["val_loss"], rel=0.01)
    shared, alone = ([loss for _, loss, *_ in losses(each) if loss is not None] for each in (recipe, one))
    assert shared == pytest.approx(alone, rel=0.01)


def test_a_base_whose_layers_mix_rows_is_trained_by_trl(base, tmp_path, capsys):
    """LFM2 with convolutions: the run says why it does not take the fast path, and its validation loss is exact."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.training import mean_answer_loss
    from counsel.run import Run
    from tests.families import tiny_config
    from tests.tiny import tiny_tokenizer
    from train.data import evenly_spaced
    from train.prompts import examples
    from train.sft import train

    tokenizer, config = tiny_tokenizer(), tiny_config("lfm2")
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 1024
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for target in (model, tokenizer):
        target.save_pretrained(tmp_path / "lfm2")
    recipe = recipe_for(tmp_path / "lfm2", tmp_path, max_steps=2, evaluations=1, samples=0, store="")

    done = train(recipe)

    path = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("path"))
    assert re.match(r"path +TRL, because the fast path's loss is .* the model's own is", path), path
    assert not done["fast_loss"]
    rows = examples(evenly_spaced(Run(recipe.run_path).split("val"), 4), recipe.system)
    expected = mean_answer_loss(model.to(torch.bfloat16), tokenizer, rows, recipe.max_length)
    assert done["val_loss_base"] == pytest.approx(expected, rel=2e-2)


def test_validation_rows_without_an_answer_are_reported(base, tmp_path, capsys):
    """Validation rows cut to nothing are counted; if none is left, the run is refused before it starts."""
    from train.data import DataConfig, prepare
    from train.sft import train

    # A question's split depends only on its text, so the long ones of validation stay there.
    rows = [
        {
            "Context": f"question {n}" + " and so on" * 100 * (n % 5 == 0),
            "Response": f"breathe and talk {n} to a friend",
        }
        for n in range(100)
    ]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    splits, _ = prepare(DataConfig(data=str(path), val_share=0.3, test_share=0.0))
    val = {row["question"] for row in splits["val"]}
    write_jsonl(path, [row for n, row in enumerate(rows) if n % 5 or row["Context"] in val])
    recipe = recipe_for(base, tmp_path, data=str(tmp_path / "rows.jsonl"), max_length=200, max_steps=2, evaluations=1,
                        max_val_rows=99, samples=0, store="", val_share=0.3, test_share=0.0)  # fmt: skip

    done = train(recipe)

    val = read_jsonl(recipe.run_path / "data" / "val.jsonl")
    left_out = sum(len(row["question"]) > 900 for row in val)
    assert done["val_rows_left_out"] == left_out > 0
    assert f"{left_out} of {len(val)} validation rows left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"each of the \d+ validation rows"):
        train(replace(recipe, name="short", max_length=20))


def test_the_machine_decides_the_precision_not_the_launcher(base, tmp_path, monkeypatch):
    """Without bfloat16 hardware, nothing uses bfloat16: the loss before training is that of the base in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from counsel.run import Run
    from train import sft
    from train.data import evenly_spaced
    from train.prompts import examples

    hardware = sft.detect_training_hardware()
    monkeypatch.setattr(sft, "detect_training_hardware", lambda: replace(hardware, bf16=False))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    recipe = recipe_for(base, tmp_path, max_steps=2, evaluations=1, samples=0, store="", fast_cpu=False)

    done = sft.train(recipe)

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for row in examples(evenly_spaced(Run(recipe.run_path).split("val"), 4), recipe.system):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += ids.shape[1] - len(prompt)
    assert done["val_loss_base"] == pytest.approx(total / count, rel=1e-5)
