"""Compiles lora.cpp once for this processor, caches the library and loads it.

torch.compile needs the same compiler, so a machine that serves with vLLM on a CPU usually has one. Without it,
`library()` is None and the caller computes the same sums with torch operators, correct but slower.
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

from counsel.cache import cache_dir

SOURCE = Path(__file__).with_name("lora.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
MAX_SLICES = 8
LANES = 16

logger = logging.getLogger("vllm.counsel")


class Adapter(ctypes.Structure):
    """The addresses of one adapter's weights for one layer; the same fields as in lora.cpp."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p * MAX_SLICES),
        ("columns", ctypes.c_int64),
        ("rank", ctypes.c_int64 * MAX_SLICES),
    ]


class KernelLayer(ctypes.Structure):
    """The shape of one linear layer, and the address of its table of adapters; the same fields as in lora.cpp."""

    _fields_ = [
        ("n_in", ctypes.c_int64),
        ("n_slices", ctypes.c_int64),
        ("n_out", ctypes.c_int64 * MAX_SLICES),
        ("adapters", ctypes.c_void_p),
    ]


class KernelGroups(ctypes.Structure):
    """The addresses of the lists of each adapter's rows; the same fields as in lora.cpp."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one warning, if it cannot be compiled or loaded."""
    compiler = shutil.which("g++")
    if compiler is None:
        logger.warning("g++ is missing (Debian: apt install g++): LoRA runs on torch operators, correct but slower")
        return None
    try:
        loaded = ctypes.CDLL(str(_cached(compiler) or _compile(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        # The compiler fails, or the cache cannot be written to or does not allow executables.
        lines = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
        reason = lines[-1] if lines else error
        logger.warning("cannot compile %s (%s): LoRA runs on torch operators, correct but slower", SOURCE, reason)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name in ("lora_bfloat16", "lora_float32"):
        function = getattr(loaded, name)
        function.restype = None
        function.argtypes = [pointer, pointer, integer, pointer, integer, pointer]
    return loaded


def along_k() -> int:
    """How many values along k are adjacent in a bfloat16 A: 2 if the processor multiplies pairs, else 1."""
    loaded = library()
    return ctypes.c_int64.in_dll(loaded, "bfloat16_along_k").value if loaded else 1


def _folder() -> Path:
    return cache_dir() / "kernels"


def _cached(compiler: str) -> Path | None:
    """The library from an earlier start, or None. A broken one is deleted; the file name ends with its own hash."""
    for library_file in sorted(_folder().glob(f"cpu_lora-{_identity(compiler)}-*.so")):
        # A file cut short by a full disk or a power failure may load, and crash the process when it runs.
        if library_file.stem.endswith(_digest(library_file.read_bytes())):
            return library_file
        library_file.unlink(missing_ok=True)
    return None


def _compile(compiler: str) -> Path:
    _folder().mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=_folder(), suffix=".partial")
    os.close(handle)
    compiled = Path(temporary)
    try:
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", temporary], capture_output=True, text=True, check=True)
        return compiled.replace(_folder() / f"cpu_lora-{_identity(compiler)}-{_digest(compiled.read_bytes())}.so")
    finally:
        compiled.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _identity(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor, because machines may share a home."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = "\n".join([SOURCE.read_text(encoding="utf-8"), *FLAGS, version, processor])
    return _digest(text.encode())
