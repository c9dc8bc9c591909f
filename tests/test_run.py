"""A run directory: which runs are opened, and what the error says about the others."""

import pytest

from counsel.cli import load_config
from counsel.errors import UserError
from counsel.files import write_json
from counsel.run import RENAMED_KEYS, Run, open_run
from train.recipe import Recipe


def test_a_config_of_an_earlier_version_says_which_keys_to_rename(tmp_path):
    """All of them in one line, so that one edit is enough; the renamed config is read."""
    config = {"base": "smollm2-135m", "targets": ["q_proj"], "load_4bit": False}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError) as error:
        Run(tmp_path).config()
    assert str(error.value) == (
        f"'{tmp_path}/config.json' was written by an earlier version of Counsel Stack; in it, rename targets to "
        "target_modules, load_4bit to load_in_4bit, or train again"
    )

    write_json(tmp_path / "config.json", {RENAMED_KEYS.get(key, key): value for key, value in config.items()})
    assert Run(tmp_path).config() == {"base": "smollm2-135m", "target_modules": ["q_proj"], "load_in_4bit": False}


def test_the_new_keys_are_those_of_a_recipe():
    """And no recipe has an old one, which would refuse every run."""
    keys = set(Recipe.__dataclass_fields__)
    assert set(RENAMED_KEYS.values()) <= keys
    assert not keys & set(RENAMED_KEYS)


def test_a_recipe_of_an_earlier_version_says_which_keys_to_rename(tmp_path):
    """All of them in one line, also the ones that look like no key of today; so does the config of a run to resume."""
    file = tmp_path / "config.json"
    write_json(file, dict.fromkeys(RENAMED_KEYS, 1))
    with pytest.raises(UserError) as error:
        load_config(Recipe, str(file), {})
    assert str(error.value) == (
        f"{file} is for an earlier version of Counsel Stack; in it, rename "
        + ", ".join(f"{old} to {new}" for old, new in RENAMED_KEYS.items())
    )


def test_only_a_finished_run_is_opened(tmp_path, monkeypatch):
    """The error lists the finished runs, or says how to resume this one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run 'gentle'; finished runs: none; make one with python -m train"):
        open_run("gentle")
    write_json(tmp_path / "runs" / "gentle" / "config.json", {})
    with pytest.raises(UserError, match=r"did not finish; .* python -m train runs/gentle/config.json --resume"):
        open_run("gentle")
    write_json(tmp_path / "runs" / "gentle" / "train.json", {})
    assert open_run("gentle").name == "gentle"
    with pytest.raises(UserError, match=r"no run 'calm'; finished runs: gentle"):
        open_run("calm")
