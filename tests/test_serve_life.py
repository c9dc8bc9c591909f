"""The life of a server as a user starts it: ready, killed, back with its adapters, told to stop while it answers."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest

from serve.client import make_client
from serve.server import Server
from tests.conftest import tiny_config
from tests.tiny import tiny_adapter
from train import store as shelves
from train.catalog import Base
from train.errors import UserError

ASK = [{"role": "user", "content": "listen"}]
LONG = {"ignore_eos": True}


def start(base: Base, folder: Path, port: int, *flags: str) -> subprocess.Popen[str]:
    """`python -m serve` as a user runs it, with a store of one adapter."""
    words = [sys.executable, "-m", "serve", "--model", str(base.path), "--store", str(folder / "store")]
    words += ["--port", str(port), "--logs", str(folder / "logs"), "--dtype", "float32", "--context-tokens", "512"]
    words += ["--kv-gb", "0.1", "--running", "8", *flags]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(client: openai.OpenAI, model: str, process: subprocess.Popen[str], within_s: float = 600) -> None:
    """Until `model` answers."""
    deadline_s = time.monotonic() + within_s
    while True:
        try:
            client.chat.completions.create(model=model, messages=ASK, max_completion_tokens=1)
            return
        except (openai.APIConnectionError, openai.InternalServerError):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline_s
            time.sleep(0.3)


@pytest.mark.slow
def test_it_comes_back_with_its_adapters_and_stops_without_cutting_answers(tiny_model, tmp_path):
    """The worker is killed: the server is back, adapter included. SIGTERM: what runs ends, what comes is refused."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shelves.publish(tmp_path / "store", "calm", tiny_adapter(tiny_model.path, tmp_path / "a", seed=2), tiny_model)
    process = start(tiny_model, tmp_path, port, "--drain-s", "20")
    client = make_client(f"http://127.0.0.1:{port}/v1")
    try:
        wait_for(client, "calm", process)
        children = psutil.Process(process.pid).children(recursive=True)
        max(children, key=lambda child: child.memory_info().rss).kill()
        with pytest.raises(openai.OpenAIError):
            client.chat.completions.create(model="calm", messages=ASK, max_completion_tokens=300, extra_body=LONG)
        wait_for(client, "calm", process)

        long = {"model": "calm", "messages": ASK, "max_completion_tokens": 300, "extra_body": LONG}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = [pool.submit(client.chat.completions.create, **long) for _ in range(4)]
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                client.chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1)
            assert [answer.result().usage.completion_tokens for answer in running] == [300] * 4
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.splitlines()[-1].endswith('"restarts": 1}')
    assert "starting it again" in err
    assert not [child for child in children if psutil.pid_exists(child.pid)]


@pytest.mark.slow
def test_a_child_that_cannot_start_says_why_at_once(tiny_model, tmp_path):
    """Too little memory for one request of full length: exit 1 with vLLM's own reason, and nothing left running."""
    process = start(tiny_model, tmp_path, 0, "--vllm-args=--max-model-len 100000000")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("error: the server did not start: ")
    assert "max_model_len" in err.splitlines()[-1]
    assert out == ""


@pytest.mark.slow
def test_a_server_ends_with_its_parent(tiny_model, tmp_path):
    """A parent killed without warning leaves no engine behind."""
    code = (
        "import sys, time; from pathlib import Path; from serve.server import Server\n"
        "from tests.conftest import tiny_config\n"
        f"server = Server(tiny_config(Path({str(tmp_path)!r}), Path({str(tiny_model.path)!r})), quiet=True)\n"
        "server.start(); print(server.pid, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    left = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline_s = time.monotonic() + 120
    while [one for one in left if psutil.pid_exists(one)]:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_stopping_what_never_started_is_no_error(tiny_model, tmp_path):
    """A server that was refused or not yet started can be stopped."""
    server = Server(tiny_config(tmp_path, tiny_model.path), quiet=True)
    server.stop()
    with pytest.raises(UserError, match="no base model or folder"):
        Server(tiny_config(tmp_path, Path("nowhere-at-all")))
