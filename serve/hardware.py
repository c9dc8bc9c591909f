"""The hardware that serving depends on: cores, memory, GPU, compiler, and libraries worth preloading."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from counsel.processor import Processor, processor
from serve.vllm_api import vllm_is_cpu_build

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
TCMALLOC_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


@dataclass(frozen=True)
class Hardware:
    """What the launch plan depends on.

    cpus: the logical CPUs this process may use. memory_bytes: the RAM, or a container's limit. openmp, tcmalloc:
    library files, None if missing.
    """

    device: str
    cpus: tuple[int, ...]
    memory_bytes: int
    processor: Processor
    compiler: str | None = None
    openmp: Path | None = None
    tcmalloc: Path | None = None


def detect() -> Hardware:
    """This machine's hardware. Takes milliseconds, and runs only `nvidia-smi -L` if there is one."""
    return Hardware(
        device="cuda" if _cuda() else "cpu",
        cpus=_cpus(),
        memory_bytes=_memory_bytes(),
        processor=processor(),
        compiler=shutil.which("g++") or shutil.which("clang++"),
        openmp=_first(Path(sys.prefix) / "lib", "libiomp5.so"),
        tcmalloc=_tcmalloc(),
    )


def _cuda() -> bool:
    if vllm_is_cpu_build() or shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def _cpus() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _memory_bytes() -> int:
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    # A container without a limit has "max" here (cgroup v2) or a huge number (v1).
    limits += [int(text) for path in CGROUP_LIMITS if (text := _read(path).strip()).isdigit()]
    return min(limits)


def _tcmalloc() -> Path | None:
    for folder in TCMALLOC_FOLDERS:
        for pattern in ("libtcmalloc_minimal.so*", "*/libtcmalloc_minimal.so*", "libtcmalloc.so*", "*/libtcmalloc.so*"):
            if (library := _first(Path(folder), pattern)) is not None:
                return library
    return None


def _first(folder: Path, pattern: str) -> Path | None:
    return next(iter(sorted(folder.glob(pattern))), None) if folder.is_dir() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
