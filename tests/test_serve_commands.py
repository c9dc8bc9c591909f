"""The store's commands as a user types them: what they print, and the JSON line for programs."""

import errno
import fcntl
import json
import os
import resource

import pytest

from counsel.catalog import Base
from counsel.cli import main
from counsel.fingerprint import fingerprint
from serve.__main__ import COMMANDS
from serve.server_registry import ServerRecord, register, registered_servers
from tests.tiny import tiny_adapter


@pytest.fixture
def serve(capsys: pytest.CaptureFixture[str]):
    """Run `python -m serve WORDS`; return the exit status, the last line as JSON (or the error), and the rest."""

    def run(*words: str) -> tuple[int, object, str]:
        status = main("serve", COMMANDS, list(words))
        out, err = capsys.readouterr()
        lines = out.splitlines()
        return (status, json.loads(lines[-1]), "\n".join(lines[:-1])) if status == 0 else (status, err, out)

    return run


def test_an_adapter_is_published_shown_rolled_back_pinned_and_removed(serve, tiny_model: Base, tmp_path):
    """The whole life of an adapter; each step shows in `list` or `show`."""
    store = ("--store", str(tmp_path / "store"))
    sources = [str(tiny_adapter(tiny_model.path, tmp_path / f"gentle{seed}", seed=seed)) for seed in (1, 2)]
    base = ("--model", str(tiny_model.path), "--name", "gentle")

    _, first, printed = serve("publish", sources[0], *base, "--system", "Be kind.", *store)
    assert "rank 8" in printed
    _, second, _ = serve("publish", sources[1], *base, *store)
    assert serve("list", *store)[1] == {"adapters": 1, "versions": 2}

    assert "Be kind." in serve("show", first["adapter"], *store)[2]
    assert serve("show", "gentle", *store)[1]["adapter"] == second["adapter"]
    assert serve("rollback", "gentle", *store)[1]["adapter"] == first["adapter"]
    assert serve("pin", "gentle", *store)[1]["pinned"] is True
    table = serve("list", *store)[2].splitlines()
    assert [row.split()[:4] for row in table[1:]] == [
        ["gentle", first["adapter"].split("@")[1], "current", "pinned"],
        ["gentle", second["adapter"].split("@")[1], "tiny", "8"],
    ]
    assert serve("gc", "--keep", "0", *store)[1]["removed"] == [second["adapter"]]
    assert serve("remove", "gentle", *store)[1]["removed"] == [first["adapter"]]
    assert "the store is empty" in serve("list", *store)[2]


def test_publish_and_list_print_what_a_running_server_cannot_serve(serve, tiny_model: Base, tmp_path):
    """A server for rank 4 follows the store; after it has ended, nothing is printed."""
    store = tmp_path / "store"
    source = str(tiny_adapter(tiny_model.path, tmp_path / "gentle", seed=1))
    server = register(store, ServerRecord("http://127.0.0.1:8000", fingerprint(tiny_model.path), 4))
    words = ("publish", source, "--model", str(tiny_model.path), "--store", str(store))
    reason = "its rank 8 is above this server's --max-lora-rank 4"
    assert "http://127.0.0.1:8000 does not serve gentle@" in (printed := serve(*words)[2])
    assert reason in printed
    assert reason in serve("list", "--store", str(store))[2]
    server.close()
    assert "does not serve" not in serve("list", "--store", str(store))[2] + serve(*words)[2]


def test_every_server_of_a_store_is_registered(tmp_path):
    """Two servers with one process id, as in containers, are both registered until each one ends."""
    records = [ServerRecord(f"http://host{n}:8000", "f00d", 16) for n in (1, 2)]
    files = [register(tmp_path, record) for record in records]
    assert sorted(registered_servers(tmp_path), key=lambda server: server.url) == records
    files[0].close()
    assert registered_servers(tmp_path) == records[1:]
    files[1].close()
    assert registered_servers(tmp_path) == []
    assert list((tmp_path / ".servers").iterdir()) == []


@pytest.mark.parametrize("refused", ["lock", "space"])
def test_a_server_starts_on_a_store_without_locks_or_space(tmp_path, monkeypatch, refused):
    """It is not registered, and leaves no file."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if refused == "lock":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert register(tmp_path, ServerRecord("http://host:8000", "f00d", 16)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / ".servers").iterdir()) == []


def test_list_prints_a_damaged_version(serve, tiny_model: Base, tmp_path):
    """And lists the others."""
    store = tmp_path / "store"
    source = str(tiny_adapter(tiny_model.path, tmp_path / "gentle", seed=1))
    for name in ("gentle", "calm"):
        serve("publish", source, "--model", str(tiny_model.path), "--name", name, "--store", str(store))
    next((store / "calm").glob("*/manifest.json")).write_text("{")
    status, document, printed = serve("list", "--store", str(store))
    assert (status, document) == (0, {"adapters": 2, "versions": 1})
    assert "calm: damaged: " in printed


def test_a_mistake_is_one_line_and_status_1(serve, tmp_path):
    """An adapter, a run or a folder that does not exist."""
    store = ("--store", str(tmp_path / "store"))
    for words in (["show", "nobody"], ["publish", "no-such-run"], ["rollback", "nobody"], ["remove", "nobody"]):
        status, error, out = serve(*words, *store)
        assert (status, out) == (1, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_a_new_key_is_shown_once(serve, tmp_path):
    """The key is printed, its hash is in the file, and the JSON line does not repeat it."""
    path = tmp_path / "keys.txt"
    status, document, printed = serve("key", "ann", "--role", "admin", "--keys", str(path))
    key = printed.rsplit(" ", 1)[1]
    assert status == 0
    assert key.startswith("cs-admin-")
    assert key not in path.read_text() + json.dumps(document)
