"""The adapter store: what each of its commands leaves on disk, and what its readers see."""

import concurrent.futures
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from counsel import store as adapter_store
from counsel.adapter_check import CONFIG, WEIGHTS
from counsel.catalog import Base, resolve
from counsel.errors import UserError
from counsel.store_garbage import collect_garbage
from tests.tiny import tiny_adapter, tiny_base


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
    """A store that the test may change, and the two versions of `gentle` in it: the previous and the current one."""
    store = Path(shutil.copytree(kept, tmp_path / "stocked"))
    adapter = adapter_store.read_versions(store, "gentle")
    before, current = adapter.history
    return store, adapter.versions[before], adapter.versions[current]


@pytest.fixture
def adapter(made: list[Path], tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(made[0], tmp_path / "adapter"))


def test_publishing_adds_a_complete_version_and_the_name_means_it(base, made, tmp_path):
    """The folder holds the files with the hashes in the manifest, and `find` returns that manifest."""
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


def test_the_manifest_holds_the_log_probabilities_that_peft_computes(base, made, stocked):
    """Of each token of the trial text, with the adapter and without, in float32."""
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
    """The same content is one version and stored once; other weights or another system text make another."""
    store = tmp_path / "store"
    first = adapter_store.publish(store, "gentle", made[0], base)
    assert adapter_store.publish(store, "gentle", made[0], base) == first
    other = adapter_store.publish(store, "gentle", made[1], base)
    asked = adapter_store.publish(store, "gentle", made[0], base, system="Be kind.")
    assert len({first.version, other.version, asked.version}) == 3
    assert list(adapter_store.read_versions(store, "gentle").versions) == [first.version, other.version, asked.version]


def test_rollback_remove_and_garbage_collection_keep_the_right_versions(base, made, tmp_path):
    """Rollback moves `current` alone; the current version cannot be removed; gc keeps it and the last-used others."""
    store = tmp_path / "store"
    one, two = (adapter_store.publish(store, "gentle", folder, base) for folder in made)
    three = adapter_store.publish(store, "gentle", made[0], base, system="three")
    assert adapter_store.rollback(store, "gentle") == two
    with pytest.raises(UserError, match="is the current version"):
        adapter_store.remove(store, two.id)
    assert adapter_store.rollback(store, "gentle", one.version) == one
    with pytest.raises(UserError, match="no version before"):
        adapter_store.rollback(store, "gentle")
    assert collect_garbage(store, keep=1) == [two.id]
    assert list(adapter_store.read_versions(store, "gentle").versions) == [one.version, three.version]
    assert adapter_store.remove(store, three.id) == [three.id]
    assert adapter_store.remove(store, "gentle") == [one.id]
    assert list(store.iterdir()) == []


def test_an_at_sign_without_a_version_is_refused(stocked):
    """`gentle@`, which a script with an empty variable writes, neither finds nor removes `gentle`."""
    store, before, current = stocked
    for command in (adapter_store.find, adapter_store.remove):
        with pytest.raises(UserError, match="'gentle@' has no version after the '@'"):
            command(store, "gentle@")
    assert set(adapter_store.read_versions(store, "gentle").versions) == {before.version, current.version}


def test_rollback_follows_the_history_of_the_name(base, made, stocked):
    """After A, B, A a rollback goes to B, and the next one to A: the order of publishing does not matter."""
    store, a, b = stocked
    assert adapter_store.publish(store, "gentle", made[0], base) == a
    assert adapter_store.read_versions(store, "gentle").history == (a.version, b.version, a.version)
    assert adapter_store.rollback(store, "gentle") == b
    assert adapter_store.rollback(store, "gentle") == a
    with pytest.raises(UserError, match="no version before"):
        adapter_store.rollback(store, "gentle")
    # A store older than the history file: the order of publishing is used.
    (store / "gentle" / "history").unlink()
    (store / "gentle" / "current").write_text(b.version)
    assert adapter_store.rollback(store, "gentle") == a


@pytest.mark.parametrize("change", ["first publish", "rollback and remove"])
@pytest.mark.parametrize("when", ["before the versions are listed", "after"])
def test_a_store_changed_while_it_is_read_is_not_reported_as_damaged(stocked, tmp_path, monkeypatch, change, when):
    """A reader takes no lock: it sees the store before or after the change, and neither looks damaged."""
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


