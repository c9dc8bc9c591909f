"""The adapter store: what may enter it, and what each of its commands leaves on disk."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_adapter, tiny_base
from train import store as shelves
from train.catalog import Base, resolve
from train.errors import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve(str(tiny_base(tmp_path_factory.mktemp("base") / "tiny")))


@pytest.fixture(scope="module")
def made(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter(base.path, folder / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture
def adapter(made: list[Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "adapter"))


def test_publishing_makes_a_whole_version_and_the_name_means_it(base, made, tmp_path):
    """After publish the folder holds the files with the hashes the manifest says, and `find` returns that manifest."""
    manifest = shelves.publish(tmp_path / "store", "gentle", made[0], base, system="Be kind.", run="r1")

    folder = tmp_path / "store" / "gentle" / manifest.version
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, "manifest.json"]
    assert manifest.files[WEIGHTS]["sha256"] == shelves.sha256_of(made[0] / WEIGHTS)
    assert (manifest.rank, manifest.alpha, manifest.prompt) == (8, 16.0, {"system": "Be kind."})
    assert "q_proj" in manifest.target_modules
    assert shelves.find(tmp_path / "store", "gentle") == manifest
    assert shelves.find(tmp_path / "store", manifest.id) == manifest
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["gentle"]


def test_a_version_is_its_content(base, made, tmp_path):
    """The same content gets the same version and is stored once; other weights or another system text do not."""
    store = tmp_path / "store"
    first = shelves.publish(store, "gentle", made[0], base)
    assert shelves.publish(store, "gentle", made[0], base) == first
    other = shelves.publish(store, "gentle", made[1], base)
    asked = shelves.publish(store, "gentle", made[0], base, system="Be kind.")
    assert len({first.version, other.version, asked.version}) == 3
    assert list(shelves.read_shelf(store, "gentle").versions) == [first.version, other.version, asked.version]


def test_rollback_remove_and_garbage_collection_keep_what_they_promise(base, made, tmp_path):
    """Rollback moves only `current`; the current version cannot be removed; gc keeps current and the newest others."""
    store = tmp_path / "store"
    one, two = (shelves.publish(store, "gentle", folder, base) for folder in made)
    three = shelves.publish(store, "gentle", made[0], base, system="three")
    assert shelves.rollback(store, "gentle") == two
    with pytest.raises(UserError, match="is the current version"):
        shelves.remove(store, two.id)
    assert shelves.rollback(store, "gentle", one.version) == one
    with pytest.raises(UserError, match="no version before"):
        shelves.rollback(store, "gentle")
    assert shelves.collect_garbage(store, keep=1) == [two.id]
    assert list(shelves.read_shelf(store, "gentle").versions) == [one.version, three.version]
    assert shelves.remove(store, three.id) == [three.id]
    assert shelves.remove(store, "gentle") == [one.id]
    assert list(store.iterdir()) == []


def _rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _rewrite_weights(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def _only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")


def _symlink(folder: Path) -> None:
    (folder / CONFIG).rename(folder.parent / "outside.json")
    (folder / CONFIG).symlink_to(folder.parent / "outside.json")


BREACHES = {
    "pickle": (_only_pickle, "a pickle can run code"),
    "symlink": (_symlink, "symbolic link"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
    "half a file": (lambda f: os.truncate(f / WEIGHTS, 900), "not a whole safetensors file"),
    # A sparse file: it takes no room.
    "giant weights": (lambda f: os.truncate(f / WEIGHTS, (4 << 30) + 1), "at most 4,294,967,296 are allowed"),
    "giant config": (lambda f: (f / CONFIG).write_text(" " * ((1 << 20) + 1)), "at most 1,048,576 are allowed"),
    "bottomless header": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "not a whole safetensors file",
    ),
    "other method": (lambda f: _rewrite_config(f, peft_type="LOHA"), "only 'LORA'"),
    "DoRA": (lambda f: _rewrite_config(f, use_dora=True), "use_dora"),
    "base-changing init": (lambda f: _rewrite_config(f, init_lora_weights="pissa"), "also changes the base"),
    "rank on paper": (lambda f: _rewrite_config(f, r=16), "has rank 8"),
    "no such rank": (lambda f: _rewrite_config(f, r=4096), "from 1 to 512"),
    "alpha zero": (lambda f: _rewrite_config(f, lora_alpha=0), "lora_alpha"),
    "NaN": (lambda f: _rewrite_weights(f, lambda w: {k: v / 0 * 0 for k, v in w.items()}), "NaN or infinity"),
    "zero effect": (
        lambda f: _rewrite_weights(f, lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()}),
        "exactly as the base",
    ),
    "half a pair": (
        lambda f: _rewrite_weights(f, lambda w: {k: v for k, v in w.items() if "0.mlp.up_proj.lora_B" not in k}),
        "without its other half",
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
    """Each rule's breach is one UserError that names it, and the store stays empty."""
    spoil, message = BREACHES[breach]
    spoil(adapter)
    with pytest.raises(UserError, match=message) as refusal:
        shelves.publish(tmp_path / "store", "gentle", adapter, base)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "store").exists() or list((tmp_path / "store").iterdir()) == []
    assert not Path("pwned").exists()


def test_a_system_text_has_its_bound(base, adapter, tmp_path):
    """It is put before every question: 8,000 characters pass, one more does not."""
    shelves.publish(tmp_path / "store", "gentle", adapter, base, system="a" * 8000)
    with pytest.raises(UserError, match="8001 characters; at most 8000"):
        shelves.publish(tmp_path / "store", "gentle", adapter, base, system="a" * 8001)


@pytest.mark.parametrize("name", ["../evil", "UPPER", "", "a/b", ".hidden", "a" * 65, "a@b", "tiny"])
def test_names_follow_the_grammar(name, base, made, tmp_path):
    """Names that escape the store, clash with the base (`tiny`) or cannot be served are refused."""
    with pytest.raises(UserError, match="name"):
        shelves.publish(tmp_path / "store", name, made[0], base)


def test_an_unknown_adapter_is_answered_with_the_nearest_name(base, made, tmp_path):
    """A typo is met with the name that was meant."""
    shelves.publish(tmp_path / "store", "gentle", made[0], base)
    with pytest.raises(UserError, match="did you mean 'gentle'"):
        shelves.find(tmp_path / "store", "gentel")
