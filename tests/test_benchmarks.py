"""Every benchmark starts, and benchmarks/README.md lists it."""

import re
import subprocess
import sys

import pytest

from tests.train_runs import ROOT

FOLDER = ROOT / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
BENCHMARKS = sorted(name for name, source in SOURCES.items() if '\nif __name__ == "__main__":' in source)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_starts_and_is_listed(name: str) -> None:
    """It runs from a checkout, has a row in the table, and a list of its keys."""
    argv = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert f" | {name} | " in README
    assert f"- **{name}**: `processor`" in README


def test_the_make_targets_that_the_readme_names_exist() -> None:
    """And each target that runs a benchmark is named there."""
    targets = re.findall(r"^([\w-]+):.*\n\t@?\$\(BIN\)/python -m benchmarks", (ROOT / "Makefile").read_text(), re.M)

    assert targets
    assert set(re.findall(r"`make ([\w-]+)", README)) == set(targets)


def test_the_keys_that_the_readme_lists_are_in_the_code() -> None:
    """A key may be added, but not renamed or removed."""
    keys = re.findall(r"`(\w+)`", README.partition("## Keys")[2])
    code = "\n".join(SOURCES.values())
    composed = {"clock", "cpu_api", "cpu_engine_core", "cpu_worker", "ttft", "tpot", "throughput", "_closed", "_open"}

    assert len(keys) > 60
    assert [key for key in keys if key not in composed and f'"{key}"' not in code] == []
