"""Training that continues from an adapter, with rsLoRA; and trackers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from counsel import catalog, store
from counsel.cli import load_config, parse_arguments
from counsel.errors import UserError
from counsel.files import read_json, sha256_of
from tests.test_recipes import findings
from tests.tiny import tiny_adapter, tiny_base
from tests.train_runs import recipe_for
from train import init_adapter
from train.__main__ import COMMANDS
from train.lora import adapted_layers
from train.recipe import Recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def first(base, tmp_path_factory) -> Recipe:
    """A finished run with rsLoRA, published as `tiny`."""
    from train.sft import train

    recipe = recipe_for(base, tmp_path_factory.mktemp("work"), use_rslora=True)
    train(recipe)
    return recipe


def test_a_run_continues_from_a_version(first, capsys):
    """It starts at the loss at which the other ended, and records the exact version in config, provenance and card."""
    from train.sft import train

    manifest = store.find(Path(first.store), "tiny")
    recipe = replace(first, name="second", init_adapter="tiny", learning_rate=1e-4, max_steps=2, evaluations=1)

    done = train(recipe)

    before = read_json(first.run_path / "train.json")
    assert done["val_loss_base"] == pytest.approx(before["val_loss"], rel=1e-3)
    assert before["val_loss"] != pytest.approx(before["val_loss_base"], rel=1e-2)
    assert read_json(recipe.run_path / "config.json")["init_adapter"] == manifest.id
    weights = store.version_dir(Path(first.store), manifest) / "adapter_model.safetensors"
    recorded = read_json(recipe.run_path / "provenance.json")["init_adapter"]
    assert recorded == {"name": manifest.id, "sha256": sha256_of(weights), "run": "tiny"}
    card = (recipe.run_path / "adapter" / "README.md").read_text()
    assert f"| continues from | {manifest.id}, sha256 {recorded['sha256'][:16]} |" in card
    assert "rank 4, alpha 8 / sqrt(rank) (rsLoRA)" in card
    assert "it was trained on 0 of " in capsys.readouterr().err
    # The same command with --resume means the version that the run started with.
    assert init_adapter.pinned(recipe).init_adapter == manifest.id


def test_the_adapter_must_fit(first, base, tmp_path):
    """Another rank, alpha, scale, set of layers or base is refused with what to set; a folder that fits is taken."""
    from transformers import AutoConfig

    folder = first.run_path / "adapter"
    with_folder = replace(first, init_adapter=str(folder))
    config = AutoConfig.from_pretrained(base)

    def fits(recipe: Recipe, model: Path = base) -> str:
        found = init_adapter.find_init_adapter(recipe)
        return init_adapter.check_fits(found, recipe, catalog.resolve(str(model)), adapted_layers(recipe, config))

    assert fits(with_folder).startswith("continues from adapter, sha256 ")
    for changes, advice in (
        ({"rank": 8}, "set rank: 4"),
        ({"alpha": 16, "rank": 2}, "set rank: 4, alpha: 8"),
        ({"use_rslora": False}, "set use_rslora: True"),
        ({"target_modules": ("q_proj", "v_proj")}, "set target_modules: down_proj,gate_proj,k_proj,o_proj,q_proj,up_"),
    ):
        with pytest.raises(UserError, match=advice):
            fits(replace(with_folder, **changes))
    other = tiny_base(tmp_path / "other", "llama", seed=5)
    with pytest.raises(UserError, match=r"tiny@\w+ was trained on another base than other"):
        fits(replace(first, init_adapter="tiny"), other)
    patterned = shutil.copytree(folder, tmp_path / "patterned")
    document = read_json(patterned / "adapter_config.json") | {"rank_pattern": {"q_proj": 4}}
    (patterned / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="patterned has a rank_pattern"):
        fits(replace(first, init_adapter=str(patterned)))


def test_weights_are_loaded_into_exactly_the_layers_that_train(base, tmp_path):
    """After loading, the model answers as PEFT's own; an adapter with fewer layers is refused."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_adapter(base, tmp_path / "whole", seed=3)
    fewer = tiny_adapter(base, tmp_path / "fewer", seed=3, targets=("q_proj",))
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()
    ids = torch.arange(5, 20)[None]

    init_adapter.load_weights(init_adapter.InitAdapter("whole", folder), model)

    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, peft_model(ids).logits)
    with pytest.raises(UserError, match="fewer has other layers than this run trains"):
        init_adapter.load_weights(init_adapter.InitAdapter("fewer", fewer), model)


def test_an_adapter_that_is_not_there(first, tmp_path):
    """A wrong name lists the nearest; a path without a PEFT config, or a name without a store, says what is allowed."""
    with pytest.raises(UserError, match=r"no adapter 'tinny' in store .*did you mean 'tiny'"):
        init_adapter.find_init_adapter(replace(first, init_adapter="tinny"))
    for changes in ({"init_adapter": str(tmp_path)}, {"init_adapter": "tiny", "store": ""}):
        with pytest.raises(UserError, match=r"no folder with adapter_config\.json; give a PEFT folder, or a name"):
            init_adapter.find_init_adapter(replace(first, **changes))


def test_the_flag_is_from_and_the_key_is_init_adapter():
    _, schema, given = parse_arguments("train", COMMANDS, ["smoke", "--from", "gentle@29a49eae94c6"])

    assert given["init_adapter"] == "gentle@29a49eae94c6"
    assert schema is Recipe
    assert load_config(Recipe, None, {"init_adapter": "gentle"}).init_adapter == "gentle"


def test_a_tracker_that_is_not_installed_is_one_line_of_check(base, tmp_path, monkeypatch):
    """The line names the package. `none` beside trackers, and trackers that we do not know, are refused earlier."""
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])

    missing = findings(base, tmp_path, report_to=("tensorboard", "wandb"))["trackers"]
    assert not missing.ok
    assert missing.seen == "report_to has wandb, which is not installed; pip install wandb, or leave it out"
    assert findings(base, tmp_path, report_to=("tensorboard",))["trackers"].ok
    assert "trackers" not in findings(base, tmp_path)
    for given in (("none", "wandb"), (), ("comet",)):
        with pytest.raises(UserError, match="report_to is"):
            Recipe(report_to=given)


def test_tensorboard_gets_the_metrics_and_stays_in_the_run(base, tmp_path):
    """Its files are in the run's folder after training, with a loss for each step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from train.sft import train

    recipe = recipe_for(base, tmp_path, store="", max_steps=2, evaluations=1, report_to=("tensorboard",))
    train(recipe)

    logged = EventAccumulator(str(recipe.run_path / "tensorboard"))
    logged.Reload()
    assert len(logged.Scalars("train/loss")) == 2
