"""The store's commands as a user types them: what they print, and the JSON line that programs read."""

import json

import pytest

from serve.__main__ import COMMANDS
from tests.tiny import tiny_adapter
from train.catalog import Base
from train.command import main


@pytest.fixture
def serve(capsys: pytest.CaptureFixture[str]):
    """Run `python -m serve WORDS`; return exit status, the last line as JSON (or the error), and the text above it."""

    def run(*words: str) -> tuple[int, object, str]:
        status = main("serve", COMMANDS, list(words))
        out, err = capsys.readouterr()
        lines = out.splitlines()
        return (status, json.loads(lines[-1]), "\n".join(lines[:-1])) if status == 0 else (status, err, out)

    return run


def test_an_adapter_is_published_shown_rolled_back_pinned_and_removed(serve, tiny_model: Base, tmp_path):
    """The whole life of an adapter by command, each step's effect seen in `list` or `show`."""
    store = ("--store", str(tmp_path / "store"))
    sources = [str(tiny_adapter(tiny_model.path, tmp_path / f"gentle{seed}", seed=seed)) for seed in (1, 2)]
    base = ("--model", str(tiny_model.path), "--name", "gentle")

    _, first, said = serve("publish", sources[0], *base, "--system", "Be kind.", *store)
    assert "rank 8" in said
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


def test_a_mistake_is_one_line_and_status_1(serve, tmp_path):
    """An adapter, a run or a folder that is not there."""
    store = ("--store", str(tmp_path / "store"))
    for words in (["show", "nobody"], ["publish", "no-such-run"], ["rollback", "nobody"], ["remove", "nobody"]):
        status, error, out = serve(*words, *store)
        assert (status, out) == (1, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_a_new_key_is_shown_once(serve, tmp_path):
    """The key is printed, its hash is in the file, and the JSON line does not repeat it."""
    path = tmp_path / "keys.txt"
    status, document, said = serve("key", "ann", "--role", "admin", "--keys", str(path))
    key = said.rsplit(" ", 1)[1]
    assert status == 0
    assert key.startswith("cs-admin-")
    assert key not in path.read_text() + json.dumps(document)
