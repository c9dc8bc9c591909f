"""One real server for the whole session: vLLM on a tiny random Gemma-2, with two adapters published."""

import contextlib
import http.client
import json
import os
import re
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from counsel import store as adapter_store
from counsel.catalog import Base, resolve
from counsel.client import make_client
from serve.config import ServeConfig
from serve.keys import ADMIN, USER, add_key
from serve.server import Server
from tests.tiny import tiny_adapter, tiny_base
from tests.waiting import until

# TRL sets ERROR when it is imported. Without this, a server's warnings would depend on the tests that ran before.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")

# How often each test ran in this session.
RUNS: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    RUNS[report.nodeid] += report.when == "setup"


def repeated_tests() -> list[str]:
    return [test for test, times in RUNS.items() if times > 1]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that passes when repeated has failed once: no plugin may repeat one silently."""
    if repeated_tests():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test in repeated_tests():
        terminalreporter.write_line(f"FAILED {test} - ran {RUNS[test]} times; it must run once")


SYSTEM = "you are supportive"
ORIGIN = "https://app.example"
# So short that a prompt of a few sentences takes several steps.
SHORT_STEPS = "--max-num-batched-tokens 128"


@dataclass(frozen=True)
class Served:
    """A running server and what a test needs to know about it. `adapters`: name -> the adapter's source folder.

    `gentle` has SYSTEM as its system prompt, `calm` has none.
    """

    server: Server
    base: Base
    store: Path
    adapters: dict[str, Path]
    user_key: str
    admin_key: str

    @property
    def base_url(self) -> str:
        return self.server.base_url

    @property
    def logs(self) -> Path:
        return self.server.config.log_dir

    def client(self) -> openai.OpenAI:
        return make_client(self.base_url, self.user_key)

    def log_rows(self, name: str, complete: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The rows of a log once they are `complete`: a row may be written just after its answer is sent."""

        def read() -> list[dict[str, Any]]:
            # Text after the last newline is still being written.
            return [json.loads(line) for line in (self.logs / name).read_text().split("\n")[:-1]]

        until(lambda: complete(read()))
        return read()

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        request = urllib.request.Request(
            self.base_url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {self.admin_key}"}
        )
        with urllib.request.urlopen(request) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.split("[{ ]", line, maxsplit=1)[0] == name)

    def call(self, method: str, path: str, key: str = "", **options: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        url = self.base_url.removesuffix("/v1") + path
        return httpx.request(method, url, headers=headers, timeout=60, **options)

    def send(self, key: str, **fields: object) -> http.client.HTTPConnection:
        """Send a chat request without waiting for its answer; closing the connection cancels it."""
        return self.send_to("/v1/chat/completions", key, {}, **fields)

    def send_to(self, path: str, key: str, headers: dict[str, str], **fields: object) -> http.client.HTTPConnection:
        """The same for another route, with more headers."""
        address = urllib.parse.urlsplit(self.base_url)
        connection = http.client.HTTPConnection(address.hostname, address.port)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
        connection.request("POST", path, json.dumps(fields), headers)
        return connection

    @contextlib.contextmanager
    def engine_suspended(self) -> Iterator[None]:
        """Suspend the engine's processes but not the API process: no answer comes until this ends."""
        engine = psutil.Process(self.server.pid).children(recursive=True)
        for process in engine:
            process.suspend()
        try:
            yield
        finally:
            for process in engine:
                process.resume()

    def publish(self, name: str, folder: Path, system: str = "") -> adapter_store.Manifest:
        return adapter_store.publish(self.store, name, folder, self.base, system=system)


def tiny_config(folder: Path, base: Path, **changes: object) -> ServeConfig:
    """A server small enough to run beside others; float32, so that its greedy text equals PEFT's."""
    small: dict[str, object] = {
        "model": str(base),
        "store": str(folder / "store"),
        "logs": str(folder / "logs"),
        "port": 0,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "kv_cache_memory_gb": 0.1,
        "max_loras": 2,
        "max_cpu_loras": 4,
        "max_lora_rank": 16,
        "drain_s": 5.0,
        "leave_s": 0.0,
        "safety": "off",
        "compile": False,  # compiling two tiny layers takes longer than any test
    }
    return ServeConfig(**{**small, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny random Gemma-2 that the session's server serves."""
    return resolve(str(tiny_base(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture(scope="session")
def server(tiny_model: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The session's server; starting it takes about 35 s."""
    folder = tmp_path_factory.mktemp("serve")
    keys = folder / "keys.txt"
    user_key, admin_key = add_key(keys, USER, "tests"), add_key(keys, ADMIN, "root")
    adapters = {
        name: tiny_adapter(tiny_model.path, folder / name, seed=seed) for name, seed in (("gentle", 1), ("calm", 2))
    }
    bounds = {"max_body_kb": 64, "max_completion_tokens": 256, "key_running": 64, "key_queued": 16, "queued": 128}
    options = {
        "ui": True,
        "votes": str(folder / "votes"),
        "allowed_origins": (ORIGIN,),
        "vllm_args": SHORT_STEPS,
        "compile": True,
    }
    config = tiny_config(folder, tiny_model.path, keys=str(keys), **options, **bounds)
    for name, source in adapters.items():
        adapter_store.publish(Path(config.store), name, source, tiny_model, system=SYSTEM if name == "gentle" else "")
    with Server(config, quiet=True) as running:
        yield Served(running, tiny_model, Path(config.store), adapters, user_key, admin_key)
