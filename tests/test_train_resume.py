"""A run that already exists is refused, replaced or locked; a stopped or killed run resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.files import read_json, read_jsonl
from tests.held import kill_when_stopped, stopping
from tests.tiny import tiny_base
from tests.train_runs import contents, finished_run, flags_of, interrupt_at, losses, recipe_for, run_command
from train.recipe import Recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Recipe, dict]:
    """One finished tiny run and its summary."""
    return finished_run(base, tmp_path_factory.mktemp("work"))


def test_an_existing_run_is_not_touched(finished):
    """Without --resume or --overwrite the training is refused, and the message names both."""
    from train.sft import train

    recipe, summary = finished
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        train(recipe)
    with pytest.raises(UserError, match="finished"):
        train(replace(recipe, resume=True))
    assert read_json(recipe.run_path / "train.json") == json.loads(json.dumps(summary))


@pytest.mark.slow
def test_a_run_killed_with_9_resumes_to_the_same_losses(base, tmp_path):
    """A run that was killed and resumed logs the same losses at the same steps as an undisturbed run."""
    from train.sft import train

    settings = {"dropout": 0.1, "epochs": 4.0, "evaluations": 8, "samples": 0, "store": ""}
    whole = recipe_for(base, tmp_path, name="whole", **settings)
    killed = recipe_for(base, tmp_path, name="killed", **settings)
    train(whole)
    # Two steps after the checkpoint of step 12; their log rows must be dropped and written again.
    in_step_14 = stopping("train", "train.progress", "TrainingProgress.on_log", "given[1].global_step == 14")
    kill_when_stopped(run_command("-c", in_step_14, *flags_of(killed)))
    assert (killed.run_path / "checkpoints" / "checkpoint-12" / "trainer_state.json").exists()
    assert read_jsonl(killed.run_path / "metrics.jsonl")[-1]["step"] == 14
    assert not (killed.run_path / "train.json").exists()

    train(replace(killed, resume=True))

    assert losses(killed) == losses(whole)
    assert read_json(killed.run_path / "train.json")["val_loss"] == read_json(whole.run_path / "train.json")["val_loss"]


def test_resume_refuses_other_settings(base, tmp_path):
    """A resumed run needs the same settings; the error names the first that changed."""
    from train.data import prepare
    from train.resume import check_run_directory, opened_run

    recipe = recipe_for(base, tmp_path)
    with opened_run(recipe, prepare(recipe.data_config())):
        pass

    check_run_directory(replace(recipe, resume=True))
    with pytest.raises(UserError, match=r"rank is 8, but run 'tiny' was started with 4"):
        check_run_directory(replace(recipe, resume=True, rank=8))


def test_overwrite_removes_a_run_only(finished, tmp_path):
    """A folder that is not a run is kept, and so is a run that contains inputs of the new one."""
    from train.resume import check_run_directory

    recipe, _ = finished
    other = tmp_path / "runs" / "tiny"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    run = recipe.run_path
    inside = {"data": str(run / "data" / "train.jsonl"), "base": str(run / "adapter"), "store": str(run / "adapter")}

    with pytest.raises(UserError, match="not an earlier run"):
        check_run_directory(replace(recipe, runs=str(tmp_path / "runs"), overwrite=True))
    for key, value in inside.items():
        with pytest.raises(UserError, match=f"{key} is .* inside the run"):
            check_run_directory(replace(recipe, overwrite=True, **{key: value}))
    check_run_directory(replace(recipe, overwrite=True))


def test_overwrite_with_bad_data_keeps_the_run(finished, tmp_path):
    """The earlier run is removed only after the new data was read."""
    from train.sft import train

    recipe, _ = finished
    before = contents(recipe.run_path)
    with pytest.raises(UserError, match="absent"):
        train(replace(recipe, overwrite=True, data=str(tmp_path / "absent.csv")))
    assert contents(recipe.run_path) == before


def test_only_one_process_trains_a_run(base, tmp_path):
    """While a run is being trained, neither --resume nor --overwrite starts; after it ends, both can."""
    from train.data import prepare
    from train.resume import opened_run

    recipe = recipe_for(base, tmp_path)
    prepared = prepare(recipe.data_config())
    again = [(replace(recipe, resume=True), None), (replace(recipe, overwrite=True), prepared)]
    with opened_run(recipe, prepared):
        before = contents(recipe.run_path)
        for start in again:
            with pytest.raises(UserError, match="being trained by another process"), opened_run(*start):
                pass
        assert contents(recipe.run_path) == before
    for start in again:
        with opened_run(*start), pytest.raises(UserError, match="another process"), opened_run(*again[0]):
            pass


@pytest.mark.parametrize("fast", [True, False])
def test_ctrl_c_saves_and_prints_the_command_to_resume(base, tmp_path, monkeypatch, capsys, fast):
    """A run stopped in its second epoch and resumed with the printed command trains the rows of an undisturbed run."""
    from counsel.cli import main
    from train.__main__ import COMMANDS
    from train.sft import train

    same = {"group_by_length": True, "epochs": 2.0, "evaluations": 2, "samples": 0, "store": "", "fast_cpu": fast}
    whole, stopped = (recipe_for(base, tmp_path, name=name, **same) for name in ("whole", "stopped"))
    train(whole)
    interrupt_at(monkeypatch, 10)

    assert main("train", COMMANDS, flags_of(stopped)) == 130

    line = capsys.readouterr().err.splitlines()[-1]
    # The step that was running when the key was pressed finishes first.
    assert line.startswith("stopped at step 11 of 16, with a checkpoint; continue with python -m train ")
    assert main("train", COMMANDS, line.partition("python -m train ")[2].split()) == 0
    assert losses(stopped) == losses(whole)


def test_a_damaged_checkpoint_is_skipped(base, tmp_path, monkeypatch, capsys):
    """If any file of the newest checkpoint is truncated or empty, the run resumes from the one before, and says so."""
    from counsel.run import Run
    from train.resume import last_checkpoint
    from train.sft import train

    recipe = recipe_for(base, tmp_path, samples=0, store="", evaluations=8)
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    newest = last_checkpoint(Run(recipe.run_path))
    files = [path.name for path in newest.iterdir()]
    assert {"optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"} <= set(files)
    for number, name in enumerate(files):
        run = Run(tmp_path / f"copy{number}")
        shutil.copytree(recipe.run_path, run.path)
        broken = run.path / "checkpoints" / newest.name / name
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size * (number % 2) // 2])
        capsys.readouterr()

        checkpoint = last_checkpoint(run)

        assert checkpoint is not None
        assert checkpoint.name < newest.name
        message = capsys.readouterr().err
        assert f"skipping {newest.name}" in message
        assert f"from {checkpoint.name}" in message


@pytest.mark.parametrize(("changes", "ended"), [({}, 8), ({"epochs": 30.0, "evaluations": 15, "patience": 2,
                                                          "max_rows": 6, "learning_rate": 0.02}, None)])  # fmt: skip
def test_a_run_that_had_ended_does_not_train_further(base, tmp_path, monkeypatch, changes, ended):
    """A run killed after its last step, or after early stopping, finishes with the same adapter and numbers."""
    from train import sft

    settings = {"samples": 0, "store": "", "max_val_rows": 8, **changes}
    whole, killed = (recipe_for(base, tmp_path, name=name, **settings) for name in ("whole", "killed"))
    expected = sft.train(whole)

    def kill(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(sft, "finish_run", kill)
        with pytest.raises(RuntimeError, match="killed"):
            sft.train(killed)
    done = sft.train(replace(killed, resume=True))

    assert expected["steps"] == (ended or expected["steps"]) < 60
    same = ("steps", "epochs", "best_step", "val_loss", "val_loss_base", "train_loss_last", "tokens", "postflight")
    assert {key: done[key] for key in same} == {key: expected[key] for key in same}
    assert losses(killed) == losses(whole)
    assert done["tokens_per_s"] > 0


@pytest.mark.parametrize("limit", [25_000, 50_000])
def test_a_full_disk_is_one_line(base, tmp_path, limit):
    """If the adapter or the optimizer state does not fit on the disk, the error says what to do."""
    import resource

    from train.sft import train

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the checkpoint of step 2 .*--resume"):
            train(recipe_for(base, tmp_path, samples=0, store=""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
