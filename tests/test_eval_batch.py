"""A Batch file answered on the command's own engine: the server's rows, PEFT's tokens, kill -9, shards."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from counsel import store as adapter_store
from counsel.catalog import Base
from counsel.errors import UserError
from counsel.files import write_jsonl, write_text
from eval.batch import batch, shard_of
from eval.config import BatchConfig
from eval.samples import read_rows
from tests.conftest import SYSTEM, Served
from tests.greedy import greedy_answers
from tests.held import kill_when_stopped
from tests.json_handler import JsonHandler
from tests.test_eval import command

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
N_TOKENS = 16
LONG = "long"
FEW = ("--concurrency", "4")  # of the long requests, no more than the server allows per key
TOPICS = ("work", "sleep", "friends", "moving")
GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": N_TOKENS}
# The session's server: float32, so that greedy text is PEFT's.
ENGINE = """
compile: false
dtype: float32
max_model_len: 512
max_num_seqs: 16
kv_cache_memory_gb: 0.1
max_lora_rank: 16
max_completion_tokens: 256
"""


def request(name: str, model: str, path: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": path, "body": {"model": model, **body}}


def asked(topic: str, system: str = "") -> list[dict[str, str]]:
    user = {"role": "user", "content": f"{topic} is hard, what can help me?"}
    return [{"role": "system", "content": system}, user] if system else [user]


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    return {row["custom_id"]: row for row in read_rows(path)}


class Batch:
    """One file of requests and ways to answer it. `before`: the lines that the killed engine left."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.served, self.folder = served, folder
        self.exact = adapter_store.find(served.store, "gentle").id
        self.models = ("calm", "gentle", self.exact, served.base.name)
        self.bad = [
            request("unknown field", "calm", messages=asked("work"), temprature=0),
            request("unknown model", "clam", messages=asked("work")),
            request("too long", "calm", messages=asked("work"), max_tokens=257),
            request("wrong type", "calm", messages=asked("work"), temperature="hot"),
        ]
        self.good = [
            request("text", "calm", COMPLETIONS, prompt="i feel lonely", max_tokens=8, temperature=0, logprobs=2),
            request("ids", "gentle", COMPLETIONS, prompt=[2, 9, 9], max_tokens=1, temperature=0, prompt_logprobs=0),
            request("two", "gentle", messages=asked("work"), n=2, seed=7, max_tokens=8, temperature=1, top_p=0.9),
            request("stop", "calm", messages=asked("work"), stop=["e"], max_completion_tokens=32, temperature=0),
            *(request(f"{model} {topic}", model, messages=asked(topic), **GREEDY)
              for model in self.models for topic in TOPICS),
            # Asked last and sixteen times as long: some are unfinished when the rest is answered.
            *(request(f"{LONG} {i}", served.base.name, messages=asked("talk"), ignore_eos=True, max_tokens=256)
              for i in range(6)),
        ]  # fmt: skip
        write_jsonl(folder / "in.jsonl", self.bad + self.good)
        write_jsonl(folder / "good.jsonl", self.good)
        write_text(folder / "engine.yaml", ENGINE)

    @property
    def answers(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def before(self) -> list[str]:
        return (self.folder / "before.jsonl").read_text(encoding="utf-8").splitlines()

    def command(self, requests: str, answers: str, *words: str) -> subprocess.Popen[str]:
        files = (str(self.folder / requests), str(self.folder / answers))
        return command("batch", *files, *words, key=self.served.user_key)

    def on_engine(self) -> subprocess.Popen[str]:
        """It stops as soon as all but the long requests are answered."""
        base, store = str(self.served.base.path), str(self.served.store)
        settings = ("--engine-config", str(self.folder / "engine.yaml"), *FEW)
        files = (str(self.folder / "in.jsonl"), str(self.answers))
        short = [request["custom_id"] for request in self.bad + self.good if not request["custom_id"].startswith(LONG)]
        return command(
            "batch", *files, "--base", base, "--store", store, *settings, key=self.served.user_key,
            stops=f"{set(short)!r} <= {{key[0] for key in self.done}}",
        )  # fmt: skip

    def on_server(self, answers: str, *words: str) -> subprocess.Popen[str]:
        return self.command("good.jsonl", answers, "--url", self.served.base_url, *FEW, *words)


@pytest.fixture(scope="module")
def doomed(tiny_model: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.Popen[str], Path]:
    """A batch whose engine cannot start, and its folder; it runs in parallel with the others."""
    folder = tmp_path_factory.mktemp("doomed")
    write_jsonl(folder / "in.jsonl", [request("one", tiny_model.name, messages=asked("work"))])
    write_text(folder / "engine.yaml", "vllm_args: --no-such-flag\n")
    files = (str(folder / "in.jsonl"), str(folder / "out.jsonl"))
    settings = ("--base", str(tiny_model.path), "--engine-config", str(folder / "engine.yaml"))
    return command("batch", *files, *settings), folder


@pytest.fixture(scope="module")
def killed(server: Served, doomed: Any, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """A batch on its own engine, killed with -9 during the long requests, in the middle of a write."""
    batch = Batch(server, tmp_path_factory.mktemp("batch"))
    engine = kill_when_stopped(batch.on_engine())
    shutil.copy(batch.answers, batch.folder / "before.jsonl")
    with batch.answers.open("a", encoding="utf-8") as file:
        file.write('{"id": "batch_req_calm')
    assert len(engine) >= 2
    assert psutil.wait_procs(engine, timeout=300)[1] == [], "the engine outlived its command"
    return batch


@pytest.fixture(scope="module")
def from_server(killed: Batch) -> dict[str, dict[str, Any]]:
    """The server's rows to the same requests, asked in two shards and merged by cat: custom_id -> row."""
    shards = [killed.on_server("http.jsonl", "--shard", f"{k}/2") for k in (1, 2)]
    for shard in shards:
        _, err = shard.communicate(timeout=1800)
        assert shard.returncode == 0, err
    parts = [(killed.folder / f"http-{k}-of-2.jsonl").read_text(encoding="utf-8") for k in (1, 2)]
    (killed.folder / "http.jsonl").write_text("".join(parts), encoding="utf-8")
    return by_id(killed.folder / "http.jsonl")


@pytest.mark.slow
def test_a_killed_batch_is_finished_without_a_row_lost_doubled_or_changed(killed: Batch) -> None:
    """Killed on an engine and continued on the server: each request once, each earlier answer unchanged."""
    again = killed.on_server("out.jsonl")
    out, err = again.communicate(timeout=1800)
    lines = killed.answers.read_text(encoding="utf-8").splitlines()
    kept = [line for line in killed.before if json.loads(line)["error"] is None]

    assert again.returncode == 0, err
    assert 0 < len(kept) < len(killed.good)
    assert lines[: len(kept)] == kept
    assert sorted(json.loads(line)["custom_id"] for line in lines) == sorted(r["custom_id"] for r in killed.good)
    document = {"requests": len(killed.good), "failed": 0, "answers": str(killed.answers)}
    assert json.loads(out.splitlines()[-1]) == document


@pytest.mark.slow
def test_each_request_is_answered_by_its_own_model_as_peft_says(killed: Batch) -> None:
    """Base, two adapters and an exact version in one file: PEFT's greedy tokens, with gentle's system prompt."""
    served, rows = killed.served, {row["custom_id"]: row for row in map(json.loads, killed.before)}
    for model in killed.models:
        name = model.partition("@")[0]
        bodies = {topic: rows[f"{model} {topic}"]["response"]["body"] for topic in TOPICS}
        conversations = [asked(topic, SYSTEM if name == "gentle" else "") for topic in bodies]
        answers = greedy_answers(served.base.path, served.adapters.get(name), conversations, N_TOKENS)
        expected = [answer.ids for answer in answers]

        assert len(bodies) == len(TOPICS)
        assert [body["choices"][0]["token_ids"] for body in bodies.values()] == expected, model
    assert {row["response"]["body"]["model"] for name, row in rows.items() if "gentle" in name} == {killed.exact}


@pytest.mark.slow
def test_an_engine_and_a_server_leave_the_same_rows(killed: Batch, from_server: dict[str, dict[str, Any]]) -> None:
    """Chat and text, several choices, seeds, stops, likelihoods: all but ids and times equal the server's."""
    rows = map(json.loads, killed.before)
    # The long ones are sampled without a seed.
    ours = [row for row in rows if row["error"] is None and not row["custom_id"].startswith(LONG)]

    assert {"text", "ids", "two", "stop"} < {row["custom_id"] for row in ours}
    for row in ours:
        theirs = from_server[row["custom_id"]]
        assert row.keys() == theirs.keys()
        assert row["response"].keys() == theirs["response"].keys()
        assert alike(row["response"]["body"]) == alike(theirs["response"]["body"]), row["custom_id"]


def alike(body: Any) -> Any:
    """A reply without ids and times; likelihoods to three digits, because batches differ in rounding."""
    if isinstance(body, dict):
        return {key: alike(value) for key, value in body.items() if key not in ("id", "created", "system_fingerprint")}
    if isinstance(body, list):
        return [alike(value) for value in body]
    return pytest.approx(body, abs=2e-3) if isinstance(body, float) else body


@pytest.mark.slow
def test_a_refused_request_is_an_error_row(killed: Batch) -> None:
    """An unknown field, a model not in the store, too many tokens, a wrong type: an error row each."""
    failed = [row for row in map(json.loads, killed.before) if row["error"] is not None]
    messages = {row["custom_id"]: row["error"]["message"] for row in failed}

    assert messages.keys() == {each["custom_id"] for each in killed.bad}
    assert messages["unknown field"] == "400: field 'temprature' is unknown here; leave it out"
    assert messages["unknown model"] == "404: the model 'clam' does not exist; did you mean 'calm'?"
    assert messages["too long"] == "400: max_tokens is 257; at most 256 is allowed here"
    assert messages["wrong type"].startswith("400: ")
    assert "temperature" in messages["wrong type"]
    assert all(row["response"] is None for row in failed)


@pytest.mark.slow
def test_merged_shards_are_the_whole(killed: Batch, from_server: dict[str, dict[str, Any]]) -> None:
    """Both shards' files together are complete: the whole batch needs no server, because nothing is left to ask."""
    text = (killed.folder / "http.jsonl").read_text(encoding="utf-8")
    whole = killed.command("good.jsonl", "http.jsonl", "--url", "http://127.0.0.1:9/v1")
    out, err = whole.communicate(timeout=900)

    assert whole.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["requests"] == len(killed.good) == len(from_server)
    assert (killed.folder / "http.jsonl").read_text(encoding="utf-8") == text


def test_a_requests_shard_depends_on_its_id_alone() -> None:
    """By hash: SHA-256("a") ends in hex bb, which is 3 modulo 4, the fourth shard; many names spread evenly."""
    assert shard_of("a", 4) == 4
    assert shard_of("a", 1) == 1
    counts = [[shard_of(f"request-{i}", 4) for i in range(4000)].count(k) for k in (1, 2, 3, 4)]
    assert sum(counts) == 4000
    assert min(counts) > 850


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "http://x/v1", "base": "smollm2-135m"}, "url and base exclude each other"),
        ({"store": "store"}, "give --base"),
        ({"engine_config": "e.yaml"}, "give --base"),
        ({"engine": "ray"}, "give --base"),
        ({"base": "smollm2-135m", "actors": 2}, "give --engine ray"),
        ({"engine": "e.yaml"}, "allowed: local, ray"),
        ({"shard": "0/4"}, "from 1 to N"),
        ({"shard": "5/4"}, "from 1 to N"),
        ({"shard": "a quarter"}, "from 1 to N"),
        ({"concurrency": 0}, "at least 1"),
    ],
)
def test_conflicting_settings_are_refused(given: dict[str, Any], message: str) -> None:
    """In one line, before anything starts."""
    with pytest.raises(UserError, match=message):
        BatchConfig("in.jsonl", "out.jsonl", **given)


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_one_line(doomed: tuple[subprocess.Popen[str], Path]) -> None:
    """The line has vLLM's reason and the log's path; exit status 1, and no row."""
    failed, folder = doomed
    _, err = failed.communicate(timeout=1800)

    assert failed.returncode == 1
    assert err.splitlines()[-1].startswith("error: the engine ended: error: unrecognized arguments: --no-such-flag")
    assert str(folder / "out.log") in err
    assert (folder / "out.jsonl").read_text(encoding="utf-8") == ""


