"""Pushing an adapter to a hub, which is a local HTTP server here."""

import base64
import http.server
import json
import threading
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.files import read_json
from tests.hub_server import Hub
from tests.tiny import tiny_base
from tests.train_runs import finished_run
from train.recipe import Recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Recipe, dict]:
    """One finished tiny run and its summary."""
    folder = tmp_path_factory.mktemp("work")
    return finished_run(tiny_base(folder / "tiny-llama", "llama"), folder)


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.held = [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_sends_adapter_tokenizer_and_card(finished, hub, monkeypatch):
    """The hub receives the adapter, its config, the tokenizer and the card, and nothing else."""
    from train.push import Push, push

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    done = push(Push(str(recipe.run_path), "org/gentle"))

    commit = next(body for path, _, body in hub.seen if "/commit/" in path)
    sent = {json.loads(line)["value"].get("path") for line in commit.splitlines()} - {None}
    assert sent == {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json",
                    "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert done["sent"]
    # The base is a local folder: the card passes the hub's check, and no path is sent.
    assert any(path.endswith("/api/validate-yaml") for path, _, _ in hub.seen)
    content = b"".join(base64.b64decode(json.loads(line)["value"].get("content", "")) for line in commit.splitlines())
    assert b'"base_model_name_or_path": "tiny-llama"' in content
    assert recipe.base.encode() not in content


def test_a_hub_that_never_answers_is_a_one_line_error(finished, hub, monkeypatch):
    """The push ends with an error and does not wait forever."""
    from train import push as pushing

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(pushing, "ANSWER_S", 0.2)
    hub.held = threading.Event()
    try:
        with pytest.raises(UserError, match=r"the hub at http://127\.0\.0\.1:\d+ did not answer within 0\.2 s"):
            pushing.push(pushing.Push(str(recipe.run_path), "org/gentle"))
    finally:
        hub.held.set()


def test_a_card_that_the_hub_rejects_is_a_one_line_error(finished, hub, monkeypatch):
    """The error contains the hub's reason."""
    from train import push as pushing

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(pushing, "card_text", lambda run, merged: "---\nbase_model: /home/ada/base\n---\n")

    with pytest.raises(UserError, match=r"rejected 'org/gentle': ValueError: Invalid metadata.*must be an id"):
        pushing.push(pushing.Push(str(recipe.run_path), "org/gentle"))


def test_dry_run_sends_nothing(finished, hub, monkeypatch, capsys):
    """--dry-run lists the files and opens no connection."""
    from train.push import Push, push

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    done = push(Push(str(recipe.run_path), "org/gentle", dry_run=True))

    assert hub.seen == []
    assert not done["sent"]
    assert "adapter_model.safetensors" in capsys.readouterr().out


def test_a_refused_push_never_shows_the_token(finished, hub, monkeypatch):
    """The error for a wrong token does not contain it; the error for a missing one names the variable to set."""
    from train.push import Push, push

    recipe, _ = finished
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    with pytest.raises(UserError) as refusal:
        push(Push(str(recipe.run_path), "org/gentle"))
    assert "hf_wrong_one" not in str(refusal.value)

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"):
        push(Push(str(recipe.run_path), "org/gentle"))


def test_published_files_contain_no_local_path(finished):
    """The adapter's config has only the folder name of a local base, and its tokenizer has no padding."""
    recipe, _ = finished
    adapter = recipe.run_path / "adapter"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == "tiny-llama"
    assert read_json(adapter / "tokenizer.json")["padding"] is None
    assert str(Path(recipe.base).parent) not in (adapter / "tokenizer_config.json").read_text()
