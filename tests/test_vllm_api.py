"""The vLLM releases that a server starts on, and the names whose place differs between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from counsel.errors import UserError
from serve import vllm_api
from serve.config import ServeConfig
from serve.offline import OfflineEngine
from serve.server import Server
from tests.test_layout import ROOT


def pretend(folder: Path, version: str) -> str:
    """Metadata of an installed vLLM, in a folder for the import path."""
    info = folder / "vllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.32.0+cpu", True), ("0.32.7+cpu", True), ("0.33.0+cpu", True), ("0.33.1rc2+cpu", True), ("0.33.0", True),
        ("0.31.2+cpu", False), ("0.34.0+cpu", False), ("0.320.0+cpu", False), ("1.33.0", False), ("dev", False),
        # No guard against a LoRA kernel that ptxas compiles wrong on an H100.
        ("0.32.0", False), ("0.34.0", False),
    ],
)  # fmt: skip
def test_only_tested_releases_start(version, tested, tmp_path, monkeypatch):
    """Any patch of a tested release; another one is refused with what was tested, unless that is wanted."""
    monkeypatch.syspath_prepend(pretend(tmp_path, version))
    vllm_api.require_tested(untested_vllm=True)
    if tested:
        vllm_api.require_tested(untested_vllm=False)
        return
    with pytest.raises(UserError, match=r"0\.33\.x only; `make setup` .* --untested-vllm goes on"):
        vllm_api.require_tested(untested_vllm=False)
    with pytest.raises(UserError, match=f"vLLM {version.replace('+', '.')}"):
        Server(ServeConfig())
    with pytest.raises(UserError, match="is installed, but"):
        OfflineEngine(ServeConfig(), tmp_path / "engine.log")


def test_the_command_says_it_in_one_line(tmp_path):
    """Exit status 1, and nothing started."""
    path = os.pathsep.join((pretend(tmp_path, "0.34.0"), str(ROOT)))
    command = [sys.executable, "-m", "serve", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: vLLM 0.34.0 (CUDA build) is installed, but this project was tested with 0.33.x only; "
        "`make setup` installs a tested one, and --untested-vllm goes on with this one"
    ]


@pytest.mark.parametrize(
    ("wanted", "module"),
    [("0.9", "old"), ("0.32", "old"), ("0.33", "old"), ("0.34", "new"), ("0.40", "new"), ("0.100", "newest")],
)
def test_a_name_is_where_the_last_move_put_it(wanted, module, monkeypatch):
    """Releases are compared as numbers; before the first and after the last move, the nearest one holds."""
    monkeypatch.setattr(vllm_api, "MOVED", {"thing": {"0.32": "old", "0.34": "new", "0.99": "newest"}})
    assert vllm_api.module_of("thing", wanted) == module


@pytest.mark.parametrize("name", vllm_api.MOVED)
def test_a_moved_name_is_found_in_the_installed_release(name):
    """In the module that is listed for it."""
    pytest.importorskip("vllm")
    found = getattr(vllm_api, name)
    assert callable(found)
    assert found.__name__ == name


def test_a_name_that_is_not_listed_is_an_import_error():
    """As in any module."""
    with pytest.raises(ImportError, match="secret"):
        exec("from serve.vllm_api import secret")