class Echo(JsonHandler):
    """A server that replies with the prompt; to the prompt `list` with a list, which is not a valid reply."""

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
        self.server.seen.append(prompt)
        self.reply(200, [] if prompt == "list" else {"id": "x", "echo": prompt})


@pytest.fixture
def echo() -> Iterator[ThreadingHTTPServer]:
    """It runs in a thread; `seen` has the prompts it received."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answered_by(server: ThreadingHTTPServer, folder: Path, prompts: dict[str, str], answers: str = "out.jsonl") -> Any:
    """The result of a batch that asks these prompts by name."""
    write_jsonl(folder / "in.jsonl", [request(name, "m", COMPLETIONS, prompt=text) for name, text in prompts.items()])
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return batch(BatchConfig(str(folder / "in.jsonl"), str(folder / answers), url=url, concurrency=1))


def echoes(path: Path) -> dict[str, str]:
    return {name: row["response"]["body"]["echo"] for name, row in by_id(path).items()}


def test_an_edited_request_is_asked_again(echo: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Its old answer belongs to another prompt and moves to another file; the other answers stay."""
    answered_by(echo, tmp_path, {"a": "one", "b": "two"})
    answered_by(echo, tmp_path, {"a": "one", "b": "two, edited", "c": "three"})

    assert echo.seen == ["one", "two", "two, edited", "three"]
    assert echoes(tmp_path / "out.jsonl") == {"a": "one", "b": "two, edited", "c": "three"}
    assert echoes(tmp_path / "out-replaced.jsonl") == {"b": "two"}


