"""The model card of a finished run."""

import shutil

import pytest
import yaml

from counsel.files import read_json, write_json
from tests.tiny import tiny_base
from tests.train_runs import finished_run
from train.recipe import Recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Recipe, dict]:
    """One finished tiny run and its summary."""
    folder = tmp_path_factory.mktemp("work")
    return finished_run(tiny_base(folder / "tiny-llama", "llama"), folder)


def test_the_card_is_filled_from_the_run(finished):
    """It has every section, with the run's numbers, and no placeholder or local path."""
    recipe, summary = finished
    card = (recipe.run_path / "adapter" / "README.md").read_text()

    for section in ("Summary", "Direct use", "Downstream use", "Out-of-scope use", "Bias, risks and limitations",
                    "Recommendations", "How to start", "Training details", "Evaluation"):  # fmt: skip
        assert f"## {section}\n" in card
    assert "rank 4, alpha 8" in card
    assert f"{summary['val_loss_base']:.4f} before, {summary['val_loss']:.4f} after" in card
    assert "More Information Needed" not in card
    assert "crisis" in card
    # The base is a local folder, and the language of the rows is unknown.
    head = card.split("---")[1]
    assert not any(key in head for key in ("base_model:", "language:"))
    assert "license: other" in head
    assert "of tiny-llama, a local model, fine-tuned on" in card
    assert recipe.base not in card


def test_the_card_links_a_hub_base_and_names_the_language_of_the_sample(finished, tmp_path):
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
    """A summary.json as eval writes it (eval/summary.py), with one metric, one yardstick and one warning."""
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


def test_the_card_shows_the_latest_evaluation(finished, tmp_path):
    """Without an evaluation it says so. With two it shows the newer one, and a push sends that card."""
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


def test_the_card_shows_an_evaluation_of_an_earlier_version(finished, tmp_path):
    """Its summary.json has `alarms`, which are the warnings of today."""
    from counsel.run import Run
    from train.card import card_text

    recipe, _ = finished
    run = Run(tmp_path / "tiny")
    shutil.copytree(recipe.run_path, run.path)
    summary = evaluation("20260101T000000Z", 1.5)
    summary["alarms"] = summary.pop("warnings")
    write_json(run.path / "eval" / summary["stamp"] / "summary.json", summary)

    assert "- tiny: 9 of 10 answers were cut" in card_text(run)


def test_the_card_describes_this_run(finished, tmp_path):
    """It has the trained rows, the split and the precision, and has no folder names and no empty system turn."""
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
    assert "trained without a system prompt" in card
    assert "on questions that were not in training" not in card
    assert "4-bit base" in card
    assert "anna" not in card
    assert "| data | talks.csv" in card
    paged["asked"] = "a 4-bit base"
    write_json(run.path / "train.json", summary | {"downgrades": [paged]})
    assert ", 4-bit base" not in card_text(run)
