"""`python -m train` on tiny random models: run directory, store, resume, merge, push, card, check."""

import base64
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from counsel.errors import UserError
from counsel.files import read_json, read_jsonl, write_json, write_jsonl
from counsel.store import find
from tests.held import kill_when_stopped, stopping
from tests.hub_server import Hub
from tests.tiny import WORDS, tiny_base
from train.recipe import Recipe

ROOT = Path(__file__).parent.parent


def short_rows(folder: Path) -> str:
    """The path of 80 short rows to 40 questions: a row of the sample has ten times the tokens, and proves no more."""
    words, draw = WORDS.split(), random.Random(0)
    rows = [
        {"Context": f"{' '.join(draw.choices(words, k=6))} {n}", "Response": " ".join(draw.choices(words, k=12))}
        for n in range(40)
    ]
    rows += [{**row, "Response": " ".join(draw.choices(words, k=12))} for row in rows]
    path = folder / "short.jsonl"
    write_jsonl(path, rows)
    return str(path)


def recipe_for(base: Path, folder: Path, **changes) -> Recipe:
    """A run of eight steps on twenty-four rows, in about a second."""
    return replace(
        Recipe(
            name="tiny",
            base=str(base),
            data=short_rows(folder),
            runs=str(folder / "runs"),
            store=str(folder / "store"),
            max_rows=24,
            max_val_rows=4,
            batch_size=3,
            learning_rate=0.01,
            rank=4,
            alpha=8,
            evaluations=4,
            samples=1,
            max_length=1000,
            system="listen",
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Recipe, dict]:
    """One finished tiny run and its summary."""
    from train.sft import train

    recipe = recipe_for(base, tmp_path_factory.mktemp("work"))
    return recipe, train(recipe)


def test_a_run_leaves_what_the_run_directory_promises(finished):
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


def test_metrics_have_a_row_a_step_and_a_row_an_evaluation(finished):
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


def test_the_card_is_filled_from_the_run(finished):
    """Every section is there, with the run's own numbers and no placeholder or path of this machine."""
    recipe, summary = finished
    card = (recipe.run_path / "adapter" / "README.md").read_text()

    for section in ("Summary", "Direct use", "Downstream use", "Out-of-scope use", "Bias, risks and limitations",
                    "Recommendations", "How to start", "Training details", "Evaluation"):  # fmt: skip
        assert f"## {section}\n" in card
    assert "rank 4, alpha 8" in card
    assert f"{summary['val_loss_base']:.4f} before, {summary['val_loss']:.4f} after" in card
    assert "More Information Needed" not in card
    assert "crisis" in card
    # The base is a folder here, and the rows are nobody's known language.
    head = card.split("---")[1]
    assert not any(key in head for key in ("base_model:", "language:"))
    assert "license: other" in head
    assert "of tiny-llama, a local model, fine-tuned on" in card
    assert recipe.base not in card


def test_the_card_links_a_base_of_the_hub_and_names_the_samples_language(finished, tmp_path):
    """A hub id is linked and named in the card's metadata; the shipped sample is English."""
    from counsel.run import Run
    from train.card import card_text

    recipe, summary = finished
    run = Run(tmp_path / "tiny")
    shutil.copytree(recipe.run_path, run.path)
    report = read_json(run.path / "data" / "report.json")
    write_json(run.path / "data" / "report.json", report | {"source": "sample"})
    base = {"name": "gemma-2-2b-it", "hub_id": "google/gemma-2-2b-it", "license": "gemma"}

    card = card_text(run, summary=summary | {"base": base})

    assert yaml.safe_load(card.split("---")[1]) | {"tags": []} == {
        "base_model": "google/gemma-2-2b-it", "library_name": "peft", "license": "gemma", "language": "en",
        "pipeline_tag": "text-generation", "tags": [],
    }  # fmt: skip
    assert "(rank 4) of [google/gemma-2-2b-it](https://huggingface.co/google/gemma-2-2b-it), fine-tuned" in card
    assert 'from_pretrained("google/gemma-2-2b-it")' in card


def evaluation(stamp: str, value: float) -> dict:
    """A summary.json as eval writes it (eval/summary.py), of one metric, with one yardstick and one alarm."""
    return {
        "format": 1, "run": "tiny", "stamp": stamp, "questions": 10, "samples_per_question": 1, "references": 23,
        "arms": {
            "tiny-llama": {"kind": "base", "rows": 10, "errors": 0, "empty": 0, "cut": 10, "retries": 0, "tokens": 960,
                           "metrics": {"bits_per_byte": {"value": 1.2926, "low": 1.2588, "high": 1.329, "n": 10}}},
            "tiny": {"kind": "adapter", "rows": 10, "errors": 0, "empty": 0, "cut": 9, "retries": 0, "tokens": 940,
                     "metrics": {"bits_per_byte": {"value": value, "low": None, "high": None, "n": 1},
                                 "rouge_1": {"value": 0.332, "low": 0.314, "high": 0.347, "n": 10}}},
            "human": {"kind": "yardstick", "rows": 0, "errors": 0, "empty": 0, "cut": 0, "retries": 0, "tokens": 0,
                      "metrics": {"rouge_1": {"value": 0.4, "low": 0.3, "high": 0.5, "n": 10}}},
        },
        "differences": [], "topics": {}, "seen": {}, "warnings": ["tiny: 9 of 10 answers were cut"], "spec": {},
    }  # fmt: skip


def test_the_card_tells_the_latest_evaluation(finished, tmp_path):
    """Without one it says so; with two, the newer one's values, intervals and warnings; a push sends that card."""
    from counsel.run import Run
    from train.card import card_text
    from train.push import Push, push

    recipe, _ = finished
    run = Run(tmp_path / "tiny")
    shutil.copytree(recipe.run_path, run.path)
    assert "No evaluation of generated answers was run." in card_text(run)
    for stamp, value in (("20260101T000000Z", 1.5), ("20260102T000000Z", 1.1474)):
        write_json(run.path / "eval" / stamp / "summary.json", evaluation(stamp, value))

    push(Push(str(run.path), "org/gentle", dry_run=True))

    card = (run.path / "adapter" / "README.md").read_text().partition("## Evaluation\n")[2]
    assert "10 held-out questions (evaluation 20260102T000000Z)" in card
    assert "| metric | tiny-llama | tiny |\n|---|---|---|\n" in card
    assert "| bits per byte | 1.29 (1.26 to 1.33) | 1.15 |\n| rouge 1 | - | 0.332 (0.314 to 0.347) |\n" in card
    assert "- tiny: 9 of 10 answers were cut" in card
    assert "No evaluation" not in card


def test_rows_without_an_answer_are_left_out_and_said(base, tmp_path, capsys):
    """One row in a hundred has a prompt that fills max_length: the summary, the card and a line say so."""
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
    """Six rows learnt by heart: validation loss falls, then rises; two evaluations later the run ends, at its best."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.training import mean_answer_loss
    from counsel.run import Run
    from train.sft import evenly_spaced, examples, train

    recipe = recipe_for(base, tmp_path, max_rows=6, max_val_rows=8, epochs=30.0, evaluations=15, patience=2,
                        learning_rate=0.02, samples=0, store="")  # fmt: skip
    done = train(recipe)

    logged = read_jsonl(recipe.run_path / "metrics.jsonl")
    val = {row["step"]: row["val_loss"] for row in logged if "val_loss" in row}
    best = min(val, key=val.get)
    # Two steps an epoch, sixty in all; an evaluation every four.
    assert 0 < best < done["steps"] == best + 8 < 60
    assert (done["best_step"], done["val_loss"]) == (best, val[best])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kept = PeftModel.from_pretrained(plain, str(recipe.run_path / "adapter"))
    rows = examples(evenly_spaced(Run(recipe.run_path).split("val"), 8), recipe.system)
    found = mean_answer_loss(kept, AutoTokenizer.from_pretrained(base), rows, recipe.max_length)
    # In bfloat16 both losses carry some noise; what tells the checkpoints apart is larger.
    assert abs(found - val[best]) < (val[done["steps"]] - val[best]) / 2


def test_an_existing_run_is_not_touched(finished):
    """Without --resume or --overwrite the run is refused, and the message names both."""
    from train.sft import train

    recipe, summary = finished
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        train(recipe)
    with pytest.raises(UserError, match="finished"):
        train(replace(recipe, resume=True))
    assert read_json(recipe.run_path / "train.json") == json.loads(json.dumps(summary))


def test_bad_data_leaves_nothing(base, tmp_path):
    """A missing data file is one line, and no run directory is left."""
    from train.sft import train

    with pytest.raises(UserError, match=r"data: .*absent\.csv"):
        train(recipe_for(base, tmp_path, data=str(tmp_path / "absent.csv")))
    assert not (tmp_path / "runs").exists()


def run_command(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def flags_of(recipe: Recipe) -> list[str]:
    plain = Recipe()
    changed = {key.replace("_", "-"): value for key, value in vars(recipe).items() if value != getattr(plain, key)}
    return [
        (f"--{key}" if value else f"--no-{key}") if isinstance(value, bool) else f"--{key}={value}"
        for key, value in changed.items()
    ]


@pytest.mark.slow
def test_a_run_killed_with_9_resumes_to_the_same_losses(base, tmp_path):
    """Killed in the middle and resumed, a run logs the same losses at the same steps as one that was left alone."""
    from train.sft import train

    settings = {"dropout": 0.1, "epochs": 4.0, "evaluations": 8, "samples": 0, "store": ""}
    whole = recipe_for(base, tmp_path, name="whole", **settings)
    killed = recipe_for(base, tmp_path, name="killed", **settings)
    train(whole)
    # Two steps beyond the checkpoint of step 12: what these logged is to be forgotten and logged again.
    in_step_14 = stopping("train", "train.progress", "Progress.on_log", "given[1].global_step == 14")
    kill_when_stopped(run_command("-c", in_step_14, *flags_of(killed)))
    assert (killed.run_path / "checkpoints" / "checkpoint-12" / "trainer_state.json").exists()
    assert read_jsonl(killed.run_path / "metrics.jsonl")[-1]["step"] == 14
    assert not (killed.run_path / "train.json").exists()

    train(replace(killed, resume=True))

    assert losses(killed) == losses(whole)
    assert read_json(killed.run_path / "train.json")["val_loss"] == read_json(whole.run_path / "train.json")["val_loss"]


def test_resume_refuses_other_settings(base, tmp_path):
    """A resumed run must be the same run: the first changed setting is named."""
    from train.resume import check_run_directory, opened_run

    recipe = recipe_for(base, tmp_path)
    with opened_run(recipe):
        pass

    check_run_directory(replace(recipe, resume=True))
    with pytest.raises(UserError, match=r"rank is 8, but run 'tiny' was started with 4"):
        check_run_directory(replace(recipe, resume=True, rank=8))


def test_the_merged_folder_answers_as_base_and_adapter(finished, tmp_path):
    """The folder loads with AutoModelForCausalLM alone, and its greedy text is that of base plus adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train.merge import Merge, merge
    from train.progress import greedy_answers

    recipe, _ = finished
    out = tmp_path / "merged"
    merge(Merge(str(recipe.run_path), out=str(out), dtype="float32"))

    tokenizer = AutoTokenizer.from_pretrained(out)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in ("I feel lonely", "work is hard", "what can help me sleep")
    ]
    plain = AutoModelForCausalLM.from_pretrained(recipe.base, dtype=torch.float32)
    untuned = greedy_answers(plain, tokenizer, prompts, 24)
    adapted = PeftModel.from_pretrained(plain, str(recipe.run_path / "adapter"))
    expected = greedy_answers(adapted, tokenizer, prompts, 24)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

    assert greedy_answers(merged, tokenizer, prompts, 24) == expected != untuned


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.held = [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_sends_adapter_tokenizer_and_card(finished, hub, monkeypatch):
    """What arrives at the hub is the adapter, its config, the tokenizer and the card, and nothing else."""
    from train.push import Push, push

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    done = push(Push(str(recipe.run_path), "org/gentle"))

    commit = next(body for path, _, body in hub.seen if "/commit/" in path)
    sent = {json.loads(line)["value"].get("path") for line in commit.splitlines()} - {None}
    assert sent == {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json",
                    "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert done["sent"]
    # The base is a folder of this machine: the card passes the hub's check, and no path leaves.
    assert any(path.endswith("/api/validate-yaml") for path, _, _ in hub.seen)
    told = b"".join(base64.b64decode(json.loads(line)["value"].get("content", "")) for line in commit.splitlines())
    assert b'"base_model_name_or_path": "tiny-llama"' in told
    assert recipe.base.encode() not in told


def test_a_hub_that_never_answers_is_one_line(finished, hub, monkeypatch):
    """The push ends with a line that says so, and does not wait for ever."""
    from train import push as pushing

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(pushing, "ANSWER_S", 0.2)
    hub.held = threading.Event()
    try:
        with pytest.raises(UserError, match=r"the hub at http://127\.0\.0\.1:\d+ did not answer within 0\.2 s"):
            pushing.push(pushing.Push(str(recipe.run_path), "org/gentle"))
    finally:
        hub.held.set()


def test_a_card_that_the_hub_refuses_is_one_line(finished, hub, monkeypatch):
    """What the hub's check says is told."""
    from train import push as pushing

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(pushing, "card_text", lambda run, merged: "---\nbase_model: /home/ada/base\n---\n")

    with pytest.raises(UserError, match=r"did not take 'org/gentle': ValueError: Invalid metadata.*must be an id"):
        pushing.push(pushing.Push(str(recipe.run_path), "org/gentle"))


def test_dry_run_sends_nothing(finished, hub, monkeypatch, capsys):
    """--dry-run lists the files and opens no connection."""
    from train.push import Push, push

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    done = push(Push(str(recipe.run_path), "org/gentle", dry_run=True))

    assert hub.seen == []
    assert not done["sent"]
    assert "adapter_model.safetensors" in capsys.readouterr().out


def test_a_refused_push_never_shows_the_token(finished, hub, monkeypatch):
    """A wrong token is one line that does not contain it; a missing one says which variable to set."""
    from train.push import Push, push

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    with pytest.raises(UserError) as refusal:
        push(Push(str(recipe.run_path), "org/gentle"))
    assert "hf_wrong_one" not in str(refusal.value)

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"):
        push(Push(str(recipe.run_path), "org/gentle"))


def test_seeds_give_mean_and_spread(base, tmp_path):
    """Two seeds are two runs; the mean and the standard deviation are those of their validation losses."""
    from train.experiments import train_seeds

    done = train_seeds(recipe_for(base, tmp_path, seeds=(1, 2), samples=0, max_steps=2, evaluations=1, store=""))

    one, two = (read_json(tmp_path / "runs" / f"tiny-s{seed}" / "train.json")["val_loss"] for seed in (1, 2))
    assert one != two
    assert done["val_loss_mean"] == pytest.approx((one + two) / 2, abs=1e-5)
    assert done["val_loss_sd"] == pytest.approx(abs(one - two) / 2**0.5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_train_one_adapter(base, tmp_path):
    """accelerate launch with two CPU processes: half the steps for the same rows, one adapter, one result line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.training import mean_answer_loss
    from counsel.run import Run
    from train.sft import evenly_spaced, examples

    # Seven validation rows in threes: the last round of two processes would be filled with five rows seen before.
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_merge_replaces_an_earlier_merge_and_nothing_else(finished, tmp_path):
    """--overwrite refuses the run itself, a folder with a file of one's own, and a link; a second merge replaces."""
    from train.merge import Merge, merge

    recipe, _ = finished
    run, other, link, merged = recipe.run_path, tmp_path / "other", tmp_path / "link", tmp_path / "merged"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    link.symlink_to(other)
    before = contents(run)
    for out in (run, run / "adapter", other, link, other / "notes.txt"):
        with pytest.raises(UserError, match="no earlier merge"):
            merge(Merge(str(run), out=str(out), overwrite=True))
    assert contents(run) == before
    assert contents(other) == {"notes.txt": b"mine"}

    merge(Merge(str(run), out=str(merged), dtype="float32"))
    with pytest.raises(UserError, match="--overwrite"):
        merge(Merge(str(run), out=str(merged)))
    merge(Merge(str(run), out=str(merged), overwrite=True))
    assert read_json(merged / "config.json")["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "merged", "other"]
    (merged / "model.gguf").write_bytes(b"converted")
    with pytest.raises(UserError, match=r"also holds 'model\.gguf'"):
        merge(Merge(str(run), out=str(merged), overwrite=True))


def test_a_merge_that_fails_leaves_the_earlier_one(finished, tmp_path, monkeypatch):
    """The earlier folder goes only when the new one is whole."""
    from train import merge as module
    from train.merge import Merge, merge

    recipe, _ = finished
    out = tmp_path / "merged"
    merge(Merge(str(recipe.run_path), out=str(out)))
    before = contents(out)

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "card_text", full)
    with pytest.raises(UserError, match="No space left"):
        merge(Merge(str(recipe.run_path), out=str(out), overwrite=True))
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_the_merge_reports_on_what_it_wrote(finished, tmp_path):
    """The largest difference is that of the folder, loaded again, from base and adapter in fp32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train.merge import Merge, merge, next_logits

    recipe, _ = finished
    done = merge(Merge(str(recipe.run_path), out=str(tmp_path / "merged")))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(recipe.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, str(recipe.run_path / "adapter"))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = next_logits(adapted, tokenizer, recipe.system) - next_logits(written, tokenizer, recipe.system)
    assert done["largest_logit_difference"] == pytest.approx(float(expected.abs().max()), abs=1e-5)


def test_a_base_whose_layers_mix_rows_is_trained_by_trl(base, tmp_path, capsys):
    """LFM2 with convolutions: the run says why it does not take the fast path, and its validation loss is exact."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.training import mean_answer_loss
    from counsel.run import Run
    from tests.families import tiny_config
    from tests.tiny import tiny_tokenizer
    from train.sft import evenly_spaced, examples, train

    tokenizer, config = tiny_tokenizer(), tiny_config("lfm2")
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 1024
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for target in (model, tokenizer):
        target.save_pretrained(tmp_path / "lfm2")
    recipe = recipe_for(tmp_path / "lfm2", tmp_path, max_steps=2, evaluations=1, samples=0, store="")

    done = train(recipe)

    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("path"))
    assert re.match(r"path +TRL, because the fast path's loss is .* the model's own is", said), said
    assert not done["fast_loss"]
    rows = examples(evenly_spaced(Run(recipe.run_path).split("val"), 4), recipe.system)
    expected = mean_answer_loss(model.to(torch.bfloat16), tokenizer, rows, recipe.max_length)
    assert done["val_loss_base"] == pytest.approx(expected, rel=2e-2)


def test_overwrite_removes_a_run_only(finished, tmp_path):
    """What is no run stays, and so does a run that holds what the new one is made from."""
    from train.resume import check_run_directory

    recipe, _ = finished
    other = tmp_path / "runs" / "tiny"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    run = recipe.run_path
    inside = {"data": str(run / "data" / "train.jsonl"), "base": str(run / "adapter"), "store": str(run / "adapter")}

    with pytest.raises(UserError, match="no earlier run"):
        check_run_directory(replace(recipe, runs=str(tmp_path / "runs"), overwrite=True))
    for key, value in inside.items():
        with pytest.raises(UserError, match=f"{key} is .* inside the run"):
            check_run_directory(replace(recipe, overwrite=True, **{key: value}))
    check_run_directory(replace(recipe, overwrite=True))


def test_overwrite_with_bad_data_keeps_the_run(finished, tmp_path):
    """The earlier run goes when the new one's data is whole, and not before."""
    from train.resume import opened_run

    recipe, _ = finished
    before = contents(recipe.run_path)
    gone = replace(recipe, overwrite=True, data=str(tmp_path / "absent.csv"))
    with pytest.raises(UserError, match="absent"), opened_run(gone):
        pass
    assert contents(recipe.run_path) == before | {".lock": b""}


def test_one_process_trains_a_run(base, tmp_path):
    """While a run is trained, neither --resume nor --overwrite begins; when it has ended, either does."""
    from train.resume import opened_run

    recipe = recipe_for(base, tmp_path)
    again = [replace(recipe, resume=True), replace(recipe, overwrite=True)]
    with opened_run(recipe):
        before = contents(recipe.run_path)
        for other in again:
            with pytest.raises(UserError, match="being trained by another process"), opened_run(other):
                pass
        assert contents(recipe.run_path) == before
    for other in again:
        with opened_run(other), pytest.raises(UserError, match="another process"), opened_run(again[0]):
            pass


def losses(recipe: Recipe) -> list[tuple]:
    return [(r["step"], r.get("loss"), r.get("val_loss"), r["tokens"])
            for r in read_jsonl(recipe.run_path / "metrics.jsonl")]  # fmt: skip


def interrupt_at(monkeypatch, step: int) -> None:
    """Press Ctrl-C when that step is logged, once."""
    from train.progress import Progress

    whole, pressed = Progress.on_log, []

    def on_log(self, args, state, *given, **named):
        whole(self, args, state, *given, **named)
        if state.global_step == step and not pressed:
            pressed.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "on_log", on_log)


@pytest.mark.parametrize("fast", [True, False])
def test_ctrl_c_saves_and_the_line_it_prints_goes_on(base, tmp_path, monkeypatch, capsys, fast):
    """Stopped in its second epoch and resumed by the command that it names, a run sees the rows of one left alone."""
    from counsel.cli import main
    from train.__main__ import COMMANDS
    from train.sft import train

    same = {"group_by_length": True, "epochs": 2.0, "evaluations": 2, "samples": 0, "store": "", "fast_cpu": fast}
    whole, stopped = (recipe_for(base, tmp_path, name=name, **same) for name in ("whole", "stopped"))
    train(whole)
    interrupt_at(monkeypatch, 10)

    assert main("train", COMMANDS, flags_of(stopped)) == 130

    line = capsys.readouterr().err.splitlines()[-1]
    # The step that was running when the key was pressed is finished first.
    assert line.startswith("stopped at step 11 of 16, with a checkpoint; go on with python -m train ")
    assert main("train", COMMANDS, line.partition("python -m train ")[2].split()) == 0
    assert losses(stopped) == losses(whole)


def test_a_damaged_checkpoint_is_left_out(base, tmp_path, monkeypatch, capsys):
    """Whichever file of the newest checkpoint is cut short or empty, the one before it is taken, and it is said."""
    from counsel.run import Run
    from train.resume import last_checkpoint
    from train.sft import train

    recipe = recipe_for(base, tmp_path, samples=0, store="", evaluations=8)
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    newest = last_checkpoint(Run(recipe.run_path))
    files = [path.name for path in newest.iterdir()]
    assert {"optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"} <= set(files)
    for number, name in enumerate(files):
        run = Run(tmp_path / f"copy{number}")
        shutil.copytree(recipe.run_path, run.path)
        broken = run.path / "checkpoints" / newest.name / name
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size * (number % 2) // 2])
        capsys.readouterr()

        found = last_checkpoint(run)

        assert found is not None
        assert found.name < newest.name
        said = capsys.readouterr().err
        assert f"{newest.name} is left out" in said
        assert f"from {found.name}" in said


@pytest.mark.parametrize(("changes", "ended"), [({}, 8), ({"epochs": 30.0, "evaluations": 15, "patience": 2,
                                                          "max_rows": 6, "learning_rate": 0.02}, None)])  # fmt: skip
def test_a_run_that_had_ended_trains_no_further(base, tmp_path, monkeypatch, changes, ended):
    """Killed after its last step, or after early stopping, a run is finished with the adapter and figures it had."""
    from train import sft

    settings = {"samples": 0, "store": "", "max_val_rows": 8, **changes}
    whole, killed = (recipe_for(base, tmp_path, name=name, **settings) for name in ("whole", "killed"))
    expected = sft.train(whole)

    def kill(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(sft, "finish", kill)
        with pytest.raises(RuntimeError, match="killed"):
            sft.train(killed)
    done = sft.train(replace(killed, resume=True))

    assert expected["steps"] == (ended or expected["steps"]) < 60
    same = ("steps", "epochs", "best_step", "val_loss", "val_loss_base", "train_loss_last", "tokens", "postflight")
    assert {key: done[key] for key in same} == {key: expected[key] for key in same}
    assert losses(killed) == losses(whole)
    assert done["tokens_per_s"] > 0


@pytest.mark.parametrize("limit", [25_000, 50_000])
def test_a_full_disk_is_one_line(base, tmp_path, limit):
    """A checkpoint that does not fit, by the adapter or by the optimizer's state, ends the run with what to do."""
    import resource

    from train.sft import train

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the checkpoint of step 2 .*--resume"):
            train(recipe_for(base, tmp_path, samples=0, store=""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_validation_rows_without_an_answer_are_said(base, tmp_path, capsys):
    """Cut to nothing, they are counted; where none is left the run is refused before it begins."""
    from train.data import DataConfig, prepare
    from train.sft import train

    # A question's place depends on its text alone: long ones stay where they are in validation.
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


def test_seeds_go_on_and_need_no_validation(base, tmp_path):
    """With --resume finished seeds are read, others trained; without validation rows there is no mean."""
    from train.experiments import train_seeds

    recipe = recipe_for(base, tmp_path, seeds=(1,), samples=0, max_steps=2, evaluations=1, store="", val_share=0.0)
    first = train_seeds(recipe)
    assert (first["val_loss_mean"], first["val_loss_sd"], first["val_losses"]) == (None, None, [])
    before = contents(tmp_path / "runs" / "tiny-s1")

    both = train_seeds(replace(recipe, seeds=(1, 2), resume=True))

    assert both["n"] == 2
    assert contents(tmp_path / "runs" / "tiny-s1") == before
    assert (tmp_path / "runs" / "tiny-s2" / "train.json").is_file()
    with pytest.raises(UserError, match="rank is 8"):
        train_seeds(replace(recipe, seeds=(1, 2), resume=True, rank=8))


def test_the_card_says_what_this_run_was(finished, tmp_path):
    """Rows trained on, the split's kind, no folders, no empty system turn, 4 bits beside another downgrade."""
    from counsel.run import Run
    from train.card import card_text

    recipe, _ = finished
    run = Run(tmp_path / "tiny")
    shutil.copytree(recipe.run_path, run.path)
    summary, config, report = (read_json(run.path / name) for name in ("train.json", "config.json", "data/report.json"))
    assert "trained on 24 |" in card_text(run)
    assert "on questions that were not in training" in card_text(run)
    paged = {"asked": "paged_adamw_8bit", "used": "adamw_torch_fused", "because": "of this"}
    write_json(run.path / "config.json", config | {"system": "", "split": "row", "load_in_4bit": True})
    write_json(run.path / "train.json", summary | {"downgrades": [paged]})
    write_json(run.path / "data" / "report.json", report | {"source": "patients/anna/talks.csv"})

    card = card_text(run)

    assert 'messages = [{"role": "user", "content": "Work overwhelms me."}]' in card
    assert "trained without a system text" in card
    assert "on questions that were not in training" not in card
    assert "4-bit base" in card
    assert "anna" not in card
    assert "| data | talks.csv" in card
    paged["asked"] = "a 4-bit base"
    write_json(run.path / "train.json", summary | {"downgrades": [paged]})
    assert ", 4-bit base" not in card_text(run)


def test_what_is_published_names_no_folder_of_this_machine(finished):
    """The adapter's config names a local base by its folder's name, and its tokenizer pads on no side."""
    recipe, _ = finished
    adapter = recipe.run_path / "adapter"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == "tiny-llama"
    assert read_json(adapter / "tokenizer.json")["padding"] is None
    assert str(Path(recipe.base).parent) not in (adapter / "tokenizer_config.json").read_text()


def test_precision_is_the_machines_whatever_the_launcher_says(base, tmp_path, monkeypatch):
    """Without bfloat16 hardware nothing is computed in it: the loss before training is that of the base in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from counsel.run import Run
    from train import sft

    here = sft.machine()
    monkeypatch.setattr(sft, "machine", lambda: replace(here, bf16=False))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    recipe = recipe_for(base, tmp_path, max_steps=2, evaluations=1, samples=0, store="", fast_cpu=False)

    done = sft.train(recipe)

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for row in sft.examples(sft.evenly_spaced(Run(recipe.run_path).split("val"), 4), recipe.system):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += ids.shape[1] - len(prompt)
    assert done["val_loss_base"] == pytest.approx(total / count, rel=1e-5)
