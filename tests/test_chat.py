"""`python -m serve chat` continues after Ctrl-C, after a refused request and when the model's context is full."""

import http.server
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import pytest

from counsel.errors import UserError
from serve.chat import Chat, chat
from tests.json_handler import JsonHandler
from tests.test_layout import ROOT
from tests.waiting import HANG_S, until

# vLLM's error for a conversation that is too long, and the gateway's for a request above a limit.
TOO_LONG = {"message": "This model's maximum context length is 8 tokens. However, you requested more.", "code": 400}
TOO_MANY = {"message": "too many requests", "code": "rate_limit_exceeded"}
CARDS = [{"id": "base", "object": "model"}, {"id": "gentle", "object": "model", "parent": "base"}]


class Api(JsonHandler):
    """Lists two models and echoes each question; `long` is too long, `no` is refused, `wait` stops halfway."""

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": CARDS})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turns = [message["content"] for message in body["messages"]]
        self.server.seen.append(turns)
        if len(turns) > self.server.n_fitting or turns[-1] == "long":
            return self.reply(400, {"error": TOO_LONG})
        if turns[-1] == "no":
            return self.reply(429, {"error": TOO_MANY})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("you ", "said ", turns[-1]):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
            if word == "said " and turns[-1] == "wait":
                self.server.hung_up.wait()  # the rest is never sent
                return None
        self.wfile.write(b"data: [DONE]\n\n")
        return None


@pytest.fixture
def api():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.seen, server.n_fitting, server.hung_up = [], 100, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.hung_up.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def talk(api, monkeypatch):
    """Type lines into a chat with the server; return its JSON document."""

    def say(*lines: str, **options: str):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return chat(Chat(url=api.url, **options)).document

    return say


def test_a_conversation_carries_its_turns(talk, api, capsys):
    """Each line is sent with the turns before it, to the first adapter unless another model is named."""
    assert talk("hi", "how are you", "", "never read") == {"model": "gentle", "turns": 2}
    assert api.seen == [["hi"], ["hi", "you said hi", "how are you"]]
    assert capsys.readouterr().out == "you said hi\nyou said how are you\n"
    assert talk("hi", model="base", system="be kind")["model"] == "base"
    assert api.seen[-1] == ["be kind", "hi"]


def test_an_unknown_model_is_an_error_before_the_first_line(talk, api):
    """The error suggests the nearest name. An exact version is accepted although it is not listed."""
    with pytest.raises(UserError, match=r"the server has no model 'gentel'; did you mean 'gentle'\?"):
        talk("hi", model="gentel")
    assert api.seen == []
    assert talk("hi", model="gentle@0123456789ab")["turns"] == 1


def test_a_refused_request_ends_a_turn_not_the_conversation(talk, api, capsys):
    """The reason is printed, and the refused line is not sent again."""
    assert talk("hi", "no", "so")["turns"] == 2
    assert api.seen[-1] == ["hi", "you said hi", "so"]
    assert "the server refused: too many requests" in capsys.readouterr().err


def test_a_conversation_longer_than_the_model_loses_its_oldest_turns(talk, api, capsys):
    """The system text is kept. A line that is too long on its own is refused, and the earlier turns are kept."""
    api.n_fitting = 4
    assert talk("one", "two", "three", "long", "four", system="be kind")["turns"] == 4
    assert api.seen[2] == ["be kind", "one", "you said one", "two", "you said two", "three"]
    assert api.seen[3] == ["be kind", "two", "you said two", "three"]
    err = capsys.readouterr().err
    assert "the oldest turns no longer fit the model" in err
    assert "the server refused: This model's maximum context length is 8 tokens" in err
    assert api.seen[-1] == ["be kind", "three", "you said three", "four"]


@pytest.fixture
def command(api):
    """Start `serve chat`; processes that are still running at the end are killed."""
    started: list[subprocess.Popen] = []

    def start(**streams) -> subprocess.Popen:
        words = [sys.executable, "-m", "serve", "chat", "gentle", "--url", api.url]
        started.append(
            subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, "TERM": "xterm", "INPUTRC": os.devnull}, stderr=subprocess.DEVNULL,
                # A background job ignores Ctrl-C, and its children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **streams,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def read_until(stream: int, promise: Callable[[bytes], bool], shown: bytes = b"") -> bytes:
    """Read until `promise` holds for everything shown so far; return that."""
    while not promise(shown):
        ready, _, _ = select.select([stream], [], [], HANG_S)
        assert ready, f"silent for {HANG_S:.0f} s after {shown!r}"
        piece = os.read(stream, 1000)
        assert piece, f"ended after {shown!r}"
        shown += piece
    return shown


