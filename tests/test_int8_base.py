"""A base's int8 copy: its numbers, its files, what is refused, and where the launch plan names it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from counsel.catalog import resolve
from counsel.errors import UserError
from counsel.fingerprint import fingerprint
from serve.config import ServeConfig
from serve.int8_base import int8_folder, make_int8, source_fingerprint
from serve.launch import plan
from tests.test_launch import GPU, SMALL, flag
from tests.tiny import tiny_base


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return resolve(str(tiny_base(tmp_path / "base", kind="llama")))


def test_each_output_has_one_scale_and_the_rest_stays(base):
    """By hand: 127 is the largest number of a row, halves round to even; a row of zeros stays; embeddings stay."""
    file = base.path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.k_proj"
    weight = torch.zeros_like(tensors[f"{name}.weight"])
    weight[0, :4] = torch.tensor([2.54, -1.0, 0.03, 0.0])
    tensors[f"{name}.weight"] = weight
    save_file(tensors, file, metadata={"format": "pt"})
    make_int8(base)
    made = load_file(int8_folder(base) / "model.safetensors")

    assert made[f"{name}.weight"].dtype is torch.int8
    assert made[f"{name}.weight"][0, :4].tolist() == [127, -50, 2, 0]
    assert made[f"{name}.weight_scale"].shape == (len(weight), 1)
    assert made[f"{name}.weight_scale"][0, 0].item() == pytest.approx(0.02)
    assert not made[f"{name}.weight"][1:].any()
    changed = {key for key, value in made.items() if key not in tensors or value.dtype != tensors[key].dtype}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {key.split(".")[-2] for key in changed} == set(kinds)
    assert len(changed) == 2 * 2 * len(kinds)
    for key in made.keys() - changed:
        assert torch.equal(made[key], tensors[key])
    for key in (key for key in changed if key.endswith(".weight")):
        off_by = (made[key].float() * made[f"{key}_scale"] - tensors[key]).abs()
        assert (off_by <= made[f"{key}_scale"] * 0.5001).all()


def test_weights_in_several_files_get_a_new_index(base):
    """The index names the scales too, and each tensor is in the file that the index names."""
    tensors = load_file(base.path / "model.safetensors")
    (base.path / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves, start=1):
        save_file(half, base.path / f"model-0000{i}-of-00002.safetensors")
    (base.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    make_int8(base)
    folder = int8_folder(base)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    assert index == {key: file.name for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert len(index) == len(tensors) + 14


def test_it_is_made_once_and_keeps_its_bases_identity(base):
    """A second call changes nothing; adapters of the base fit; other weights make another copy."""
    make_int8(base)
    folder = int8_folder(base)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    make_int8(base)

    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert source_fingerprint(folder) == fingerprint(base.path) == source_fingerprint(base.path)
    assert "tokenizer.json" in before
    tiny_base(base.path, kind="llama", seed=1)
    assert int8_folder(base) != folder


def test_a_copy_that_cannot_be_made_leaves_nothing(base):
    """Weights that are not finite are refused, and the cache holds no part of the copy."""
    tensors = load_file(base.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base.path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite"):
        make_int8(base)

    assert not list(int8_folder(base).parent.glob("*int8*"))


def test_the_plan_names_the_copy_and_refuses_what_was_not_checked(base):
    """On a CPU only, for models that were compared, and not on a base that is quantized already."""
    made = plan(ServeConfig(quantization="int8"), base, SMALL, environ={})
    assert flag(made, "--model") == str(int8_folder(base))
    assert (flag(made, "--dtype"), flag(made, "--served-model-name")) == ("bfloat16", base.name)
    assert flag(made, "--quantization") is None
    assert "int8" in made.explain()
    with pytest.raises(UserError, match="int8, which is for CPUs"):
        plan(ServeConfig(quantization="int8"), base, GPU)
    config = base.path / "config.json"
    known = json.loads(config.read_text())
    for changed, reason in (
        ({"model_type": "gpt2"}, "not checked on 'gpt2' models; checked: gemma2, gemma3_text, llama"),
        ({"quantization_config": {"quant_method": "awq"}}, "own files are quantized"),
    ):
        config.write_text(json.dumps({**known, **changed}))
        with pytest.raises(UserError, match=reason):
            plan(ServeConfig(quantization="int8"), base, SMALL)
