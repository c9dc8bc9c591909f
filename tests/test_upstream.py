"""What we use of vLLM exists and is listed in serve/cpu/UPSTREAM.md, so that a version bump fails here first."""

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serve import launch, vllm_api
from tests.test_layout import PACKAGES, ROOT

TABLES = ROOT / "serve" / "cpu" / "UPSTREAM.md"
SOURCES = sorted(path for package in (*PACKAGES, "benchmarks") for path in (ROOT / package).rglob("*.py"))
# Names of ours that look like vLLM's: a logger under vLLM's, and the groups of entry points.
OURS = ("vllm.counsel", "vllm.platform_plugins", "vllm.general_plugins", "vllm.endpoint_plugins")
IMPORT = re.compile(r"from (vllm[\w.]*) import (\w+(?:, \w+)*)")
DOTTED = re.compile(r"vllm(\.\w+)+")
VARIABLE = re.compile(r"VLLM_[A-Z_]+")
NAME = re.compile(r"`([^`]+)`(?: from (0\.\d+))?(?: until (0\.\d+))?")


class Name(NamedTuple):
    """One name in the tables, the releases that have it, and its whole row."""

    text: str
    since: str
    until: str
    row: str

    def is_in(self, release: str) -> bool:
        return number(self.since or release) <= number(release) <= number(self.until or release)


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def names() -> Iterator[Name]:
    for line in TABLES.read_text(encoding="utf-8").splitlines():
        owner = ""
        for text, since, until in NAME.findall(line.split(" | ")[0]) if line.startswith("| `") else ():
            if text.startswith("."):
                yield Name(owner + text, since, until, line)
            else:
                module, _, qualified = text.partition(":")
                owner = f"{module}:{re.split('[.(]', qualified)[0]}"
                yield Name(text, since, until, line)


NAMES = list(names())
LISTED = {name.text.partition("(")[0] for name in NAMES}
# Without vLLM nothing is looked up.
RELEASE = vllm_api.release(vllm_api.vllm_version() or "0.0")


def problem(text: str) -> str | None:
    """What is wrong with a name in the tables; None if it is as we rely on it."""
    if VARIABLE.fullmatch(text):
        return None if text in importlib.import_module("vllm.envs").environment_variables else "no such variable"
    if '"' in text:
        module, _, words = text.partition(" ")
        source = inspect.getsource(importlib.import_module(module))
        return None if words.strip('"') in source else f"its source no longer holds {words}"
    path, _, parameters = text.rstrip(")").partition("(")
    module, _, qualified = path.partition(":")
    if importlib.util.find_spec(module) is None:
        return "no such module"
    if module == "torch":
        # Loads vLLM's C++ library, which gives torch its operators.
        importlib.import_module("vllm.platforms").current_platform.import_kernels()
    found: Any = importlib.import_module(module) if qualified else None
    for part in filter(None, qualified.split(".")):
        if not hasattr(found, part):
            return None if inspect.isclass(found) and has_field(found, part) else f"no attribute {part!r}"
        found = getattr(found, part)
    if not parameters:
        return None
    taken = inspect.signature(found).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    missing = [parameter for parameter in parameters.split(", ") if parameter not in taken]
    return f"it does not take {', '.join(missing)}" if missing and not open_ended else None


def has_field(cls: type, attribute: str) -> bool:
    """Whether instances of a class have an attribute: a declared field, or one that a method assigns."""
    assigned = re.compile(rf"\bself\.{attribute}\b *(:|=[^=]|,)")
    for each in cls.__mro__[:-1]:
        if attribute in getattr(each, "__annotations__", {}):
            return True
        try:
            if assigned.search(inspect.getsource(each)):
                return True
        except (OSError, TypeError):
            continue
    return False


@pytest.mark.parametrize("name", [name for name in NAMES if name.is_in(RELEASE)], ids=lambda name: name.text)
def test_what_we_rely_on_exists(name: Name) -> None:
    """Each name in the tables exists, and takes the parameters that we pass."""
    pytest.importorskip("vllm")
    assert problem(name.text) is None, f"{name.text}: {problem(name.text)}. Its row:\n{name.row}"