def test_published_files_get_the_permissions_of_the_umask(base, adapter, tmp_path):
    """A server under another account can read them, even if the trainer's files are private (0600)."""
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
def test_publishing_again_repairs_a_damaged_version(damage, base, made, stocked):
    """Every file matches the manifest again, and the name means this version."""
    store, before, manifest = stocked
    DAMAGES[damage](adapter_store.version_dir(store, manifest))
    again = adapter_store.publish(store, "gentle", made[1], base)
    assert again.version == manifest.version
    assert adapter_store.find(store, "gentle") == again
    assert adapter_store.damage(store, again) is None
    adapter = adapter_store.read_versions(store, "gentle")
    assert (set(adapter.versions), adapter.broken) == ({before.version, again.version}, {})


@pytest.mark.parametrize("damage", ["broken manifest", "no manifest", "manifest in bytes"])
def test_a_damaged_version_can_be_removed_collected_and_rolled_back_from(damage, stocked):
    """A damaged version is an error only when it is asked for; every command works on the others."""
    store, good, bad = stocked
    DAMAGES[damage](adapter_store.version_dir(store, bad))
    with pytest.raises(UserError, match="damaged"):
        adapter_store.find(store, bad.id)
    assert collect_garbage(store, keep=5) == []
    assert adapter_store.rollback(store, "gentle") == good
    assert collect_garbage(store, keep=5) == [bad.id]
    DAMAGES[damage](adapter_store.version_dir(store, good))
    assert adapter_store.remove(store, "gentle") == [good.id]


def test_garbage_collection_removes_leftovers_of_killed_commands_and_no_other_hidden_files(stocked):
    """With `--store .` in a project's folder, .git and .venv are hidden and old too, but not the store's."""
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
    assert set(collect_garbage(store, keep=5)) == {str(path) for path in left}
    assert all(path.is_dir() for path in (*kept, fresh))


def test_garbage_collection_removes_what_a_killed_server_start_left(stocked):
    """Only a file that is old and that no process has locked: a server that is starting holds a lock on its own."""
    store, _, _ = stocked
    servers = store / ".servers"
    servers.mkdir()
    left, starting, fresh = (servers / f".{digit * 16}" for digit in "123")
    running = servers / f"{'4' * 16}.json"
    for path in (left, starting, fresh, running):
        path.write_text("{}")
        if path != fresh:
            os.utime(path, (1, 1))
    with starting.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert collect_garbage(store, keep=5) == [str(left)]
    assert sorted(servers.iterdir()) == sorted([starting, fresh, running])
    assert collect_garbage(store, keep=5) == [str(starting)]


@pytest.mark.parametrize("written", [0, 2, None])
def test_a_manifest_in_another_format_says_what_to_do(stocked, written):
    """Its keys may differ, so none of them is looked at; publishing the adapter again repairs it."""
    store, _, current = stocked
    file = adapter_store.version_dir(store, current) / "manifest.json"
    file.write_text(json.dumps({"format": written, "other": "keys"}))
    with pytest.raises(UserError, match=rf"has format {written}, but .* reads format 1; publish the adapter again"):
        adapter_store.find(store, "gentle")


def test_the_same_content_for_another_base_is_another_version(made, stocked, tmp_path):
    """Each manifest names the base that the version was published for."""
    store, first, _ = stocked
    second = adapter_store.publish(store, "gentle", made[0], resolve(str(tiny_base(tmp_path / "other", seed=1))))
    assert first.version != second.version
    assert (
        adapter_store.find(store, first.id).base["fingerprint"]
        != adapter_store.find(store, "gentle").base["fingerprint"]
    )


def test_concurrent_writers_take_turns(base, made, stocked):
    """Several publishes of the same content, removals and rollbacks: each succeeds or raises a UserError, and the store
    is undamaged after them."""
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
    """Nothing is written through the link, and it is not listed as an adapter."""
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


def test_a_system_text_has_a_limit(base, adapter, tmp_path):
    """It is put before every question: 8,000 characters are accepted, one more is not."""
    adapter_store.publish(tmp_path / "store", "gentle", adapter, base, system="a" * 8000)
    with pytest.raises(UserError, match="8001 characters; at most 8000"):
        adapter_store.publish(tmp_path / "store", "gentle", adapter, base, system="a" * 8001)


@pytest.mark.parametrize("name", ["../evil", "UPPER", "", "a/b", ".hidden", "a" * 65, "a@b", "tiny"])
def test_invalid_names_are_refused(name, base, made, tmp_path):
    """Names that escape the store, clash with the base (`tiny`) or cannot be served are refused."""
    with pytest.raises(UserError, match="name"):
        adapter_store.publish(tmp_path / "store", name, made[0], base)


def test_an_unknown_adapter_gives_the_nearest_name(base, made, tmp_path):
    """The error for a typo suggests the name that was meant."""
    adapter_store.publish(tmp_path / "store", "gentle", made[0], base)
    with pytest.raises(UserError, match="did you mean 'gentle'"):
        adapter_store.find(tmp_path / "store", "gentel")