def test_a_torn_shard_is_merged_by_cat(echo: ThreadingHTTPServer, tmp_path: Path) -> None:
    """The partial row is asked again; the complete row that `cat` appended to the same line is kept."""
    answered_by(echo, tmp_path, {"a": "one", "b": "two", "c": 'a {"id": "batch_req_x"} in it'}, "whole.jsonl")
    one, two, three = (tmp_path / "whole.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text(one[:-9] + two[:70] + three, encoding="utf-8")
    echo.seen.clear()
    result = answered_by(echo, tmp_path, {"a": "one", "b": "two", "c": 'a {"id": "batch_req_x"} in it'})

    assert echo.seen == ["one", "two"]
    assert result.document["failed"] == 0
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8").startswith(three)


def test_a_reply_that_is_not_an_object_is_an_error_row(echo: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Only its own request fails."""
    result = answered_by(echo, tmp_path, {"a": "list", "b": "two"})
    rows = by_id(tmp_path / "out.jsonl")

    assert (result.exit_status, result.document["failed"]) == (1, 1)
    assert rows["a"]["error"]["message"] == "the reply is not a JSON object: []"
    assert rows["b"]["error"] is None


@pytest.mark.parametrize(("requests", "answers"), [("in.jsonl", "out.log"), ("out.log", "out.jsonl")])
def test_the_engines_log_must_not_overwrite_a_file_of_the_batch(tmp_path: Path, requests: str, answers: str) -> None:
    """The command refuses such names."""
    write_jsonl(tmp_path / requests, [request("a", "m", COMPLETIONS, prompt="one")])

    with pytest.raises(UserError, match="the engine would write its log to"):
        batch(BatchConfig(str(tmp_path / requests), str(tmp_path / answers), base="smollm2-135m"))
    assert not (tmp_path / answers).exists()
