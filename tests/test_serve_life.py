"""A server as a user runs it: it starts, survives a killed worker, and stops while it answers."""

import concurrent.futures
import contextlib
import errno
import http.server
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from benchmarks.gateway_overhead import model_process
from counsel import store as adapter_store
from counsel.catalog import Base
from counsel.client import make_client
from counsel.errors import UserError
from serve import supervise
from serve.server import Server
from tests.conftest import tiny_config
from tests.tiny import tiny_adapter
from tests.waiting import HANG_S, is_alive, until

ASK = [{"role": "user", "content": "listen"}]
LONG = {"ignore_eos": True}


SERVE = ("-m", "serve")
# The same command, but one miss of 60 s counts as a hang.
IMPATIENT = (
    "-c",
    "import sys, serve.supervise as s; s.HEALTH_EVERY_S, s.HEALTH_WAIT_S, s.HEALTH_MISSES = 1.0, 60.0, 1\n"
    "from serve.__main__ import COMMANDS; from counsel.cli import main; sys.exit(main('serve', COMMANDS))",
)


class Small(Server):
    """A server whose child is not vLLM but a few lines that answer /health, so it is ready at once."""

    code = (
        "import http.server, os, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.send_header('x-counsel-instance', os.environ['COUNSEL_INSTANCE']); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )

    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-c", self.code, str(self.config.port))


class Doomed(Small):
    """A server whose child dies with a reason."""

    code = "raise ValueError('no weights')"


def start(base: Base, folder: Path, *flags: str, how: tuple[str, ...] = SERVE) -> subprocess.Popen[str]:
    """`python -m serve` as in a terminal (its own process group), with a store of one adapter."""
    words = [sys.executable, *how, "--model", str(base.path), "--store", str(folder / "store")]
    words += ["--port", "0", "--logs", str(folder / "logs"), "--dtype", "float32", "--max-model-len", "512"]
    words += ["--kv-cache-memory-gb", "0.1", "--max-num-seqs", "8", "--no-compile", "--safety", "off", *flags]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # If the tests run in the background, they ignore Ctrl-C, and this child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def address_of(process: subprocess.Popen[str]) -> str:
    """The server's address, which it prints before it starts its child."""
    for line in process.stderr:
        if match := re.search(r"on (http://[^/]+)/v1", line):
            return match[1]
    pytest.fail("the server ended without an address")


def answers(client: openai.OpenAI, model: str, process: subprocess.Popen[str]) -> bool:
    """Whether `model` answers. Fails if the server's command has ended."""
    try:
        client.chat.completions.create(model=model, messages=ASK, max_completion_tokens=1)
    except (openai.APIConnectionError, openai.InternalServerError):
        assert process.poll() is None, process.stderr.read()
        return False
    return True


@pytest.mark.slow
def test_it_comes_back_with_its_adapters_and_stops_without_cutting_answers(tiny_model, tmp_path):
    """A killed worker: the server returns with its adapter. SIGTERM: running answers end, new requests are refused."""
    adapter_store.publish(tmp_path / "store", "calm", tiny_adapter(tiny_model.path, tmp_path / "a", seed=2), tiny_model)
    process = start(tiny_model, tmp_path, "--drain-s", "600")
    address = address_of(process)
    port = address.rsplit(":", 1)[1]
    client = make_client(f"{address}/v1")

    def is_refused() -> bool:
        try:
            client.with_options(timeout=1).chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1)
        except openai.APITimeoutError:
            return False  # accepted, and waiting for the worker
        except openai.InternalServerError:
            return True
        return False

    try:
        until(lambda: answers(client, "calm", process))
        # CORS is off by default, so no page of another origin may read an answer.
        origin = {"Origin": "https://elsewhere.example"}
        assert "access-control-allow-origin" not in httpx.get(f"{address}/v1/models", headers=origin).headers
        asked = {**origin, "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{address}/v1/chat/completions", headers=asked).status_code == 405

        # Without keys, only this machine's names are accepted: a page can lead a browser here by another name.
        for host, status in (
            ("evil.example", 403),
            (f"evil.example:{port}", 403),
            ("", 403),
            (f"localhost:{port}", 200),
        ):
            assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == status

        keeper = psutil.Process(process.pid)
        children = keeper.children(recursive=True)
        # The supervisor is suspended until the request has failed.
        keeper.suspend()
        model_process(children).kill()
        with pytest.raises(openai.OpenAIError):
            client.chat.completions.create(model="calm", messages=ASK, max_completion_tokens=300, extra_body=LONG)
        keeper.resume()
        until(lambda: answers(client, "calm", process))

        # The worker is suspended, so that all 60 answers are running when the signal arrives.
        worker = model_process(psutil.Process(process.pid).children(recursive=True))
        worker.suspend()
        long = {"model": "calm", "messages": ASK, "max_completion_tokens": 450, "n": 12, "extra_body": LONG}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = [pool.submit(client.chat.completions.create, **long) for _ in range(5)]
            until(lambda: "counsel_sequences_in_flight 60.0" in httpx.get(f"{address}/metrics").text)
            process.send_signal(signal.SIGTERM)
            until(is_refused)
            worker.resume()
            assert [answer.result().usage.completion_tokens for answer in running] == [12 * 450] * 5
        out, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.splitlines()[-1].endswith('"restarts": 1}')
    assert "starting it again" in err
    until(lambda: not any(map(is_alive, children)))