def test_names_that_moved_are_listed_for_their_releases() -> None:
    """serve/vllm_api.py and the tables say the same; in each release a name has one place."""
    listed = {(name.text.partition("(")[0], name.since, name.until) for name in NAMES}
    for thing, places in vllm_api.MOVED.items():
        releases = sorted(places, key=number)
        for index, since in enumerate(releases):
            until = "" if since == releases[-1] else f"0.{number(releases[index + 1])[1] - 1}"
            assert (f"{places[since]}:{thing}", since if index else "", until) in listed


def used_in(source: str) -> set[str]:
    """The names of vLLM in a module's code, as the tables write them."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "vllm"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            used |= {f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = DOTTED.fullmatch(node.value) and not node.value.startswith(OURS)
            if dotted or VARIABLE.fullmatch(node.value):
                used.add(node.value)
            for module, imported in IMPORT.findall(node.value):
                used |= {f"{module}:{name}" for name in imported.split(", ")}
    return used


def is_listed(used: str) -> bool:
    # A string names a class by its dotted path, and an import may name a module as a member of its package.
    spellings = {used, used.replace(":", "."), ":".join(used.rsplit(".", 1))}
    return any(name == one or name.startswith((f"{one}.", f"{one}:")) for one in spellings for name in LISTED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_we_use_is_listed(path: Path) -> None:
    """An import of vLLM, a class named in a string and an environment variable each need a row in the tables."""
    used = used_in(path.read_text(encoding="utf-8"))
    unlisted = sorted(name for name in used if not is_listed(name))
    assert unlisted == [], f"list these in {TABLES.relative_to(ROOT)}, with the reason and when they can go"


def test_an_unlisted_import_is_found() -> None:
    """In each of the ways to write it."""
    code = 'import vllm.secret\nfrom vllm.config import Secret\nx = "vllm.secret.Thing"\ny = "VLLM_SECRET"\n'
    code += 'z = "import argparse; from vllm.benchmarks.serve import secret, main; main()"\n'
    unlisted = {name for name in used_in(code) if not is_listed(name)}
    assert unlisted == {
        "vllm.secret", "vllm.config:Secret", "vllm.secret.Thing", "VLLM_SECRET", "vllm.benchmarks.serve:secret"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vllm.secret", "no such module"),
        ("vllm.config:LoRAConfig.secret", "no attribute"),
        ("vllm.logger:init_logger(secret)", "does not take secret"),
        ('vllm.logger "a secret"', "no longer holds"),
        ("VLLM_SECRET", "no such variable"),
    ],
)
def test_a_missing_name_is_found(text: str, why: str) -> None:
    """Each kind of name in the tables."""
    pytest.importorskip("vllm")
    assert why in (problem(text) or "")


def test_every_row_is_complete() -> None:
    """Five columns, or two in the table of public names, none of them empty; each file that is named exists."""
    private, _, public = TABLES.read_text(encoding="utf-8").partition("## Public")
    for text, columns in ((private, 5), (public, 2)):
        for line in text.splitlines():
            if line.startswith("| "):
                cells = [cell.strip() for cell in line.strip("|").split(" | ")]
                assert len(cells) == columns, line
                assert all(cells), line
                for file in re.findall(r"`(\w+/[\w/]+\.py)`", line):
                    assert (ROOT / file).is_file(), f"no such file: {file}\n{line}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_serve_cpu_can_be_deleted(path: Path) -> None:
    """No module outside the folder names its modules; vLLM finds them through entry points."""
    if path.is_relative_to(ROOT / "serve" / "cpu") or path.is_relative_to(ROOT / "benchmarks"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert [name for name in (*strings, *imports) if name.startswith("serve.cpu")] == []


def test_log_privacy_stays_without_serve_cpu() -> None:
    """It has its own entry point."""
    assert 'counsel_log_privacy = "serve.log_privacy:register"' in (ROOT / "pyproject.toml").read_text()
    assert "counsel_log_privacy" in launch.PLUGINS
