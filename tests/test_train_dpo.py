"""Training on preference pairs: the reference, what is learned, what is measured, stopping and resuming."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from counsel import store
from counsel.errors import UserError
from counsel.files import read_json, read_jsonl, write_jsonl
from tests.preference_pairs import planted
from tests.tiny import tiny_base
from tests.train_runs import interrupt_at, recipe_for
from train.preferences.recipe import PreferenceRecipe
from train.recipe import Recipe


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Recipe:
    """A finished fine-tuning, published as `tiny`: the adapter that the preferences train further."""
    from train.sft import train

    base = tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
    recipe = recipe_for(base, tmp_path_factory.mktemp("work"), max_steps=4, evaluations=1, samples=0)
    train(recipe)
    return recipe


def held_out(run: Recipe) -> dict[str, str]:
    """{id: question} of what a fine-tuning held out."""
    rows = [row for name in ("val", "test") for row in read_jsonl(run.run_path / "data" / f"{name}.jsonl")]
    return {row["question_id"]: row["question"] for row in rows}


def preference_recipe(first: Recipe, folder: Path, trait: str, n: int = 72, **changes) -> PreferenceRecipe:
    """A preference training on planted pairs, and on one for each question that `first` holds out."""
    data = folder / f"{trait}.jsonl"
    rows = planted(n, trait)
    write_jsonl(
        data, rows + [row | {"prompt": text} for row, text in zip(rows, held_out(first).values(), strict=False)]
    )
    settings = {
        "name": trait, "base": first.base, "init_adapter": "tiny", "data": str(data), "runs": first.runs, "store": "",
        "held_out_share": 0.4, "learning_rate": 0.005, "epochs": 3.0, "batch_size": 8, "samples": 2, "max_length": 256,
        "checkpoints": 3,
    }  # fmt: skip
    return PreferenceRecipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def shorter(first, tmp_path_factory) -> tuple[PreferenceRecipe, dict]:
    """A finished preference training in which the shorter answer was always chosen, published as `shorter`."""
    from train.preferences.dpo import train_preferences

    recipe = preference_recipe(first, tmp_path_factory.mktemp("pairs"), "shorter", store=first.store)
    return recipe, train_preferences(recipe)


def test_the_reference_is_the_initial_adapter(first, shorter):
    """The first loss is exactly log 2 and its margin 0, which would not hold against the base."""
    import torch

    recipe, summary = shorter
    step = read_jsonl(recipe.run_path / "metrics.jsonl")[0]

    assert step["loss"] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-7)
    assert step["reward_margin"] == 0
    assert summary["train_loss_last"] < math.log(2) / 2
    assert summary["postflight"]["largest_logit_change"] > 0


def test_the_reference_stays_as_it_was(first, tmp_path):
    """After training, the frozen copy still has the weights of the initial adapter, and only they are not saved."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from counsel import catalog
    from counsel.run import Run
    from train import init_adapter
    from train.hardware import choose_precision, detect_training_hardware
    from train.preferences.dpo import build_trainer
    from train.preferences.pairs import read_preferences, split

    recipe = preference_recipe(first, tmp_path, "feeling", runs=str(tmp_path), max_steps=2)
    for name, pairs in zip(("train", "held_out"), split(read_preferences(recipe.data)[0], 0.4, 0), strict=True):
        write_jsonl(recipe.run_path / "data" / "preferences" / f"{name}.jsonl", [pair.document() for pair in pairs])
    found = init_adapter.find_init_adapter(replace(recipe, store=first.store))
    base, precision = catalog.resolve(recipe.base), choose_precision(recipe, detect_training_hardware())
    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    trainer, _, _ = build_trainer(recipe, precision, base, Run(recipe.run_path), found, tokenizer)

    trainer.train()

    initial = load_file(found.folder / "adapter_model.safetensors")
    weights = dict(trainer.model.named_parameters())
    assert max(value.abs().max() for key, value in initial.items() if "lora_B" in key) > 0
    for key, value in initial.items():
        reference, trained = (weights[key.replace(".weight", f".{name}.weight")] for name in ("ref", "default"))
        assert reference.equal(value.to(reference.dtype)), key
        assert not reference.requires_grad
        assert trained.requires_grad
    assert not (recipe.run_path / "checkpoints" / "checkpoint-2" / "ref").exists()