@pytest.mark.slow
def test_a_hung_server_is_replaced_and_ctrl_c_ends_it_cleanly(tiny_model, tmp_path):
    """A suspended API process: the server is replaced. Ctrl-C: one line, status 0, no process left."""
    adapter_store.publish(tmp_path / "store", "calm", tiny_adapter(tiny_model.path, tmp_path / "a", seed=2), tiny_model)
    process = start(tiny_model, tmp_path, how=IMPATIENT)
    client = make_client(f"{address_of(process)}/v1", timeout_s=HANG_S)
    try:
        # Not after its first answer: until the command has seen the server ready, it does not watch for hangs.
        assert any("ready after" in line for line in process.stderr)
        children = psutil.Process(process.pid).children(recursive=True)
        psutil.Process(process.pid).children()[0].suspend()
        until(lambda: answers(client, "calm", process))
        children += psutil.Process(process.pid).children(recursive=True)
        # To the whole foreground group, as a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.splitlines()[-1].endswith('"restarts": 1}')
    assert "it hangs: no answer from /health" in err
    assert err.splitlines()[-1] == "stopping: running requests may finish first"
    assert "Traceback" not in err
    until(lambda: not any(map(is_alive, children)))


@pytest.mark.slow
def test_a_child_that_cannot_start_says_why_at_once(tiny_model, tmp_path):
    """Too little memory for one request of full length: exit 1 with vLLM's own reason."""
    process = start(tiny_model, tmp_path, "--vllm-args=--max-model-len 100000000")
    out, err = process.communicate(timeout=HANG_S)
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
    left = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until(lambda: not any(map(is_alive, left)))


def test_a_child_that_stops_answering_is_killed_and_replaced(tiny_model, tmp_path, monkeypatch):
    """A stopped process neither ends nor answers; the parent notices through /health."""
    for name, value in (("HEALTH_EVERY_S", 0.1), ("HEALTH_WAIT_S", 2.0), ("HEALTH_MISSES", 2), ("FIRST_PAUSE_S", 0.1)):
        monkeypatch.setattr(supervise, name, value)
    server, stop = Small(tiny_config(tmp_path, tiny_model.path), quiet=True), threading.Event()
    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as after:
        server.start()
        after.callback(server.kill)
        after.callback(stop.set)
        first = psutil.Process(server.pid)
        keeper = pool.submit(supervise.supervise, server, stop)
        first.suspend()
        until(lambda: server.pid != first.pid and server.health(5) == "up")
        stop.set()
        keeper.result()
        assert server.restarts >= 1
        assert not is_alive(first)


