"""The rules of the code base that a test can check: imports, cycles, boundaries, names, module size, words."""

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("counsel", "train", "serve", "eval", "loadtest")
# `counsel` starts the others' `__main__` by name (counsel/__main__.py), and imports none of their code.
ALLOWED = {
    "counsel": {"counsel"},
    "train": {"counsel", "train"},
    "serve": {"counsel", "serve"},
    "eval": {"counsel", "serve", "eval"},
    "loadtest": {"counsel", "loadtest"},
}
# The CPU paths can be deleted as a whole: (importing module, imported module) is all that has to be undone in the code.
# vLLM enters serve/cpu by the entry points in pyproject.toml alone.
CPU_PATHS = ("serve.cpu", "train.cpu")
SEAMS = {
    ("train.sft", "train.cpu.loss"),
    ("train.sft", "train.cpu.proof"),
    ("train.trainer", "train.cpu.proof"),
}
# Other packages, and every --help, import these without paying for what they do.
LIGHT = ["counsel.errors", "counsel.cli", "counsel.values", "counsel.files", "counsel.run", "counsel.catalog",
         "counsel.chat", "counsel.store", "counsel.adapter_check", "counsel.client", "counsel.__main__",
         "counsel.cache", "counsel.gguf", "counsel.tensors", "counsel.manifest", "counsel.trial", "counsel.fingerprint",
         "counsel.lora_layers", "counsel.report", "counsel.report.charts", "counsel.contacts",
         "counsel.minilm", "counsel.safety.detector", "counsel.safety.labels",
         "train.data", "serve.config",
         "train.__main__", "serve.__main__", "eval.__main__", "loadtest.__main__"]  # fmt: skip
HEAVY = ("torch", "transformers", "vllm", "datasets", "trl", "peft", "locust", "sentence_transformers", "matplotlib")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Public names that several modules share on purpose.
ONE_NAME = {
    "main": "the entry point of a process or a console script",
    "register": "the function that a plugin registry calls",
    "publish": "serve/commands.py: the command around the store's function",
    "pin": "serve/commands.py: the command around the store's function",
    "remove": "serve/commands.py: the command around the store's function",
    "rollback": "serve/commands.py: the command around the store's function",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


BY_NAME = {module_name(path): path for path in MODULES}


def imported_names(path: Path, at_import_only: bool = False) -> set[str]:
    """Modules that a file imports; of the project's own, the submodule where a name is one."""
    names: set[str] = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), at_import_only):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(BY_NAME)
            names |= submodules or {node.module}
    return names


def _nodes(tree: ast.AST, at_import_only: bool) -> Iterator[ast.AST]:
    """All nodes, or those outside functions and `if TYPE_CHECKING:`, which an import of the module runs."""
    for node in ast.iter_child_nodes(tree):
        yield node
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (at_import_only and deferred):
            yield from _nodes(node, at_import_only)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """counsel <- train, counsel <- serve <- eval, counsel <- loadtest; `import eval` would rebind the builtin."""
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported_names(path)} & set(PACKAGES)

    assert ours <= ALLOWED[package]
    assert "import eval" not in [line.strip()[:11] for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_modules_import_each_other_in_a_circle():
    """Not even a long one: each module can be read after those that it imports."""
    graph = {name: imported_names(path, at_import_only=True) & set(BY_NAME) for name, path in BY_NAME.items()}
    assert ("train.sft", "train.recipe") in {(name, other) for name, others in graph.items() for other in others}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("cpu_path", CPU_PATHS)
def test_the_cpu_paths_are_entered_through_named_seams(cpu_path):
    """Imports inside functions count too."""
    entered = {
        (name, imported)
        for name, path in BY_NAME.items()
        if not name.startswith(cpu_path)
        for imported in imported_names(path)
        if imported.startswith(cpu_path)
    }
    assert entered <= SEAMS


def test_public_names_mean_one_thing():
    """No two modules have a public function or class of the same name, so that a search finds what it means."""
    modules = defaultdict(list)
    for name, path in BY_NAME.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                modules[node.name].append(name)
    alike = {name: where for name, where in modules.items() if len(where) > 1 and name not in ONE_NAME}

    assert not alike, "rename one of each"


@pytest.mark.parametrize("module", LIGHT)
def test_shared_modules_import_nothing_heavy(module):
    """Shared modules and every command's --help come without torch, vllm or locust."""
    probe = f"import sys, {module}; print([h for h in {HEAVY} if h in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)

    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_stay_small_and_say_what_they_do(path):
    """Each module opens with a docstring and has at most 400 lines."""
    text = path.read_text(encoding="utf-8")

    assert ast.get_docstring(ast.parse(text)), "the first line says what the module does"
    assert len(text.splitlines()) <= 400


def test_nothing_is_called_a_therapist():
    """The stack is a supportive-conversation research model; its own words never promise therapy."""
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in (*PACKAGES, "docs", "README.md", "demo.py")
        for path in ((ROOT / folder).rglob("*") if (ROOT / folder).is_dir() else [ROOT / folder])
        if path.suffix in {".py", ".md", ".yaml", ".jinja", ".html"}
        # What people write to be understood is not ours to reword.
        and not path.is_relative_to(ROOT / "counsel/safety/data")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "therapist" in line.lower()
        and not any(no in line.lower() for no in ("not a therapist", "never", "no therapist"))
    ]
    assert lines == []
