"""What deploy/ ships: commands that parse, and a dashboard and rules that name metrics which a server has."""

import dataclasses
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from counsel.cli import load_config, parse_arguments, yaml_file
from serve.__main__ import COMMANDS
from tests.conftest import Served

DEPLOY = Path(__file__).parent.parent / "deploy"


@pytest.fixture(scope="module")
def monitoring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("monitoring", DEPLOY / "monitoring" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_those_that_the_lists_make(monitoring: ModuleType):
    assert monitoring.RULES.read_text() == monitoring.rules()
    assert json.loads(monitoring.DASHBOARD.read_text()) == monitoring.dashboard()


def test_every_metric_is_in_a_live_scrape(monitoring: ModuleType, server: Served):
    scraped = {
        name for family in text_string_to_metric_families(server.call("GET", "/metrics", server.admin_key).text)
        for name in (family.name, f"{family.name}_total", f"{family.name}_bucket")
    }  # fmt: skip
    assert monitoring.metrics() <= scraped


def containers(node: object) -> Iterator[list[str]]:
    """Each list of arguments that a container is started with, in a compose file or a Kubernetes manifest."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key in ("command", "args") and isinstance(value, list)
                    and value[:1] == ["serve"])  # fmt: skip
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from containers(child)


def started() -> list[tuple[str, list[str]]]:
    found = []
    for file in (DEPLOY / "compose" / "compose.yaml", *sorted(DEPLOY.glob("kubernetes/*.yaml"))):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            found += [(file.name, words) for words in containers(document)]
    for file in sorted(DEPLOY.glob("docker/Dockerfile.*")):
        found += [(file.name, json.loads(words)) for words in re.findall(r'^CMD (\["serve".*)', file.read_text(), re.M)]
    for file in sorted(DEPLOY.glob("systemd/*.service")):
        found += [(file.name, shlex.split(line)) for line in
                  re.findall(r"^ExecStart=\S+/counsel (.+)", file.read_text(), re.M)]  # fmt: skip
    return found


STARTED = started()


def test_all_kinds_of_files_start_something():
    assert {name.rpartition(".")[2] for name, _ in STARTED} == {"yaml", "cpu", "cuda", "service"}


@pytest.mark.parametrize(("file", "words"), STARTED, ids=[f"{file}: {' '.join(words)[:60]}" for file, words in STARTED])
def test_what_is_started_parses(file: str, words: list[str]):
    words = [word.replace("$(POD_IP)", "10.0.0.5") for word in words]

    chosen, schema, flags = parse_arguments("serve", COMMANDS, words[1:])

    flags.pop("json")
    given = {key: value for key, value in flags.items() if value is not None}
    if yaml_file(given.pop("config", None), chosen.presets) is None:
        assert dataclasses.is_dataclass(load_config(schema, None, given))