class Squatted(Small):
    """A server whose child never listens, while another program on its port answers /health with 200."""

    code = "import time; time.sleep(600)"


def test_a_stranger_on_the_port_is_not_taken_for_the_server(tiny_model, tmp_path):
    """An answer from /health counts only if it comes from the child, so the server never counts as ready."""
    server = Squatted(tiny_config(tmp_path, tiny_model.path, start_s=3.0), quiet=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", server.config.port), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        assert httpx.get(f"http://127.0.0.1:{server.config.port}/health").status_code == 200
        with pytest.raises(UserError, match="not ready after 3 s"):
            server.start()
        stranger.shutdown()


class Stranger(http.server.BaseHTTPRequestHandler):
    """Answers every GET with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def test_a_parent_without_file_handles_does_not_restart_a_healthy_server(tiny_model, tmp_path):
    """If the parent cannot ask, the health is unknown."""
    server = Small(tiny_config(tmp_path, tiny_model.path), quiet=True)
    with contextlib.ExitStack() as after:
        server.start()
        after.callback(server.kill)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        after.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        assert server.health(HANG_S) == "unknown"
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert server.health(HANG_S) == "up"
        server.kill()
        assert server.health(HANG_S) == "down"


def test_process_1_reaps_orphans_but_not_its_child():
    """No orphan stays a zombie, and the watched child keeps its exit status."""
    code = (
        "import ctypes, subprocess, sys, psutil\n"
        "from serve.supervise import reap_orphans\n"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us, as to process 1\n"
        "child = subprocess.Popen([sys.executable, '-c', 'raise SystemExit(7)'])\n"
        "subprocess.run(['sh', '-c', 'true & true & exec true'], check=True)\n"
        "while [orphan for orphan in psutil.Process().children() if orphan.pid != child.pid]:\n"
        "    reap_orphans({child.pid})\n"
        "assert child.wait() == 7\n"
        "reap_orphans(set())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr


def test_a_restart_that_finds_a_full_disk_is_tried_again(tiny_model, tmp_path, monkeypatch, capsys):
    """An error of the operating system is a failed start, and does not end the supervisor."""
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.01)
    server = Doomed(tiny_config(tmp_path, tiny_model.path, restarts=2), quiet=True)
    with pytest.raises(UserError, match="did not start"):
        server.start()

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server, "start", full)
    with pytest.raises(UserError, match="failed 3 times"):
        supervise.supervise(server, threading.Event())
    assert capsys.readouterr().err.count("No space left on device") == 2


def test_a_server_that_keeps_dying_ends_with_its_reason(tiny_model, tmp_path, monkeypatch, capsys):
    """Two restarts are allowed; the third failure ends the supervisor with the child's own error."""
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.01)
    server = Doomed(tiny_config(tmp_path, tiny_model.path, restarts=2), quiet=True)
    with pytest.raises(UserError, match="did not start: ValueError: no weights"):
        server.start()
    with pytest.raises(UserError, match="failed 3 times in 10 min; last: ValueError: no weights"):
        supervise.supervise(server, threading.Event())
    assert capsys.readouterr().err.count("starting it again") == 2


def test_a_broken_version_in_the_store_does_not_keep_the_server_from_starting(tiny_model, tmp_path):
    """The plan reads ranks only for its reasons."""
    broken = tmp_path / "store" / "broken" / ("0" * 12)
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    assert Server(tiny_config(tmp_path, tiny_model.path), quiet=True).plan().argv


def test_a_server_that_never_started_can_be_stopped(tiny_model, tmp_path):
    """Stopping it does nothing, and a refused server has nothing to stop."""
    server = Server(tiny_config(tmp_path, tiny_model.path), quiet=True)
    server.stop()
    with pytest.raises(UserError, match="no base model or folder"):
        Server(tiny_config(tmp_path, Path("nowhere-at-all")))
