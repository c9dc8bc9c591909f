"""Compile cpu_lora.cpp once for this processor, keep the library in the cache, and hand out its functions.

torch.compile needs the same compiler, so a machine that serves with vLLM on CPU usually has one. Where there is none,
`library()` is None and the caller does the same sums with torch operators, correct but slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from counsel.catalog import cache_dir

SOURCE = Path(__file__).with_name("lora.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
MAX_SLICES = 8
LANES = 16

logger = logging.getLogger("vllm.counsel")


class Adapter(ctypes.Structure):
    """Where one adapter's weights for one layer lie; the same fields as in the source."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p * MAX_SLICES),
        ("columns", ctypes.c_int64),
        ("rank", ctypes.c_int64 * MAX_SLICES),
    ]


class Layer(ctypes.Structure):
    """The shape of one linear layer, and where its table of adapters lies; the same fields as in the source."""

    _fields_ = [
        ("n_in", ctypes.c_int64),
        ("n_slices", ctypes.c_int64),
        ("n_out", ctypes.c_int64 * MAX_SLICES),
        ("adapters", ctypes.c_void_p),
    ]


class Groups(ctypes.Structure):
    """Where the rows of each adapter are listed; the same fields as in the source."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None (and one warning) where it cannot be had."""
    compiler = shutil.which("g++")
    if compiler is None:
        logger.warning("no g++ here (Debian: apt install g++): LoRA runs on torch operators, correct but slower")
        return None
    try:
        loaded = ctypes.CDLL(str(_kept(compiler) or _compile(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        # No compiler that works, no folder to write to, or one from which nothing may be run.
        said = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
        reason = said[-1] if said else error
        logger.warning("cannot compile %s (%s): LoRA runs on torch operators, correct but slower", SOURCE, reason)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name in ("lora_bfloat16", "lora_float32"):
        function = getattr(loaded, name)
        function.restype = None
        function.argtypes = [pointer, pointer, integer, pointer, integer, pointer]
    return loaded


def along_k() -> int:
    """How many numbers along k lie side by side in a bfloat16 A: 2 where the processor multiplies pairs, else 1."""
    loaded = library()
    return ctypes.c_int64.in_dll(loaded, "bfloat16_along_k").value if loaded else 1


def _folder() -> Path:
    return cache_dir() / "kernels"


def _kept(compiler: str) -> Path | None:
    """The library compiled before, if it is whole; what is not is removed. Its name ends with its own hash."""
    for found in sorted(_folder().glob(f"cpu_lora-{_identity(compiler)}-*.so")):
        # One cut short by a full disk or a lost power supply may load, and end the process when it is run.
        if found.stem.endswith(_digest(found.read_bytes())):
            return found
        found.unlink(missing_ok=True)
    return None


def _compile(compiler: str) -> Path:
    _folder().mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=_folder(), suffix=".partial")
    os.close(handle)
    made = Path(temporary)
    try:
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", temporary], capture_output=True, text=True, check=True)
        return made.replace(_folder() / f"cpu_lora-{_identity(compiler)}-{_digest(made.read_bytes())}.so")
    finally:
        made.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _identity(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor: a home may be shared by machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = "\n".join([SOURCE.read_text(encoding="utf-8"), *FLAGS, version, processor])
    return _digest(text.encode())