def test_ctrl_c_ends_an_answer_and_the_conversation_continues(api, command):
    """The part of the answer that had arrived is sent with the next question."""
    process = command(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"wait\n")
    process.stdin.flush()
    read_until(process.stdout.fileno(), b"you said ".__eq__)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(b"and then\n", timeout=HANG_S)

    assert process.returncode == 0
    assert api.seen == [["wait"], ["wait", "you said ", "and then"]]
    assert json.loads(out.splitlines()[-1]) == {"model": "gentle", "turns": 2}


def test_lines_are_edited_in_a_terminal(api, command):
    """Left moves within the line, Up recalls the previous one; Ctrl-C discards the line, Ctrl-D ends the chat."""
    ours, theirs = pty.openpty()
    process = command(stdin=theirs, stdout=theirs)
    os.close(theirs)
    shown = b""

    def until_prompt(n: int) -> None:
        nonlocal shown
        shown = read_until(ours, lambda shown: shown.count(b"you> ") >= n, shown)

    try:
        until_prompt(1)
        os.write(ours, b"hllo\x1b[D\x1b[D\x1b[De\r")
        until_prompt(2)
        os.write(ours, b"\x1b[A!\r")
        until_prompt(3)
        # readline prints its prompt before it waits for a key; a signal in between does not interrupt that wait.
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
        process.send_signal(signal.SIGINT)
        until_prompt(4)
        os.write(ours, b"\x04")
        assert process.wait(timeout=HANG_S) == 0
    finally:
        os.close(ours)
    assert api.seen == [["hello"], ["hello", "you said hello", "hello!"]]


def test_commands_change_the_model_and_the_system_prompt(talk, api, capsys):
    """From the next line on. A wrong one says what there is, and changes nothing."""
    lines = (
        "/model base",
        "hi",
        "/model nobody",
        "/system be kind",
        "so",
        "/system",
        "/modell",
        "end",
        "/new",
        "alone",
    )
    assert talk(*lines) == {"model": "base", "turns": 4}
    assert api.seen == [
        ["hi"], ["be kind", "hi", "you said hi", "so"], ["hi", "you said hi", "so", "you said so", "end"], ["alone"],
    ]  # fmt: skip
    err = capsys.readouterr().err
    assert "error: the server has no model 'nobody'" in err
    assert "no command /modell; did you mean 'model'?" in err


def test_compare_asks_a_second_model_and_goes_on_with_the_first(talk, api, capsys):
    """Both get the same turns, under their names; `/compare` alone ends it."""
    assert talk("/compare base", "hi", "so", "/compare", "end")["turns"] == 3
    said = ["hi", "you said hi", "so", "you said so", "end"]
    assert api.seen == [said[:1], said[:1], said[:3], said[:3], said]
    err = capsys.readouterr().err
    assert err.index("[base]") < err.index("[gentle]")


def test_a_saved_conversation_holds_its_messages(talk, api, tmp_path, capsys):
    """As the chat page loads it and training reads it; nothing is overwritten, and nothing empty is written."""
    file = tmp_path / "talk.json"
    talk(f"/save {file}", "hi", f"/save {file}", "so", f"/save {file}", "/save", system="be kind")
    roles = [("system", "be kind"), ("user", "hi"), ("assistant", "you said hi")]
    assert json.loads(file.read_text()) == {
        "model": "gentle", "messages": [{"role": role, "content": content} for role, content in roles],
    }  # fmt: skip
    err = capsys.readouterr().err
    for said in ("there is nothing to save yet", f"{str(file)!r} exists; choose another file", "/save needs a file"):
        assert said in err


@pytest.mark.parametrize("options", [{"question": "-"}, {"model": "-"}, {"model": "base", "question": "-"}])
def test_a_pipe_is_one_question(talk, api, capsys, options):
    """All of it, with its line breaks; the model may be left out. No prompt and no notice are printed."""
    assert talk("one", "", "two", **options)["turns"] == 1
    assert api.seen == [["one\n\ntwo"]]
    out, err = capsys.readouterr()
    assert (out, err) == ("you said one\n\ntwo\n", "")


def test_one_question_without_an_answer_is_an_error(talk, api):
    """With the server's reason, or because nothing came through the pipe."""
    with pytest.raises(UserError, match="the server refused: too many requests"):
        talk(question="no")
    with pytest.raises(UserError, match="the question on standard input is empty"):
        talk(question="-")
