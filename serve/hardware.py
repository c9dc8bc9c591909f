"""The hardware that serving depends on: cores, memory, GPUs, compiler, and libraries worth preloading."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from counsel.errors import UserError
from counsel.processor import Processor, processor
from serve.vllm_api import vllm_is_cpu_build, vllm_version

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
TCMALLOC_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


# What nvidia-smi is asked about each GPU.
_GPU_FIELDS = "index,uuid,name,memory.total,compute_cap"
# The mark in vLLM's version of a build for other devices -> the device.
_BUILDS = ("rocm", "xpu", "tpu", "metal")
# Distributions that make vLLM run on a device that is not in its own sources.
_PLUGINS = {"vllm-tpu": "tpu", "tpu-inference": "tpu", "vllm-metal": "metal"}


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: its name, memory, and compute capability such as (9, 0)."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Hardware:
    """What the launch plan depends on.

    device: "cpu", "cuda", or one that this project was never run on: "rocm", "xpu", "tpu", "metal". cpus: the logical
    CPUs this process may use. memory_bytes: the RAM, or a container's limit. openmp, tcmalloc: library files, None if
    missing. gpus: the visible GPUs, of "cuda" only.
    """

    device: str
    cpus: tuple[int, ...]
    memory_bytes: int
    processor: Processor
    compiler: str | None = None
    openmp: Path | None = None
    tcmalloc: Path | None = None
    gpus: tuple[Gpu, ...] = ()


def detect() -> Hardware:
    """This machine's hardware. Takes milliseconds, and runs only `nvidia-smi` if there is one."""
    gpus = () if vllm_is_cpu_build() else visible_gpus()
    return Hardware(
        device=_other_device() or ("cuda" if gpus else "cpu"),
        cpus=_cpus(),
        memory_bytes=_memory_bytes(),
        processor=processor(),
        compiler=shutil.which("g++") or shutil.which("clang++"),
        openmp=_first(Path(sys.prefix) / "lib", "libiomp5.so"),
        tcmalloc=_tcmalloc(),
        gpus=gpus,
    )


def visible_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs, or slices of one (MIG), that CUDA_VISIBLE_DEVICES leaves, in its order; () without any.

    Raises UserError if nvidia-smi lists a GPU without its compute capability.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    listing = _nvidia_smi(f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits")
    found: dict[str, Gpu] = {}
    for line in filter(str.strip, listing.splitlines()):
        try:
            index, uuid, name, mib, capability = (field.strip() for field in line.split(","))
            major, minor = map(int, capability.split("."))
        except ValueError as error:
            raise UserError(
                f"nvidia-smi says {line!r}, which lacks a GPU's compute capability; update the NVIDIA driver"
            ) from error
        # A GPU without memory of its own shares the host's.
        found[index] = found[uuid] = Gpu(name, int(mib) << 20 if mib.isdigit() else _memory_bytes(), (major, minor))
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in found if name.isdigit()] if wanted is None else [w.strip() for w in wanted.split(",")]
    if any(name.startswith("MIG-") for name in names):
        found |= _slices(found)
    gpus = []
    for name in names:
        # A UUID may be given by its beginning.
        is_uuid = name.startswith(("GPU-", "MIG-"))
        match = next((gpu for key, gpu in found.items() if key == name or (is_uuid and key.startswith(name))), None)
        if match is None:
            # Like CUDA: what comes after an unknown name is not seen.
            break
        gpus.append(match)
    return tuple(gpus)


def _slices(found: Mapping[str, Gpu]) -> dict[str, Gpu]:
    """The MIG slices by UUID. nvidia-smi lists each below its GPU, with its memory in its profile: `MIG 3g.20gb`."""
    slices, whole = {}, None
    for line in _nvidia_smi("-L").splitlines():
        if match := re.search(r"UUID: (GPU-[\w-]+)", line):
            whole = found.get(match[1])
        elif (match := re.search(r"MIG \S*\.(\d+)gb.*UUID: (MIG-[^)]+)", line)) and whole is not None:
            slices[match[2]] = replace(whole, memory_bytes=int(match[1]) * 10**9)
    return slices


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; empty where it fails, as it does without a GPU."""
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _other_device() -> str | None:
    """The device of a vLLM that was built for neither CPUs nor NVIDIA GPUs."""
    for distribution, device in _PLUGINS.items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return device
    return next((device for device in _BUILDS if device in (vllm_version() or "")), None)


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
