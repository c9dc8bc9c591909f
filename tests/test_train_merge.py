"""Merging base and adapter into one folder."""

import pytest

from counsel.errors import UserError
from counsel.files import read_json
from tests.tiny import tiny_base
from tests.train_runs import contents, finished_run
from train.recipe import Recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Recipe, dict]:
    """One finished tiny run and its summary."""
    folder = tmp_path_factory.mktemp("work")
    return finished_run(tiny_base(folder / "tiny-llama", "llama"), folder)


def test_the_merged_folder_answers_as_base_and_adapter(finished, tmp_path):
    """AutoModelForCausalLM alone loads the folder, and its greedy text is that of base plus adapter."""
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


def test_merge_replaces_an_earlier_merge_and_nothing_else(finished, tmp_path):
    """--overwrite refuses the run itself, a folder with other files, and a link; it replaces an earlier merge."""
    from train.merge import Merge, merge

    recipe, _ = finished
    run, other, link, merged = recipe.run_path, tmp_path / "other", tmp_path / "link", tmp_path / "merged"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    link.symlink_to(other)
    before = contents(run)
    for out in (run, run / "adapter", other, link, other / "notes.txt"):
        with pytest.raises(UserError, match="not an earlier merge"):
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
    with pytest.raises(UserError, match=r"also contains 'model\.gguf'"):
        merge(Merge(str(run), out=str(merged), overwrite=True))


def test_a_merge_that_fails_leaves_the_earlier_one(finished, tmp_path, monkeypatch):
    """The earlier folder is removed only after the new one is complete."""
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


def test_the_merge_measures_what_it_wrote(finished, tmp_path):
    """The largest difference is between the saved folder, loaded again, and base plus adapter in fp32."""
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
