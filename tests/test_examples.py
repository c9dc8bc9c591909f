"""The notebooks in examples/: every code cell runs from top to bottom, and git holds no outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import tiny_base
from tests.train_runs import ROOT, short_rows
from train.recipe import RECIPES

EXAMPLES = ROOT / "examples"
# Runs the cells in one namespace, as a kernel does, and writes the values of the named variables.
RUN_CELLS = """
import json, sys
cells, names, results = json.loads(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
namespace = {"__name__": "__main__"}
for number, source in enumerate(cells, 1):
    exec(compile(source, f"<code cell {number}>", "exec"), namespace)
with open(results, "w") as file:
    json.dump({name: namespace[name] for name in names}, file, default=lambda reply: reply.model_dump())
"""


def notebook_cells(name: str, kind: str = "code") -> list[dict[str, Any]]:
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def run_notebook(name: str, folder: Path, parameters: dict[str, str], *names: str) -> dict[str, Any]:
    """Run a notebook's code in `folder`; `parameters` replace those of its first cell, as papermill does it."""
    cells = notebook_cells(name)
    assert cells[0]["metadata"] == {"tags": ["parameters"]}
    changes = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    sources = ["".join(cell["source"]) for cell in cells]
    results = folder / f"{name}.json"
    done = subprocess.run(
        [sys.executable, "-c", RUN_CELLS, json.dumps([sources[0], changes, *sources[1:]]), ",".join(names), results],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    return json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["finetune.ipynb", "chat.ipynb"])
def test_git_holds_no_outputs(name: str) -> None:
    """Outputs and execution counts are stripped, and the notice is in the first cell."""
    for cell in notebook_cells(name):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert "not for crisis management" in "".join(notebook_cells(name, "markdown")[0]["source"]).replace("\n> ", " ")


def test_both_notebooks_run_one_after_the_other(tmp_path: Path) -> None:
    """On a tiny base: an adapter is trained, evaluated and not sent; then two versions of it are compared, live."""
    smoke = yaml.safe_load((RECIPES / "smoke.yaml").read_text(encoding="utf-8"))
    # The tiny tokenizer needs several tokens per word.
    recipe = smoke | {"max_steps": 2, "evaluations": 1, "max_length": 1000, "system": "listen"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    parameters = {
        "BASE": str(tiny_base(tmp_path / "tiny", "llama")),
        "DATA": short_rows(tmp_path),
        "RECIPE": str(tmp_path / "recipe.yaml"),
    }

    made = run_notebook("finetune.ipynb", tmp_path, parameters, "trained", "evaluation", "pushed")
    assert (tmp_path / "runs" / "first" / "train.json").is_file()
    assert {"tiny", "first"} <= made["evaluation"]["arms"].keys()
    assert "README.md" in made["pushed"]["files"]
    assert made["pushed"]["sent"] is False

    asked = run_notebook("chat.ipynb", tmp_path, parameters, "published", "replies", "rolled_back")
    versions = [made["trained"]["adapter"], asked["published"]["adapter"]]
    assert versions[0] != versions[1]
    assert [reply["model"] for reply in asked["replies"]] == ["tiny", *versions]
    assert asked["rolled_back"]["adapter"] == versions[0]
