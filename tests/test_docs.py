"""Every command, option, make target and file that README and docs name exists."""

import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from counsel.cli import FOLDERS, Command, flag_of, load_config, parse_arguments, yaml_file

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
PAGES = sorted(page for page in PAGES if page.name != "CHANGELOG.md")
BLOCK = re.compile(r"^```\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
OURS = re.compile(rf"^(?:counsel|python -m|\.venv/bin/counsel) ({'|'.join(FOLDERS)})(?= |$)")
# Options of other programs that the pages name: vLLM's, accelerate's, and those of clients.
OTHERS = {
    "--block-size", "--enable-auto-tool-choice", "--tool-call-parser", "--distributed-executor-backend", "--worker-cls",
    "--config_file", "--num_processes", "--no-stream", "--version", "--help", "--scheduler-cls", "--model-impl",
    "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port", "--no-build-isolation",
}  # fmt: skip
# Files that a run or a user makes, and folders of other programs.
MADE = ("runs/", "store/", "org/", "base/", "data/", "~/", "<", "v1/")


def folder_commands(folder: str) -> dict[str, Command]:
    return importlib.import_module(f"{folder}.__main__").COMMANDS


def lines_of(page: Path) -> list[str]:
    """Each line of the plain code blocks."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def code(page: Path) -> Iterator[str]:
    """Each line of a plain code block, and each code span."""
    yield from lines_of(page)
    yield from (" ".join(span.split()) for span in SPAN.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))))


def commands_in(page: Path) -> list[str]:
    parts = (part.strip() for line in lines_of(page) for part in re.split(r";| do |&&", line))
    return sorted({part for part in parts if OURS.match(part)})


ALL_COMMANDS = sorted({(str(page.relative_to(ROOT)), command) for page in PAGES for command in commands_in(page)})


@pytest.mark.parametrize(("page", "command"), ALL_COMMANDS, ids=[f"{page}: {said}" for page, said in ALL_COMMANDS])
def test_a_command_in_the_docs_is_one_that_parses(page: str, command: str, monkeypatch: pytest.MonkeyPatch):
    """Its options exist and their values are of the right type; a YAML file it names from the checkout is read."""
    monkeypatch.chdir(ROOT)
    folder, words = OURS.match(command)[1], shlex.split(command, comments=True)[command.startswith("python") + 2 :]
    if words[:1] == ["--help"]:
        return

    chosen, schema, flags = parse_arguments(folder, folder_commands(folder), words)

    file = yaml_file(flags.pop("config", None), chosen.presets)
    flags.pop("json")
    if file is None or (ROOT / file).exists():
        given = {key: value for key, value in flags.items() if value is not None}
        needed = {
            field.name: "x" for field in dataclasses.fields(schema)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }  # fmt: skip
        load_config(schema, file, {**needed, **given})


def options_of_ours() -> set[str]:
    """Every option of every command."""
    named: set[str] = set()
    for folder in FOLDERS:
        for command in folder_commands(folder).values():
            for field in dataclasses.fields(command.schema):
                flag = flag_of(field)
                named |= {flag, f"--no-{flag[2:]}"}
    return named | {"--config", "--json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_targets_and_files_in_the_docs_exist(page: Path):
    """In code blocks and spans: `--option`, `make target`, and paths with a slash that look like files of ours."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = options_of_ours() | OTHERS
    for line in code(page):
        said = line.partition("  #")[0]
        if not re.match(r"(accelerate|pip|git|docker|kubectl|\.venv/bin/python -m pytest|python -m benchmarks)", said):
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", said)) <= known, said
        for target in re.findall(r"\bmake ([a-z][a-z-]+)", said):
            assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
        for module in re.findall(r"python -m (benchmarks\.[a-z_]+)", said):
            assert importlib.util.find_spec(module), module
        for path in re.findall(r"(?<![\w./<~-])((?:[\w.-]+/)+[\w.-]*\w)(?![\w/{*<])", said):
            if path.split("/")[0] in {entry.name for entry in ROOT.iterdir()} and not path.startswith(MADE):
                assert (ROOT / path).exists(), path


def test_links_between_pages_lead_somewhere():
    """Every relative link of README and docs."""
    for page in (*PAGES, *ROOT.glob("docs/lab/*.md")):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
