"""Which adapters may enter the store: each rule, and what other trainers write."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from counsel import store as adapter_store
from counsel.adapter_check import CONFIG, WEIGHTS
from counsel.catalog import Base, resolve
from counsel.errors import UserError
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve(str(tiny_base(tmp_path_factory.mktemp("base") / "tiny")))


@pytest.fixture(scope="module")
def made(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(base.path, tmp_path_factory.mktemp("adapters") / "1", seed=1)


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def _rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _without(folder: Path, field: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[field]
    (folder / CONFIG).write_text(json.dumps(config))


def _rewrite_weights(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def _leave_only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")


def _symlink(folder: Path) -> None:
    (folder / CONFIG).rename(folder.parent / "outside.json")
    (folder / CONFIG).symlink_to(folder.parent / "outside.json")


BREACHES = {
    "pickle": (_leave_only_a_pickle, "a pickle can run code"),
    "symlink": (_symlink, "symbolic link"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
    "truncated file": (lambda f: os.truncate(f / WEIGHTS, 900), "not a complete safetensors file"),
    # A sparse file, which takes no disk space.
    "giant weights": (lambda f: os.truncate(f / WEIGHTS, (4 << 30) + 1), "at most 4,294,967,296 are allowed"),
    "giant config": (lambda f: (f / CONFIG).write_text(" " * ((1 << 20) + 1)), "at most 1,048,576 are allowed"),
    "deeply nested header": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "not a complete safetensors file",
    ),
    "other method": (lambda f: _rewrite_config(f, peft_type="LOHA"), "only 'LORA'"),
    "DoRA": (lambda f: _rewrite_config(f, use_dora=True), "use_dora"),
    "base-changing init": (lambda f: _rewrite_config(f, init_lora_weights="pissa"), "also changes the base"),
    "rank of the config alone": (lambda f: _rewrite_config(f, r=16), "has rank 8"),
    "no such rank": (lambda f: _rewrite_config(f, r=4096), "from 1 to 512"),
    "alpha zero": (lambda f: _rewrite_config(f, lora_alpha=0), "lora_alpha"),
    "NaN": (lambda f: _rewrite_weights(f, lambda w: {k: v / 0 * 0 for k, v in w.items()}), "NaN or infinity"),
    "huge": (
        lambda f: _rewrite_weights(f, lambda w: {k: torch.full_like(v, 3e38) for k, v in w.items()}),
        "NaN or inf",
    ),
    "huge where it is scaled": (lambda f: _rewrite_config(f, lora_alpha=1e300), "NaN or infinity in"),
    "no targets": (lambda f: _without(f, "target_modules"), "target_modules is None"),
    "null targets": (lambda f: _rewrite_config(f, target_modules=None), "target_modules is None"),
    "fewer targets": (lambda f: _rewrite_config(f, target_modules=["q_proj"]), "target_modules lacks"),
    "alpha is a string": (
        lambda f: _rewrite_config(f, alpha_pattern={"q_proj": "16"}),
        r"q_proj'\] is '16'",
    ),
    "NaN alpha": (lambda f: _rewrite_config(f, lora_alpha=float("nan")), "lora_alpha is nan"),
    "broken pattern": (lambda f: _rewrite_config(f, alpha_pattern={"(q_proj": 3}), "which is not a regular expression"),
    "pattern is a string": (lambda f: _rewrite_config(f, rank_pattern="q_proj"), "rank_pattern is 'q_proj'"),
    "rank by another pattern": (lambda f: _rewrite_config(f, rank_pattern={"q_proj": 4}), "PEFT cannot load"),
    "rsLoRA is a string": (lambda f: _rewrite_config(f, use_rslora="false"), "use_rslora is 'false'"),
    "vLLM's own field": (lambda f: _rewrite_config(f, vllm_lora_scaling_factor=0), "vllm_lora_scaling_factor is 0"),
    "field of a later PEFT": (lambda f: _rewrite_config(f, use_new_idea={"x": 1}), "use_new_idea"),
    "Arrow": (lambda f: _rewrite_config(f, arrow_config={"top_k": 1}), "arrow_config"),
    "float8": (
        lambda f: _rewrite_weights(f, lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}),
        "is F8_E4M3",
    ),
    "zero effect": (
        lambda f: _rewrite_weights(f, lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()}),
        "exactly as the base",
    ),
    "half a pair": (
        lambda f: _rewrite_weights(f, lambda w: {k: v for k, v in w.items() if "0.mlp.up_proj.lora_B" not in k}),
        "has no lora_B",
    ),
    "unknown module": (
        lambda f: _rewrite_weights(f, lambda w: {k.replace("layers.1", "layers.7"): v for k, v in w.items()}),
        "no linear layer model.layers.7",
    ),
    "wrong width": (
        lambda f: _rewrite_weights(
            f, lambda w: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in w.items()}
        ),
        "for another base",
    ),
    "head": (
        lambda f: _rewrite_weights(
            f,
            lambda w: {
                **w,
                "base_model.model.lm_head.lora_A.weight": torch.ones(8, 64),
                "base_model.model.lm_head.lora_B.weight": torch.ones(380, 8),
            },
        ),
        "lm_head, which is not served",
    ),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_bad_adapter_is_refused_and_nothing_is_left(breach, base, adapter, tmp_path):
    """Breaking a rule gives one UserError that names it, and the store stays empty."""
    break_rule, message = BREACHES[breach]
    break_rule(adapter)
    with pytest.raises(UserError, match=message) as error:
        adapter_store.publish(tmp_path / "store", "gentle", adapter, base)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists() or list((tmp_path / "store").iterdir()) == []
    assert not Path("pwned").exists()


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Fields of other trainers and of other versions of PEFT that do not change what the adapter computes.
ACCEPTED = {
    "an early PEFT, Unsloth, LLaMA-Factory": {
        **{"fan_in_fan_out": False, "enable_lora": None, "merge_weights": False, "bias": "none", "loftq_config": {}},
        **{"unsloth_fixed": True, "peft_version": "0.18.0@git", "auto_mapping": {"base_model_class": "X"}},
        **{"modules_to_save": None, "init_lora_weights": "gaussian", "layers_pattern": None, "use_dora": False},
    },
    "a pattern of ranks": {"r": 128, "rank_pattern": dict.fromkeys(MODULES, 8)},
    "nulls": {"alpha_pattern": None, "rank_pattern": None, "use_rslora": None, "bias": None, "init_lora_weights": None},
    "a regex": {"target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"},
}


@pytest.mark.parametrize("trainer", ACCEPTED)
def test_what_other_trainers_write_is_published(trainer, base, adapter, tmp_path):
    """The manifest's rank is the one vLLM will count: the largest in the config."""
    _rewrite_config(adapter, **ACCEPTED[trainer])
    manifest = adapter_store.publish(tmp_path / "store", "gentle", adapter, base)
    assert manifest.rank == ACCEPTED[trainer].get("r", 8)
