"""The adapter store: what may enter it, and what each of its commands leaves on disk."""

import concurrent.futures
import json
import os
import shutil
import stat
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from counsel import store as adapter_store
from counsel.catalog import Base, resolve
from counsel.errors import UserError
from tests.tiny import tiny_adapter, tiny_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve(str(tiny_base(tmp_path_factory.mktemp("base") / "tiny")))


@pytest.fixture(scope="module")
def made(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter(base.path, folder / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def kept(base: Base, made: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("kept") / "store"
    for folder in made:
        adapter_store.publish(store, "gentle", folder, base)
    return store


@pytest.fixture
def stocked(kept: Path, tmp_path: Path) -> tuple[Path, adapter_store.Manifest, adapter_store.Manifest]:
    """A store that a test may spoil, and the two versions of `gentle` in it: the one before, and the current."""
    store = Path(shutil.copytree(kept, tmp_path / "stocked"))
    adapter = adapter_store.read_versions(store, "gentle")
    before, current = adapter.history
    return store, adapter.versions[before], adapter.versions[current]


@pytest.fixture
def adapter(made: list[Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "adapter"))


def test_publishing_makes_a_whole_version_and_the_name_means_it(base, made, tmp_path):
    """After publish the folder holds the files with the hashes the manifest says, and `find` returns that manifest."""
    manifest = adapter_store.publish(tmp_path / "store", "gentle", made[0], base, system="Be kind.", run="r1")

    folder = tmp_path / "store" / "gentle" / manifest.version
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, "manifest.json"]
    assert manifest.files[WEIGHTS]["sha256"] == adapter_store.sha256_of(made[0] / WEIGHTS)
    assert (manifest.rank, manifest.alpha, manifest.prompt) == (8, 16.0, {"system": "Be kind."})
    assert "q_proj" in manifest.target_modules
    assert adapter_store.find(tmp_path / "store", "gentle") == manifest
    assert adapter_store.find(tmp_path / "store", manifest.id) == manifest
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["gentle"]
    assert len(manifest.trial["tokens"]) == len(manifest.trial["adapter"]) + 1


def test_the_manifest_holds_what_peft_makes_of_the_trial_text(base, made, stocked):
    """The log-probability of each token, with the adapter and without, as PEFT computes it in float32."""
    _, manifest, _ = stocked
    ids = torch.tensor([manifest.trial["tokens"]])
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)

    def read(model: torch.nn.Module) -> list[float]:
        with torch.no_grad():
            return [model(ids[:, :n]).logits[0, -1].log_softmax(-1)[ids[0, n]].item() for n in range(1, ids.shape[1])]

    assert read(model) == pytest.approx(manifest.trial["base"], abs=1e-4)
    tuned = PeftModel.from_pretrained(model, made[0]).eval()
    assert read(tuned) == pytest.approx(manifest.trial["adapter"], abs=1e-4)


def test_a_version_is_its_content(base, made, tmp_path):
    """The same content gets the same version and is stored once; other weights or another system text do not."""
    store = tmp_path / "store"
    first = adapter_store.publish(store, "gentle", made[0], base)
    assert adapter_store.publish(store, "gentle", made[0], base) == first
    other = adapter_store.publish(store, "gentle", made[1], base)
    asked = adapter_store.publish(store, "gentle", made[0], base, system="Be kind.")
    assert len({first.version, other.version, asked.version}) == 3
    assert list(adapter_store.read_versions(store, "gentle").versions) == [first.version, other.version, asked.version]


def test_rollback_remove_and_garbage_collection_keep_what_they_promise(base, made, tmp_path):
    """Rollback moves only `current`; the current version cannot be removed; gc keeps current and the newest others."""
    store = tmp_path / "store"
    one, two = (adapter_store.publish(store, "gentle", folder, base) for folder in made)
    three = adapter_store.publish(store, "gentle", made[0], base, system="three")
    assert adapter_store.rollback(store, "gentle") == two
    with pytest.raises(UserError, match="is the current version"):
        adapter_store.remove(store, two.id)
    assert adapter_store.rollback(store, "gentle", one.version) == one
    with pytest.raises(UserError, match="no version before"):
        adapter_store.rollback(store, "gentle")
    assert adapter_store.collect_garbage(store, keep=1) == [two.id]
    assert list(adapter_store.read_versions(store, "gentle").versions) == [one.version, three.version]
    assert adapter_store.remove(store, three.id) == [three.id]
    assert adapter_store.remove(store, "gentle") == [one.id]
    assert list(store.iterdir()) == []


def test_an_at_sign_without_a_version_names_nothing(stocked):
    """`gentle@`, as a script with an empty variable writes it, is neither found nor removed as all of `gentle`."""
    store, before, current = stocked
    for act in (adapter_store.find, adapter_store.remove):
        with pytest.raises(UserError, match="'gentle@' ends before its version"):
            act(store, "gentle@")
    assert set(adapter_store.read_versions(store, "gentle").versions) == {before.version, current.version}


def test_a_rollback_goes_to_what_the_name_meant_before(base, made, stocked):
    """A, B, A again, then back: B, and then A. What a name meant is not the order in which contents were made."""
    store, a, b = stocked
    assert adapter_store.publish(store, "gentle", made[0], base) == a
    assert adapter_store.read_versions(store, "gentle").history == (a.version, b.version, a.version)
    assert adapter_store.rollback(store, "gentle") == b
    assert adapter_store.rollback(store, "gentle") == a
    with pytest.raises(UserError, match="no version before"):
        adapter_store.rollback(store, "gentle")
    # A store of before there was a history: the order of publishing is all there is.
    (store / "gentle" / "history").unlink()
    (store / "gentle" / "current").write_text(b.version)
    assert adapter_store.rollback(store, "gentle") == a


@pytest.mark.parametrize("change", ["first publish", "rollback and remove"])
@pytest.mark.parametrize("when", ["before the versions are listed", "after"])
def test_a_store_that_is_changed_while_it_is_read_is_not_damaged(stocked, tmp_path, monkeypatch, change, when):
    """A reader takes no lock: it sees the store as it was, or as it is, and calls neither damaged."""
    store, before, current = stocked
    published = tmp_path / "published"
    if change == "first publish":
        (store / "gentle").rename(published)
        (store / "gentle").mkdir()

    def change_it() -> None:
        if change == "first publish":
            # In the order of `publish`: the version, then what the name means.
            for entry in (before.version, current.version, "history", "current"):
                (published / entry).rename(store / "gentle" / entry)
        else:
            adapter_store.rollback(store, "gentle")
            adapter_store.remove(store, current.id)

    listed = Path.iterdir

    def listed_meanwhile(folder: Path):
        monkeypatch.undo()
        if when == "after":
            entries = list(listed(folder))
            change_it()
            return iter(entries)
        change_it()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", listed_meanwhile)
    assert adapter_store.read_versions(store, "gentle").broken == {}
    assert adapter_store.read_versions(store, "gentle").current in (before.version, current.version)


def test_what_is_published_can_be_read_by_whom_the_umask_lets(base, adapter, tmp_path):
    """A server under another account reads it, also where the trainer's files were its own (0600)."""
    (adapter / WEIGHTS).chmod(0o600)
    before = os.umask(0o022)
    try:
        manifest = adapter_store.publish(tmp_path / "store", "gentle", adapter, base)
    finally:
        os.umask(before)
    folder = adapter_store.version_dir(tmp_path / "store", manifest)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def _zeroed(folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    (folder / WEIGHTS).write_bytes(bytes(size))


DAMAGES = {
    "zeroed weights": _zeroed,
    "deleted weights": lambda folder: (folder / WEIGHTS).unlink(),
    "cut config": lambda folder: os.truncate(folder / CONFIG, 10),
    "broken manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest in bytes": lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
    "current in bytes": lambda folder: (folder.parent / "current").write_bytes(b"\xff\xfe"),
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_publishing_again_mends_what_is_damaged(damage, base, made, stocked):
    """Every file is again as its manifest says, and the name means it."""
    store, before, manifest = stocked
    DAMAGES[damage](adapter_store.version_dir(store, manifest))
    again = adapter_store.publish(store, "gentle", made[1], base)
    assert again.version == manifest.version
    assert adapter_store.find(store, "gentle") == again
    assert adapter_store.damage(store, again) is None
    adapter = adapter_store.read_versions(store, "gentle")
    assert (set(adapter.versions), adapter.broken) == ({before.version, again.version}, {})


@pytest.mark.parametrize("damage", ["broken manifest", "no manifest", "manifest in bytes"])
def test_what_is_damaged_can_be_removed_and_collected_and_stepped_back_from(damage, stocked):
    """One bad version is one complaint: every command goes on with the others."""
    store, good, bad = stocked
    DAMAGES[damage](adapter_store.version_dir(store, bad))
    with pytest.raises(UserError, match="damaged"):
        adapter_store.find(store, bad.id)
    assert adapter_store.collect_garbage(store, keep=5) == []
    assert adapter_store.rollback(store, "gentle") == good
    assert adapter_store.collect_garbage(store, keep=5) == [bad.id]
    DAMAGES[damage](adapter_store.version_dir(store, good))
    assert adapter_store.remove(store, "gentle") == [good.id]


def test_collecting_takes_what_killed_commands_left_and_nothing_else_that_is_hidden(stocked):
    """`--store .` in a project's folder: .git and .venv are older than any leftover, and are not the store's."""
    store, _, _ = stocked
    kept = [store / name for name in (".git", ".venv", ".env.local", ".github", ".servers", "gentle/.notes.md")]
    left = [
        *(store / name for name in (".publish.a1_b2c3d", ".gentle.0123456789abcdef", f".{12 * '0'}.{10**18}")),
        store / "gentle" / ".current.0123456789abcdef",
    ]
    for path in (*kept, *left):
        path.mkdir(exist_ok=True)
        os.utime(path, (1, 1))
    fresh = store / ".publish.00000000"
    fresh.mkdir()
    assert set(adapter_store.collect_garbage(store, keep=5)) == {str(path) for path in left}
    assert all(path.is_dir() for path in (*kept, fresh))


def test_the_same_content_for_another_base_is_another_version(made, stocked, tmp_path):
    """Its manifest says the base it was published for, and the one before stays what it was."""
    store, first, _ = stocked
    second = adapter_store.publish(store, "gentle", made[0], resolve(str(tiny_base(tmp_path / "other", seed=1))))
    assert first.version != second.version
    assert (
        adapter_store.find(store, first.id).base["fingerprint"]
        != adapter_store.find(store, "gentle").base["fingerprint"]
    )


def test_writers_at_once_take_turns(base, made, stocked):
    """Two publishers of one content, a publish beside a removal, a rollback beside a removal: each ends well or says
    in one line what it found, and what is left is whole."""
    store, _, _ = stocked
    jobs = [lambda: adapter_store.publish(store, "gentle", made[0], base)] * 4
    jobs += [lambda: adapter_store.remove(store, "gentle"), lambda: adapter_store.rollback(store, "gentle")] * 2
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        errors = [job.exception() for job in [pool.submit(job) for job in jobs]]
    assert [error for error in errors[:4] if error] == []
    assert all(error is None or isinstance(error, UserError) for error in errors)
    adapter = adapter_store.read_versions(store, "gentle")
    assert adapter.broken == {}
    assert all(adapter_store.damage(store, manifest) is None for manifest in adapter.versions.values())
    assert list(store.glob(".*")) == []


def test_a_name_that_is_a_link_is_refused(base, made, tmp_path):
    """Nothing is written behind it, and it is no adapter."""
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (store / "gentle").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        adapter_store.publish(store, "gentle", made[0], base)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert adapter_store.names(store) == []
    with pytest.raises(UserError, match="no adapter"):
        adapter_store.remove(store, "gentle")


def _rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _without(folder: Path, field: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[field]
    (folder / CONFIG).write_text(json.dumps(config))


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
    "half a file": (lambda f: os.truncate(f / WEIGHTS, 900), "not a complete safetensors file"),
    # A sparse file: it takes no room.
    "giant weights": (lambda f: os.truncate(f / WEIGHTS, (4 << 30) + 1), "at most 4,294,967,296 are allowed"),
    "giant config": (lambda f: (f / CONFIG).write_text(" " * ((1 << 20) + 1)), "at most 1,048,576 are allowed"),
    "bottomless header": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "not a complete safetensors file",
    ),
    "other method": (lambda f: _rewrite_config(f, peft_type="LOHA"), "only 'LORA'"),
    "DoRA": (lambda f: _rewrite_config(f, use_dora=True), "use_dora"),
    "base-changing init": (lambda f: _rewrite_config(f, init_lora_weights="pissa"), "also changes the base"),
    "rank on paper": (lambda f: _rewrite_config(f, r=16), "has rank 8"),
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
    "fewer targets": (lambda f: _rewrite_config(f, target_modules=["q_proj"]), "target_modules leaves out"),
    "alpha as text": (
        lambda f: _rewrite_config(f, alpha_pattern={"q_proj": "16"}),
        r"q_proj'\] is '16'",
    ),
    "NaN alpha": (lambda f: _rewrite_config(f, lora_alpha=float("nan")), "lora_alpha is nan"),
    "broken pattern": (lambda f: _rewrite_config(f, alpha_pattern={"(q_proj": 3}), "which is not a regular expression"),
    "pattern as text": (lambda f: _rewrite_config(f, rank_pattern="q_proj"), "rank_pattern is 'q_proj'"),
    "rank by another pattern": (lambda f: _rewrite_config(f, rank_pattern={"q_proj": 4}), "PEFT cannot put"),
    "rsLoRA as text": (lambda f: _rewrite_config(f, use_rslora="false"), "use_rslora is 'false'"),
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
    """Each rule's breach is one UserError that names it, and the store stays empty."""
    spoil, message = BREACHES[breach]
    spoil(adapter)
    with pytest.raises(UserError, match=message) as refusal:
        adapter_store.publish(tmp_path / "store", "gentle", adapter, base)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "store").exists() or list((tmp_path / "store").iterdir()) == []
    assert not Path("pwned").exists()


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What PEFT's versions and other trainers write beside it, which changes nothing.
KINDRED = {
    "an early PEFT, Unsloth, LLaMA-Factory": {
        **{"fan_in_fan_out": False, "enable_lora": None, "merge_weights": False, "bias": "none", "loftq_config": {}},
        **{"unsloth_fixed": True, "peft_version": "0.18.0@git", "auto_mapping": {"base_model_class": "X"}},
        **{"modules_to_save": None, "init_lora_weights": "gaussian", "layers_pattern": None, "use_dora": False},
    },
    "a pattern of ranks": {"r": 128, "rank_pattern": dict.fromkeys(MODULES, 8)},
    "nulls": {"alpha_pattern": None, "rank_pattern": None, "use_rslora": None, "bias": None, "init_lora_weights": None},
    "a regex": {"target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"},
}


@pytest.mark.parametrize("kind", KINDRED)
def test_what_other_trainers_write_is_published(kind, base, adapter, tmp_path):
    """Its rank is what vLLM will count: the largest in the config."""
    _rewrite_config(adapter, **KINDRED[kind])
    manifest = adapter_store.publish(tmp_path / "store", "gentle", adapter, base)
    assert manifest.rank == KINDRED[kind].get("r", 8)


def test_a_system_text_has_its_bound(base, adapter, tmp_path):
    """It is put before every question: 8,000 characters pass, one more does not."""
    adapter_store.publish(tmp_path / "store", "gentle", adapter, base, system="a" * 8000)
    with pytest.raises(UserError, match="8001 characters; at most 8000"):
        adapter_store.publish(tmp_path / "store", "gentle", adapter, base, system="a" * 8001)


@pytest.mark.parametrize("name", ["../evil", "UPPER", "", "a/b", ".hidden", "a" * 65, "a@b", "tiny"])
def test_names_follow_the_grammar(name, base, made, tmp_path):
    """Names that escape the store, clash with the base (`tiny`) or cannot be served are refused."""
    with pytest.raises(UserError, match="name"):
        adapter_store.publish(tmp_path / "store", name, made[0], base)


def test_an_unknown_adapter_is_answered_with_the_nearest_name(base, made, tmp_path):
    """A typo is met with the name that was meant."""
    adapter_store.publish(tmp_path / "store", "gentle", made[0], base)
    with pytest.raises(UserError, match="did you mean 'gentle'"):
        adapter_store.find(tmp_path / "store", "gentel")