def test_planted_preferences_are_learned_and_measured(first, shorter):
    """Held-out pairs are told apart; the files, the card and the published version say what was done."""
    recipe, summary = shorter
    results = summary["preferences"]
    trained, kept = (
        {row["question_id"] for row in read_jsonl(recipe.run_path / "data" / "preferences" / f"{name}.jsonl")}
        for name in ("train", "held_out")
    )

    assert results["held_out"]["low"] > 0.5
    assert results["held_out"]["n"] == len(kept)
    assert not trained & kept
    assert held_out(first).keys() <= kept
    assert read_json(recipe.run_path / "preferences.json") == results
    people = results["people_bits_per_byte"]
    assert people["lost"] == pytest.approx(people["after"] - people["before"])
    assert people["low"] < people["lost"] < people["high"]
    assert people["questions"] == len(held_out(first))
    start = store.find(Path(first.store), "tiny")
    manifest = store.find(Path(first.store), "shorter")
    assert summary["adapter"] == manifest.id
    assert (manifest.run, manifest.prompt, manifest.rank) == ("shorter", {"system": "listen"}, 4)
    assert read_json(recipe.run_path / "provenance.json")["init_adapter"]["name"] == start.id
    config = read_json(recipe.run_path / "config.json")
    assert (config["init_adapter"], config["system"]) == (start.id, "listen")
    card = (recipe.run_path / "adapter" / "README.md").read_text()
    assert f"| continues from | {start.id}" in card
    assert "tags: [lora, dpo, trl" in card
    assert "are told apart as people did" in card
    assert "The preferences were learned" in (recipe.run_path / "preferences.html").read_text()
    assert {path.name for path in (recipe.run_path / "adapter").iterdir() if path.is_dir()} == set()


def test_a_named_feeling_is_learned_and_drawn_labels_are_not(first, tmp_path):
    """Drawn labels are learned by heart, so the training loss falls, and the held-out pairs stay at chance.

    Over twelve seeds, 258 of 492 held-out pairs were right; at one seed in twenty the interval may miss a half.
    """
    from train.preferences.dpo import train_preferences

    folder = {"init_adapter": str(first.run_path / "adapter"), "system": "listen", "samples": 0}
    feeling = train_preferences(preference_recipe(first, tmp_path, "feeling", name="a", **folder))
    drawn = train_preferences(preference_recipe(first, tmp_path, "shuffled", 160, name="b", **folder))

    assert feeling["preferences"]["held_out"]["low"] > 0.5
    assert drawn["train_loss_last"] < 0.5
    assert drawn["preferences"]["people_bits_per_byte"] is None
    assert drawn["preferences"]["held_out"]["low"] < 0.5 < drawn["preferences"]["held_out"]["high"]


def test_a_stopped_run_resumes_to_the_same_adapter(first, tmp_path, monkeypatch):
    """Ctrl-C saves a checkpoint and names the command; the resumed run has the losses of one that was not stopped."""
    from train.preferences.dpo import train_preferences

    settings = {"store": first.store, "samples": 0, "runs": str(tmp_path / "runs"), "max_steps": 6}
    whole = preference_recipe(first, tmp_path, "feeling", name="whole", **settings)
    stopped = replace(whole, name="stopped")
    train_preferences(whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(
            KeyboardInterrupt, match=r"stopped at step 3 of 6.*train dpo --config .*config.json --resume"
        ):
            train_preferences(stopped)

    train_preferences(replace(stopped, resume=True))

    def rows(recipe: PreferenceRecipe) -> list[tuple]:
        return [(row["step"], row["loss"]) for row in read_jsonl(recipe.run_path / "metrics.jsonl")]

    assert rows(stopped) == rows(whole)
    weights = [(recipe.run_path / "adapter" / "adapter_model.safetensors").read_bytes() for recipe in (whole, stopped)]
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match="finished"):
        train_preferences(replace(stopped, resume=True))


def test_the_settings_that_are_needed():
    for given, message in (({}, "--from is needed"), ({"init_adapter": "gentle"}, "--data is needed")):
        with pytest.raises(UserError, match=message):
            PreferenceRecipe(**given)
    with pytest.raises(UserError, match="held_out_share"):
        PreferenceRecipe(init_adapter="gentle", data="votes.jsonl", held_out_share=0.0)


def test_likelihoods_are_those_of_transformers(first):
    """Of one and of three sequences in a batch, padded or not: the model's own loss, undone."""
    import torch
    from transformers import AutoModelForCausalLM

    from train.preferences.scores import answer_logps
    from train.prompts import UNSCORED, Tokens

    model = AutoModelForCausalLM.from_pretrained(first.base, dtype=torch.float32).eval()
    sequences = [Tokens(list(range(10, 10 + n)), [UNSCORED] * 3 + list(range(13, 10 + n))) for n in (5, 9, 20)]
    expected = []
    for ids, labels in sequences:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        expected.append(-float(loss) * (len(ids) - 3))

    for batch_size in (1, 2, 3):
        assert answer_logps(model, sequences, batch_size) == pytest.approx(expected, rel=1e-4)


def test_the_interval_of_a_ratio():
    """By hand: leaving out each pair of (1, 1), (2, 1), (3, 1) gives 2.5, 2 and 1.5, a standard error of 1/sqrt(3)."""
    from train.preferences.scores import ratio_interval

    low, high = ratio_interval([1, 2, 3], [1, 1, 1])

    # Student's t with 2 degrees of freedom: 4.3027.
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert ratio_interval([1], [2]) == (None, None)
