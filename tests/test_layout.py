"""The house rules that a machine can hold: import direction, light modules, size, words."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("counsel", "train", "serve", "eval", "loadtest")
ALLOWED = {
    "counsel": {"counsel"},
    "train": {"counsel", "train"},
    "serve": {"counsel", "serve"},
    "eval": {"counsel", "serve", "eval"},
    "loadtest": {"counsel", "loadtest"},
}
# What another package, or a --help, may import without paying for it.
LIGHT = ["counsel.errors", "counsel.cli", "counsel.files", "counsel.run", "counsel.catalog", "counsel.chat",
         "train.data", "counsel.store", "counsel.adapter_check", "serve.config", "counsel.client",
         "train.__main__", "serve.__main__", "eval.__main__", "loadtest.__main__"]  # fmt: skip
HEAVY = ("torch", "transformers", "vllm", "datasets", "trl", "peft", "locust", "sentence_transformers", "matplotlib")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """train <- serve <- {eval, loadtest}; and nobody writes `import eval`, which would rebind the builtin."""
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported_names(path)} & set(PACKAGES)

    assert ours <= ALLOWED[package]
    assert "import eval" not in [line.strip()[:11] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("module", LIGHT)
def test_shared_modules_import_nothing_heavy(module):
    """A shared module, and every command's --help, comes without torch, vllm or locust."""
    probe = f"import sys, {module}; print([h for h in {HEAVY} if h in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)

    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_stay_small_and_say_what_they_do(path):
    """Each module opens with a docstring and fits in one sitting."""
    text = path.read_text(encoding="utf-8")

    assert ast.get_docstring(ast.parse(text)), "the first line says what the module does"
    assert len(text.splitlines()) <= 400


def test_nothing_is_called_a_therapist():
    """The stack is a supportive-conversation research model; its own words never promise therapy."""
    said = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in (*PACKAGES, "docs", "README.md", "demo.py")
        for path in ((ROOT / folder).rglob("*") if (ROOT / folder).is_dir() else [ROOT / folder])
        if path.suffix in {".py", ".md", ".yaml", ".jinja", ".html"}
        for line in path.read_text(encoding="utf-8").splitlines()
        if "therapist" in line.lower()
        and not any(no in line.lower() for no in ("not a therapist", "never", "no therapist"))
    ]
    assert said == []
